"""LLaVA-Mini with Vicuna-13B: the paper's stages, at 336 pixels, in high resolution, and with videos.

1. Start from CLIP ViT-L/14-336 and the language model, as Hugging Face directories:
python launch/convert.py import --vision=clip-vit-large-patch14-336 --decoder=vicuna-13b-v1.5 --to=runs/vicuna_13b_start

2. Prepare LLaVA's 558K captions, its 665K instructions and, for stage2_video, 100K instructions about videos; each is
a JSON file and the directory of its images or videos. LLaVA's own files repeat ids, and some samples spell a special
token or lack their image:
python launch/prepare_data.py --source=blip_laion_cc_sbu_558k.json --media_root=images \
  --tokenizer=vicuna-13b-v1.5 --number_duplicates --out=data/llava_captions
python launch/prepare_data.py --source=llava_v1_5_mix665k.json --media_root=images \
  --tokenizer=vicuna-13b-v1.5 --number_duplicates --max_refused=0.01 --out=data/llava_instructions
python launch/prepare_data.py --source=video_instructions.json --media_root=videos \
  --tokenizer=vicuna-13b-v1.5 --number_duplicates --out=data/video_instructions

3. Train; `recipes.py` says what each stage reads and trains:
python launch/train.py --config=configs/llava_mini_vicuna_13b.py:stage1 --workdir=runs/vicuna_13b_stage1
python launch/train.py --config=configs/llava_mini_vicuna_13b.py:stage2 --workdir=runs/vicuna_13b_stage2
python launch/train.py --config=configs/llava_mini_vicuna_13b.py:stage2_hd --workdir=runs/vicuna_13b_hd
python launch/train.py --config=configs/llava_mini_vicuna_13b.py:stage2_video --workdir=runs/vicuna_13b_video
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import paper_stage


def get_config(stage: str = 'stage2') -> ConfigDict:
  model = LlavaMiniConfig.preset('vicuna_13b')
  return paper_stage(model, stage, template='vicuna_v1', name='vicuna_13b').to_config_dict()

"""LLaVA-Mini with Llama-3.1-8B-Instruct at 336 pixels, one vision token: the paper's stage 1 and stage 2.

python launch/train.py --config=configs/llava_mini_llama31_8b.py:stage1 --workdir=runs/llama31_8b_stage1
python launch/train.py --config=configs/llava_mini_llama31_8b.py:stage2 --workdir=runs/llama31_8b_stage2

Data: 558K captions (stage 1) and 665K instructions (stage 2) in LLaVA's format, prepared with
python launch/prepare_data.py --source=FILE.json --image_root=IMAGES --tokenizer_vocab_size=0 --out=data/llava_STAGE
Set --config.data.tokenizer to the tokenizer directory of the language model.
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import paper_stage


def get_config(stage: str = 'stage2') -> ConfigDict:
  model = LlavaMiniConfig.preset('llama31_8b')
  return paper_stage(model, stage, template='llama_3_1', dataset=f'data/llava_{stage}').to_config_dict()

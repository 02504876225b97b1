"""A small model on generated scenes, on two CPU cores: stage 1 as LLaVA-v1.5, from scratch; stage 2 as LLaVA-Mini.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/train.py --config=configs/tiny_scenes.py:stage2 --workdir=runs/scenes_stage2
python launch/evaluate.py --workdir=runs/scenes_stage2 --dataset=data/scenes --limit=6000 --images=real --images=blank
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig, require_choice
from llava_mini_jax.recipes import scenes_stage1, scenes_stage2

STAGES = {'stage1': (scenes_stage1, 4.0), 'stage2': (scenes_stage2, 0.4)}  # and epochs


def get_config(stage: str = 'stage1') -> ConfigDict:
  require_choice('stage', stage, STAGES)
  recipe, epochs = STAGES[stage]
  return recipe(LlavaMiniConfig.preset('tiny'), epochs=epochs).to_config_dict()

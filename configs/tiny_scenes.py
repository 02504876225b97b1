"""A one-token LLaVA-Mini from scratch on generated scenes, on two CPU cores.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py --workdir=runs/scenes
python launch/evaluate.py --workdir=runs/scenes --dataset=data/scenes --images=real --images=blank
Longer: --config=configs/tiny_scenes.py:epochs=20
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import scenes_from_scratch


def get_config(arguments: str = 'epochs=2') -> ConfigDict:
  epochs = float(arguments.removeprefix('epochs='))
  return scenes_from_scratch(LlavaMiniConfig.preset('tiny'), epochs=epochs).to_config_dict()

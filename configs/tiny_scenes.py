"""A one-token LLaVA-Mini from scratch on generated scenes, on two CPU cores.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py --workdir=runs/scenes
python launch/evaluate.py --workdir=runs/scenes --dataset=data/scenes --images=real --images=blank
Longer: --config=configs/tiny_scenes.py:epochs=20
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig


def get_config(arguments: str = 'epochs=2') -> ConfigDict:
  return Experiment(
    model=LlavaMiniConfig.preset('tiny'),
    data=DataConfig(
      dataset='data/scenes',
      template='qa',
      row_length=96,
      fused_text=80,
      side_by_side=True,
      max_turns=6,
    ),
    train=TrainConfig(
      groups=(('.*', 6e-4),),
      batch_size=16,
      epochs=float(arguments.removeprefix('epochs=')),
      warmup_ratio=0.03,
      weight_decay=0.05,
      beta2=0.99,
      log_every=20,
      save_every=500,
    ),
  ).to_config_dict()

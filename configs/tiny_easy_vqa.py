"""A one-token LLaVA-Mini from scratch on easy-VQA, on two CPU cores: what launch/quickstart.sh runs.

python launch/prepare_data.py --source=easy_vqa --out=data/easy_vqa
python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/tiny
Longer: --config=configs/tiny_easy_vqa.py:epochs=20
"""

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig


def get_config(arguments: str = 'epochs=7') -> ConfigDict:
  return Experiment(
    model=LlavaMiniConfig.preset('tiny'),
    data=DataConfig(
      dataset='data/easy_vqa',
      template='qa',
      row_length=128,
      fused_text=104,
      side_by_side=True,
      flip=0.5,
      shift=8,
    ),
    train=TrainConfig(
      groups=(('.*', 4e-4),),
      batch_size=16,
      epochs=float(arguments.removeprefix('epochs=')),
      warmup_ratio=0.03,
      weight_decay=0.05,
      beta2=0.99,
      log_every=20,
      save_every=1000,
    ),
  ).to_config_dict()

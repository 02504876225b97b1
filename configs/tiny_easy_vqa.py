"""A one-token LLaVA-Mini from scratch on easy-VQA, on two CPU cores: what launch/quickstart.sh runs.

python launch/prepare_data.py --source=easy_vqa --out=data/easy_vqa
python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/tiny
Longer: --config=configs/tiny_easy_vqa.py:epochs=40
"""

import dataclasses

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig


def get_config(arguments: str = '') -> ConfigDict:
  epochs = float(arguments.removeprefix('epochs=')) if arguments else 15.0
  model = LlavaMiniConfig.preset('tiny')
  return Experiment(
    model=dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, vocab_size=512)),
    data=DataConfig(
      dataset='data/easy_vqa',
      template='vicuna_v1',
      default_system=False,
      row_length=72,
      max_turns=4,
      flip=0.5,
      shift=8,
    ),
    train=TrainConfig(
      groups=(('.*', 2e-3),),
      batch_size=64,
      epochs=epochs,
      warmup_ratio=0.05,
      weight_decay=0.05,
      beta2=0.99,
      mesh=(1, -1, 1),
      save_every=500,
    ),
  ).to_config_dict()

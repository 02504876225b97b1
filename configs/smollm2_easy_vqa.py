"""Pretrained parts: SmolLM2-135M-Instruct learns to read one token from the vision tower that quickstart.sh trained.

python launch/convert.py export --from=runs/quickstart --to=runs/quickstart-hf
python launch/convert.py import --vision=runs/quickstart-hf --decoder=SmolLM2-135M-Instruct --prefusion_layers=1 \
  --prefusion_init=decoder --to=runs/smollm2_start
python launch/train.py --config=configs/smollm2_easy_vqa.py --workdir=runs/smollm2
Longer: --config=configs/smollm2_easy_vqa.py:steps=1000
"""

import dataclasses

from ml_collections import ConfigDict

from llava_mini_jax.config import LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig


def get_config(arguments: str = 'steps=300') -> ConfigDict:
  tiny, smollm2 = LlavaMiniConfig.preset('tiny'), LlavaMiniConfig.preset('smollm2_135m')
  return Experiment(
    model=dataclasses.replace(
      smollm2, vision=tiny.vision, prefusion=PrefusionConfig(num_layers=1), dtype='float32', scan=tiny.scan
    ),
    data=DataConfig(
      dataset='data/easy_vqa', template='qa', row_length=64, fused_text=52, side_by_side=True, flip=0.5, shift=8
    ),
    train=TrainConfig(
      groups=(('vision/.*', 'frozen'), ('(projector|compressor)/.*', 1e-3), ('.*', 1e-4)),
      init_from='runs/smollm2_start',
      batch_size=4,
      epochs=10.0,
      max_steps=int(arguments.removeprefix('steps=')),
      warmup_ratio=0.03,
      beta2=0.99,
      save_every=500,
    ),
  ).to_config_dict()

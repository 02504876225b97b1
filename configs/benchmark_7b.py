"""The steps that speed is compared by: 7B, 512 text tokens per sample, unpacked, global batch 256, all of it trains.

| argument | what it is |
|---|---|
| decoder | the language model alone on rows of text, embeddings included: what MaxText and others report |
| mini | LLaVA-Mini: one vision token per image and pre-fusion; the tower is frozen |
| v15 | in the manner of LLaVA-v1.5: 576 tokens per image and no pre-fusion; the tower is frozen |

A number after a comma is the number of text tokens per sample.

python launch/compile_tpu.py --config=configs/benchmark_7b.py:mini --topology=v5e-64
python launch/compile_tpu.py --config=configs/benchmark_7b.py:decoder,2048 --topology=v5e-64
python launch/compile_tpu.py --config=configs/benchmark_7b.py:v15 --against=configs/benchmark_7b.py:mini
"""

import dataclasses

from ml_collections import ConfigDict

from llava_mini_jax.config import (
  ConfigError,
  LlavaMiniConfig,
  VisionConfig,
  require_choice,
)
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

KINDS = ('decoder', 'mini', 'v15')


def get_config(arguments: str = 'mini') -> ConfigDict:
  kind, _, text = arguments.partition(',')
  require_choice('benchmark_7b', kind, KINDS)
  if text and not text.isdigit():
    raise ConfigError(f'benchmark_7b: expected a number of tokens after the comma; found {text!r}')
  tokens = int(text or 512)
  model = LlavaMiniConfig.preset('vicuna_7b')
  groups = (('vision/.*', 'frozen'), ('decoder/embed_tokens', 'frozen'), ('.*', 1e-4))
  visuals, slots = 1, 1
  if kind != 'mini':
    model = model.without_compression()
    slots = model.tokens_per_visual
  if kind == 'decoder':
    # Its only trace of vision: the smallest tower there is, frozen and not used.
    tower = VisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    model = dataclasses.replace(model, vision=tower)
    groups, visuals, slots = (('(vision|projector)/.*', 'frozen'), ('.*', 1e-4)), 0, 0
  data = DataConfig(row_length=tokens + slots, visuals_per_row=visuals, fused_text=tokens)
  return Experiment(model, data, TrainConfig(groups=groups)).to_config_dict()

"""Measurements that the documents quote.

python launch/benchmark.py train --sizes=tiny,medium
python launch/benchmark.py attention
python launch/benchmark.py scaling --sizes=tiny --devices=8
python launch/benchmark.py input --config=configs/tiny_easy_vqa.py
python launch/benchmark.py infer --sizes=tiny,medium --requests=1,4,16,64
python launch/benchmark.py sessions --sizes=tiny,medium --frames=100,1000,10800
python launch/benchmark.py few_bits --sizes=tiny,medium
python launch/benchmark.py video_memory --preset=tiny --frames=100,1000,10800 --chunk=16 --run
python launch/benchmark.py video_memory --preset=vicuna_7b --frames=100,1000,10800 --chunk=16
python launch/benchmark.py packing
python launch/benchmark.py serve --url=http://127.0.0.1:8000 --clients=8 --seconds=30
python launch/benchmark.py import_memory --layers=10 --out=benchmark
python launch/benchmark.py export_memory --layers=2 --out=benchmark
"""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from llava_mini_jax.benchmark import (
  asking,
  attention_speed,
  convert_memory,
  few_bits,
  input_pipeline,
  packing_gain,
  scaling,
  sessions,
  train_step,
  video_memory,
)
from llava_mini_jax.cli import integers, launch
from llava_mini_jax.config import ConfigError, LlavaMiniConfig, require_choice
from llava_mini_jax.experiment import Experiment

_SIZES = flags.DEFINE_list(
  'sizes', ['tiny'], 'Sizes of `benchmark.train_step.SIZES`; of infer and sessions also presets.'
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 20, 'Of train, attention, infer and sessions: times that each is measured.', lower_bound=1
)
_KINDS = flags.DEFINE_list('kinds', list(asking.KINDS), 'Of infer: kinds of input.')
_REQUESTS = flags.DEFINE_list('requests', ['1', '4', '16', '64'], 'Of infer: how many requests come at once.')
_DTYPE = flags.DEFINE_string('dtype', '', 'Of infer and sessions: dtype of the model; empty = as it is.')
_TORCH = flags.DEFINE_bool('torch', True, 'Of infer: beside torch, which [convert] brings.')
_DEVICES = flags.DEFINE_integer('devices', 0, 'CPU devices to emulate; 0 = what there is.', lower_bound=0)
_CONFIG = config_flags.DEFINE_config_file('config', help_string='Of input: the experiment.')
_PRESET = flags.DEFINE_string('preset', 'tiny', 'Of video_memory: the model.')
_FRAMES = flags.DEFINE_list('frames', ['100', '1000', '10800'], 'Of video_memory and sessions: numbers of frames.')
_CHUNK = flags.DEFINE_integer(
  'chunk', 16, 'Of video_memory and sessions: frames in memory at a time; 0 = all.', lower_bound=0
)
_RUN = flags.DEFINE_bool('run', False, 'Of video_memory: encode such videos, instead of compiling alone.')
_LAYERS = flags.DEFINE_integer(
  'layers', 10, 'Of import_memory, export_memory: decoder layers, of width 4096.', lower_bound=1
)
_OUT = flags.DEFINE_string('out', 'benchmark', 'Of import_memory, export_memory: new directory for what is generated.')

_URL = flags.DEFINE_string('url', 'http://127.0.0.1:8000', 'Of serve: a server that runs; its key in LLAVA_MINI_KEY.')
_CLIENTS = flags.DEFINE_integer('clients', 8, 'Of serve: that ask at the same time.', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Of serve: how long they ask.', lower_bound=0.1)
_IMAGES = flags.DEFINE_integer('images', 64, 'Of serve: different images that are asked about.', lower_bound=1)
_TOKENS = flags.DEFINE_integer('tokens', 16, 'Of serve: most tokens of an answer.', lower_bound=1)


def _convert_memory(costs) -> str:
  out = Path(_OUT.value)
  return '\n'.join(convert_memory.describe(out, costs(out, _LAYERS.value)))


def _video_memory() -> str:
  config = dataclasses.replace(LlavaMiniConfig.preset(_PRESET.value), visual_chunk=_CHUNK.value)
  rows = list(video_memory.memory_by_frames(config, integers('frames', _FRAMES.value, positive=True), run=_RUN.value))
  return video_memory.describe(rows)


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _infer() -> str:
  counts = integers('requests', _REQUESTS.value, positive=True)
  options = dict(dtype=_DTYPE.value, rounds=_ROUNDS.value, torch=_TORCH.value, tell=_say)
  found = (asking.measure_all(size, _KINDS.value, counts, **options) for size in _SIZES.value)
  return asking.describe(list(itertools.chain.from_iterable(found)))


def _sessions() -> str:
  options, frames = dict(dtype=_DTYPE.value), integers('frames', _FRAMES.value, positive=True)
  gains = [g for size in _SIZES.value for g in sessions.gains(size, rounds=_ROUNDS.value, **options)]
  held = list(sessions.video_sessions(_SIZES.value[0], frames, chunk=_CHUNK.value, **options))
  return f'{sessions.describe_gains(gains)}\n\n{sessions.describe_video(held)}'


def _input() -> str:
  if _CONFIG.value is None:
    raise ConfigError('input: expected --config; found none')
  return input_pipeline.describe(input_pipeline.input_speed(Experiment.from_dict(_CONFIG.value)))


def _serve() -> str:
  from llava_mini_jax.benchmark import serve_load  # needs what [serve] installs

  counts = dict(clients=_CLIENTS.value, images=_IMAGES.value, tokens=_TOKENS.value)
  key = os.environ.get('LLAVA_MINI_KEY', '')
  return serve_load.describe(*serve_load.load(_URL.value, seconds=_SECONDS.value, key=key, **counts))


MEASURES = {
  'train': lambda: train_step.describe([train_step.compare(name, rounds=_ROUNDS.value) for name in _SIZES.value]),
  'attention': lambda: attention_speed.describe(list(attention_speed.speeds(_ROUNDS.value))),
  'scaling': lambda: '\n'.join(scaling.describe(scaling.scaling(name)) for name in _SIZES.value),
  'input': _input,
  'infer': _infer,
  'sessions': _sessions,
  'few_bits': lambda: few_bits.describe([kept for size in _SIZES.value for kept in few_bits.few_bits(size)]),
  'video_memory': _video_memory,
  'serve': _serve,
  'packing': lambda: packing_gain.describe(packing_gain.gains()),
  'import_memory': lambda: _convert_memory(convert_memory.import_costs),
  'export_memory': lambda: _convert_memory(convert_memory.export_costs),
}


def main(argv) -> None:
  measure = ' '.join(argv[1:])
  require_choice('measure', measure, tuple(MEASURES))
  if _DEVICES.value:
    jax.config.update('jax_num_cpu_devices', _DEVICES.value)
  print(MEASURES[measure]())


if __name__ == '__main__':
  launch(main, arguments=True, keep=False)

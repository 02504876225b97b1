"""Measurements that the documents quote.

python launch/benchmark.py train --sizes=tiny,medium
python launch/benchmark.py scaling --sizes=tiny --devices=8
python launch/benchmark.py input --config=configs/tiny_easy_vqa.py
python launch/benchmark.py video_memory --preset=tiny --frames=100,1000,10800 --chunk=16 --run
python launch/benchmark.py video_memory --preset=vicuna_7b --frames=100,1000,10800 --chunk=16
python launch/benchmark.py packing
python launch/benchmark.py serve --url=http://127.0.0.1:8000 --clients=8 --seconds=30
python launch/benchmark.py import_memory --layers=10 --out=benchmark
python launch/benchmark.py export_memory --layers=2 --out=benchmark
"""

import dataclasses
import os
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from llava_mini_jax.analyze import convert_memory, packing_gain, video_memory
from llava_mini_jax.benchmark import input_pipeline, scaling, train_step
from llava_mini_jax.cli import integers, launch
from llava_mini_jax.config import ConfigError, LlavaMiniConfig, require_choice
from llava_mini_jax.experiment import Experiment

_SIZES = flags.DEFINE_list('sizes', ['tiny'], 'Of train and scaling: sizes of `benchmark.train_step.SIZES`.')
_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Of train: times that each is measured, in turns.', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices', 0, 'CPU devices to emulate; 0 = what there is.', lower_bound=0)
_CONFIG = config_flags.DEFINE_config_file('config', help_string='Of input: the experiment.')
_PRESET = flags.DEFINE_string('preset', 'tiny', 'Of video_memory: the model.')
_FRAMES = flags.DEFINE_list('frames', ['100', '1000', '10800'], 'Of video_memory: numbers of frames.')
_CHUNK = flags.DEFINE_integer('chunk', 16, 'Of video_memory: frames in memory at a time; 0 = all.', lower_bound=0)
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
  'scaling': lambda: '\n'.join(scaling.describe(scaling.scaling(name)) for name in _SIZES.value),
  'input': _input,
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

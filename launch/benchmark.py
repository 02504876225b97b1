"""Measurements that the documents quote.

python launch/benchmark.py --measure=video_memory --preset=tiny --frames=100,1000,10800 --chunk=16 --run
python launch/benchmark.py --measure=video_memory --preset=vicuna_7b --frames=100,1000,10800 --chunk=16
python launch/benchmark.py --measure=packing
python launch/benchmark.py --measure=import_memory --layers=10 --out=benchmark
python launch/benchmark.py --measure=export_memory --layers=2 --out=benchmark
"""

import dataclasses
from pathlib import Path

from absl import flags

from llava_mini_jax.analyze import convert_memory, packing_gain, video_memory
from llava_mini_jax.cli import launch
from llava_mini_jax.config import LlavaMiniConfig

_KINDS = ['video_memory', 'packing', 'import_memory', 'export_memory']
_MEASURE = flags.DEFINE_enum('measure', None, _KINDS, 'What to measure.')
_PRESET = flags.DEFINE_string('preset', 'tiny', 'video_memory: model.')
_FRAMES = flags.DEFINE_list('frames', ['100', '1000', '10800'], 'video_memory: numbers of frames.')
_CHUNK = flags.DEFINE_integer('chunk', 16, 'video_memory: frames in memory at a time; 0 = all.', lower_bound=0)
_RUN = flags.DEFINE_bool('run', False, 'video_memory: encode such videos, instead of compiling alone.')
_LAYERS = flags.DEFINE_integer('layers', 10, 'import, export: decoder layers, of width 4096.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'benchmark', 'import, export: new directory for what is generated.')
flags.mark_flags_as_required(['measure'])


def main(_) -> None:
  if _MEASURE.value == 'packing':
    return print(packing_gain.describe(packing_gain.gains()))
  if _MEASURE.value != 'video_memory':
    out, of_import = Path(_OUT.value), _MEASURE.value == 'import_memory'
    costs = convert_memory.import_costs if of_import else convert_memory.export_costs
    for line in convert_memory.describe(out, costs(out, _LAYERS.value)):
      print(line, flush=True)
    return
  config = dataclasses.replace(LlavaMiniConfig.preset(_PRESET.value), visual_chunk=_CHUNK.value)
  rows = list(video_memory.memory_by_frames(config, [int(n) for n in _FRAMES.value], run=_RUN.value))
  print(video_memory.describe(rows))


if __name__ == '__main__':
  launch(main)

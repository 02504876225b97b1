"""Measurements that the documents quote.

python launch/benchmark.py --measure=video_memory --preset=tiny --frames=100,1000,10800 --chunk=16 --run
python launch/benchmark.py --measure=video_memory --preset=vicuna_7b --frames=100,1000,10800 --chunk=16
python launch/benchmark.py --measure=packing
"""

import dataclasses

from absl import flags

from llava_mini_jax.analyze import packing_gain, video_memory
from llava_mini_jax.cli import launch
from llava_mini_jax.config import LlavaMiniConfig

_MEASURE = flags.DEFINE_enum('measure', None, ['video_memory', 'packing'], 'What to measure.')
_PRESET = flags.DEFINE_string('preset', 'tiny', 'Model.')
_FRAMES = flags.DEFINE_list('frames', ['100', '1000', '10800'], 'Numbers of frames.')
_CHUNK = flags.DEFINE_integer('chunk', 16, 'Frames in memory at a time; 0 = all.', lower_bound=0)
_RUN = flags.DEFINE_bool('run', False, 'Encode such videos, instead of compiling alone.')
flags.mark_flags_as_required(['measure'])


def main(_) -> None:
  if _MEASURE.value == 'packing':
    return print(packing_gain.describe(packing_gain.gains()))
  config = dataclasses.replace(LlavaMiniConfig.preset(_PRESET.value), visual_chunk=_CHUNK.value)
  rows = list(video_memory.memory_by_frames(config, [int(n) for n in _FRAMES.value], run=_RUN.value))
  print(video_memory.describe(rows))


if __name__ == '__main__':
  launch(main)

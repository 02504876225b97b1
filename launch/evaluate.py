"""Asks a trained run every question of a split and scores the answers.

python launch/evaluate.py --workdir=runs/tiny --dataset=data/easy_vqa --split=test
Add --images=blank or --images=swapped to see how much the model looks, --set data.grid=2 --set model.dtype=float32 or
other fields of `infer.load.CHANGEABLE` to ask with other input settings than it was trained with.
"""

import functools
from pathlib import Path

from absl import flags

from llava_mini_jax.cli import define_process_flags, launch
from llava_mini_jax.distributed import is_writer
from llava_mini_jax.evaluate.run import IMAGES, describe, evaluate
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the training run.')
_DATASET = flags.DEFINE_string('dataset', None, 'Prepared dataset.')
_SPLIT = flags.DEFINE_string('split', 'test', 'Split of the dataset.')
_OUT = flags.DEFINE_string('out', None, 'Where answers and pictures go; default WORKDIR/evaluation.')
_IMAGES = flags.DEFINE_multi_enum('images', ['real'], IMAGES, 'Which images the questions get; may be repeated.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint step; default the newest.')
_BATCH = flags.DEFINE_integer('batch_size', 256, 'Questions per batch, over all devices.', lower_bound=1)
_MAX_NEW = flags.DEFINE_integer('max_new_tokens', 16, 'Longest answer.', lower_bound=1)
_LIMIT = flags.DEFINE_integer('limit', 0, 'Ask only the first so many questions; 0 = all.', lower_bound=0)
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value: ask with other input settings; may be repeated.')
define_process_flags()
flags.mark_flags_as_required(['workdir', 'dataset'])


def main(_) -> None:
  out = Path(_OUT.value or Path(_WORKDIR.value) / 'evaluation')
  run = load_run(Path(_WORKDIR.value), make_mesh(), _STEP.value, _SET.value)
  say = functools.partial(print, flush=True) if is_writer() else lambda text: None
  answerer = Answerer(run, max_new_tokens=_MAX_NEW.value)
  for images in _IMAGES.value:
    summary = evaluate(
      answerer,
      Path(_DATASET.value),
      _SPLIT.value,
      out,
      images=images,
      batch_size=_BATCH.value,
      limit=_LIMIT.value,
    )
    say(describe(summary))
  say(f'answers and contact sheet: {out}')


if __name__ == '__main__':
  launch(main, several=True)

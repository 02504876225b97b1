"""Trains and evaluates a grid of configs, and draws up its table and plots.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table6.py --workdir=runs/table6
python launch/sweep.py configs/ablations/table6.py --workdir=runs/table6 --estimate
python launch/sweep.py configs/ablations/table6.py --workdir=runs/table6 --report
It says first what each point will cost. Called again it keeps finished points, goes on with those that were begun, and
tries last what has failed; the table is of the points that were asked --limit questions.
One job per host: the same command on each, with one file system and --num_processes=1; each takes points that nobody
works on. One job over all hosts: as launch/train.py. --mesh and --batch_size, and any field with
--set model.dtype=bfloat16, are for all points.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from llava_mini_jax.analyze.flops import peak_flops
from llava_mini_jax.cli import define_process_flags, integers, launch
from llava_mini_jax.config import ConfigError
from llava_mini_jax.distributed import is_writer
from llava_mini_jax.experiment import read_change
from llava_mini_jax.sweep.grid import load_sweep
from llava_mini_jax.sweep.report import write_report
from llava_mini_jax.sweep.results import results
from llava_mini_jax.sweep.run import FAILED, describe_cost, run_sweep
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.preemption import Preemption

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the points, the table and the plots.')
_MESH = flags.DEFINE_list('mesh', None, 'data,fsdp,tensor of every point.')
_BATCH = flags.DEFINE_integer('batch_size', None, 'Rows per training batch of every point.', lower_bound=1)
_DATASET = flags.DEFINE_string('dataset', None, 'Prepared dataset of every point.')
_SEEDS = flags.DEFINE_list('seeds', [], 'Seeds instead of those of the file.')
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value for every point; may be repeated.')
_LIMIT = flags.DEFINE_integer('limit', 0, 'Ask each point only the first so many questions; 0 = all.', lower_bound=0)
_ASKED = flags.DEFINE_integer('evaluate_batch_size', 256, 'Questions per batch.', lower_bound=1)
_SHARE = flags.DEFINE_float('flops_share', 0.3, 'Share of the peak FLOP/s that the estimate of hours assumes.')
_ESTIMATE = flags.DEFINE_bool('estimate', False, 'Say what it will cost, and run nothing.')
_REPORT = flags.DEFINE_bool('report', False, 'Write table and plots of what is finished, and run nothing.')
define_process_flags()
flags.mark_flag_as_required('workdir')


def _changes() -> dict:
  found = dict(read_change(text, '--set') for text in _SET.value)
  given = {
    'train.mesh': _MESH.value and integers('mesh', _MESH.value),
    'train.batch_size': _BATCH.value,
    'data.dataset': _DATASET.value,
  }
  return found | {path: value for path, value in given.items() if value is not None}


def main(words: Sequence[str]) -> None:
  if len(words) != 2:
    raise ConfigError(f'sweep: expected one sweep file; found {" ".join(words[1:]) or "none"}')
  sweep, workdir = load_sweep(words[1], _changes(), integers('seeds', _SEEDS.value)), Path(_WORKDIR.value)
  say = (lambda text: print(text, flush=True)) if is_writer() else (lambda text: None)
  asked, failed = dict(limit=_LIMIT.value), []
  if not _REPORT.value:
    say(describe_cost(sweep, workdir, peak_flops(sweep.base.model.dtype), _SHARE.value, **asked))
  if not (_REPORT.value or _ESTIMATE.value):
    with (
      Preemption() as preemption,
      contextlib.closing(
        run_sweep(sweep, workdir, **asked, batch_size=_ASKED.value, preemption=preemption, report=say)
      ) as runs,
    ):
      for point, seed, outcome in runs:
        say(line := f'{point.name}, seed {seed}: {outcome}')
        failed += [line] * outcome.startswith(FAILED)
  if not _ESTIMATE.value and is_writer():
    found = results(sweep, workdir, **asked)
    say('\n'.join(f'written: {path}' for path in write_report(sweep, found, workdir)) or f'no results with {asked}')
  if failed:
    raise TrainingError('\n  '.join([f'sweep: {len(failed)} run(s) failed:', *failed]))


if __name__ == '__main__':
  launch(main, arguments=True, several=True)

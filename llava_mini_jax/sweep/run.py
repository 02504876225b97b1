"""Runs the points of a sweep: each is trained and evaluated in a directory of its own, WORKDIR/POINT/seedN.

A finished point has `result.json` and is kept; one that was begun goes on from its last checkpoint. Whoever works on a
point holds the lock of its directory, so the same command on several hosts with one file system shares the work out.
A point whose training fails leaves `failed.txt`, and the others go on; later calls try it again, after all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.sizes import SIZES_NAME
from llava_mini_jax.distributed import as_first, first_fault, is_writer
from llava_mini_jax.evaluate.run import evaluate
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.sweep.grid import Cost, Point, Sweep, cost
from llava_mini_jax.sweep.results import (
  FAILURE,
  MAX_NEW_TOKENS,
  Asked,
  check_begun,
  dataset_of,
  directory_of,
  identity,
  read_result,
  write_result,
)
from llava_mini_jax.train import goodput
from llava_mini_jax.train.errors import CheckpointError, TrainingError
from llava_mini_jax.train.lock import only_trainer
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.preemption import Preemption

KEPT, BUSY, DONE, FAILED = 'kept', 'another process works on it', 'done', 'failed: '


def run_sweep(
  sweep: Sweep,
  workdir: Path,
  *,
  limit: int = 0,
  batch_size: int = 256,
  max_new_tokens: int = MAX_NEW_TOKENS,
  preemption: Preemption | None = None,
  report: Callable[[str], None] = print,
) -> Iterator[tuple[Point, int, str]]:
  """Trains and evaluates what is missing. Every process of a job calls it.

  Args:
    limit: questions asked of each point; 0 = all of the split. batch_size: of questions.
  Yields:
    Point, seed and KEPT, BUSY, DONE, or FAILED and in one line why training ended (TrainingError), when it is so.
  Raises:
    ConfigError: a result or a run of another config or other data lies in the directory of a point. Preempted and the
    rest as `train.loop.train`; the sweep ends there, and the same command goes on.
  """
  asked = Asked(sweep.split, limit, max_new_tokens)
  for point, seed in _failed_last(sweep, workdir):
    experiment, directory = sweep.experiment(point, seed), directory_of(workdir, point, seed)
    directory.mkdir(parents=True, exist_ok=True)
    if _is_finished(directory, experiment, asked):
      yield point, seed, KEPT
      continue
    with contextlib.ExitStack() as held:
      try:
        held.enter_context(only_trainer(directory))
      except TrainingError:
        yield point, seed, BUSY
        continue
      if _is_finished(directory, experiment, asked):  # somebody finished it meanwhile
        yield point, seed, KEPT
        continue
      report(f'{point.name}, seed {seed}:')
      begun = identity(experiment)
      check_begun(directory, begun)
      try:
        train(experiment, directory / 'run', preemption=preemption)
      except TrainingError as error:
        if is_writer():
          (directory / FAILURE).write_text(f'{error}\n')
        yield point, seed, FAILED + ' '.join(str(error).split())
        continue
      found = _evaluated(experiment, directory, asked, batch_size)
      if is_writer():
        found = dict(point=point.name, seed=seed, **found, seconds=_seconds(directory))
        write_result(directory, experiment, asked, found, begun)
      yield point, seed, DONE


def _failed_last(sweep: Sweep, workdir: Path) -> Iterator[tuple[Point, int]]:
  """The runs in their order, those that have failed before after all others; the same on all processes."""
  runs = list(sweep.runs())
  failed = as_first([(directory_of(workdir, *run) / FAILURE).is_file() for run in runs])
  return (run for again in (0, 1) for run, before in zip(runs, failed, strict=True) if before == again)


def _is_finished(directory: Path, experiment: Experiment, asked: Asked) -> bool:
  """What the first process finds, on all: another may see a file a moment later. Raises ConfigError on all alike."""
  finished, fault = False, ''
  if is_writer():
    try:
      finished = read_result(directory, experiment, asked) is not None
    except (ConfigError, DataError, CheckpointError) as error:
      fault = str(error)
  if fault := first_fault(fault):
    raise ConfigError(fault)
  return bool(as_first([finished])[0])


def _evaluated(experiment: Experiment, directory: Path, asked: Asked, batch_size: int) -> dict[str, Any]:
  """Accuracy with real images and with blank ones, by category; and what the point costs."""
  run = load_run(directory / 'run', make_mesh(experiment.train.mesh))
  answerer, shares = Answerer(run, max_new_tokens=asked.max_new_tokens), {}
  options = dict(batch_size=batch_size, limit=asked.limit)
  for images in ('real', 'blank'):
    out = directory / 'evaluation'
    summary = evaluate(answerer, dataset_of(experiment), asked.split, out, images=images, **options)
    categories = {name: part['accuracy'] for name, part in summary['by_category'].items()}
    shares[images] = dict(accuracy=summary['accuracy'], count=summary['count'], by_category=categories)
  layers = experiment.model.prefusion.num_layers
  return dict(**shares, layers=layers, cost=dataclasses.asdict(_cost(experiment, directory)))


def _cost(experiment: Experiment, directory: Path) -> Cost:
  return cost(experiment, kept=directory / 'run' / SIZES_NAME)


def _seconds(directory: Path) -> float:
  """That training took in all lives of the run."""
  found = goodput.totals(goodput.read_ledger(directory / 'run' / goodput.LEDGER_NAME))
  return round(sum(found.values()) - found['down'], 1)


def describe_cost(
  sweep: Sweep, workdir: Path, peak: float, share: float, *, limit: int = 0, max_new_tokens: int = MAX_NEW_TOKENS
) -> str:
  """What each point will cost; hours at `share` of `peak` FLOP/s, those of finished runs left out of the sum.

  Where rows are packed or grouped, the sizes of the records are measured, and kept where the first run will look.

  Raises:
    DataError, ConfigError, CheckpointError: as `cost` and `read_result`.
  """
  lines, total = ['point                 layers  tokens   FLOPs/answer   steps  FLOPs/run   hours/run  seeds left'], 0.0
  asked = Asked(sweep.split, limit, max_new_tokens)
  for point in sweep.points:
    runs = [(directory_of(workdir, point, seed), sweep.experiment(point, seed)) for seed in sweep.seeds]
    one = _cost(runs[0][1], runs[0][0])
    left = sum(read_result(directory, experiment, asked) is None for directory, experiment in runs)
    hours = one.training_flops / (share * peak) / 3600
    total += left * hours
    lines.append(
      f'{point.name:22}{runs[0][1].model.prefusion.num_layers:6}{one.tokens:8}{one.prompt_flops:15.3g}'
      f'{one.steps:8,}{one.training_flops:11.3g}{hours:12.4g}{left:12}'
    )
  lines.append(f'about {total:.3g} hours at {share:.0%} of {peak:.3g} FLOP/s, compilation and evaluation apart')
  return '\n'.join(lines)

"""Runs the points of a sweep: each is trained and evaluated in a directory of its own, WORKDIR/POINT/seedN.

A finished point has `result.json` and is kept; one that was begun goes on from its last checkpoint. Whoever works on a
point holds the lock of its directory, so the same command on several hosts with one file system shares the work out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax.config import ConfigError
from llava_mini_jax.distributed import is_writer
from llava_mini_jax.evaluate.run import evaluate
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.sweep.grid import Point, Sweep, cost
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.lock import only_trainer
from llava_mini_jax.train.loop import differences, train
from llava_mini_jax.train.preemption import Preemption

RESULT = 'result.json'
KEPT, BUSY, DONE = 'kept', 'another process works on it', 'done'


def directory_of(workdir: Path, point: Point, seed: int) -> Path:
  return workdir / point.name / f'seed{seed}'


def run_sweep(
  sweep: Sweep,
  workdir: Path,
  *,
  limit: int = 0,
  batch_size: int = 256,
  max_new_tokens: int = 8,
  preemption: Preemption | None = None,
  report: Callable[[str], None] = print,
) -> Iterator[tuple[Point, int, str]]:
  """Trains and evaluates what is missing.

  Args:
    limit: questions asked of each point; 0 = all of the split. batch_size: of questions.
  Yields:
    Point, seed and KEPT, BUSY or DONE, when it is so.
  Raises:
    ConfigError: a result or a run of another config lies in the directory of a point. Preempted, TrainingError and the
    rest as `train.loop.train`; the sweep ends there, and the same command goes on.
  """
  for point, seed in sweep.runs():
    directory, experiment = directory_of(workdir, point, seed), sweep.experiment(point, seed)
    directory.mkdir(parents=True, exist_ok=True)
    if _is_finished(directory, experiment, limit):
      yield point, seed, KEPT
      continue
    with contextlib.ExitStack() as held:
      try:
        held.enter_context(only_trainer(directory))
      except TrainingError:
        yield point, seed, BUSY
        continue
      if not _is_finished(directory, experiment, limit):  # nobody finished it meanwhile
        report(f'{point.name}, seed {seed}:')
        began = time.perf_counter()
        train(experiment, directory / 'run', preemption=preemption)
        found = _evaluated(experiment, directory, sweep.split, limit, batch_size, max_new_tokens)
        found |= dict(seconds=round(time.perf_counter() - began, 1))
        if is_writer():
          _write(directory, dict(point=point.name, seed=seed, limit=limit, **found, config=experiment.to_dict()))
      yield point, seed, DONE


def _evaluated(
  experiment: Experiment, directory: Path, split: str, limit: int, batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
  """Accuracy with real images and with blank ones, by category; and what the point costs."""
  answerer = Answerer(load_run(directory / 'run', make_mesh(experiment.train.mesh)), max_new_tokens=max_new_tokens)
  data = Path(experiment.data.dataset or experiment.data.mixture[0][0])
  shares = {}
  for images in ('real', 'blank'):
    summary = evaluate(
      answerer, data, split, directory / 'evaluation', images=images, batch_size=batch_size, limit=limit
    )
    shares[images] = dict(accuracy=summary['accuracy'], count=summary['count'])
    shares[images] |= {name: part['accuracy'] for name, part in summary['by_category'].items()}
  return dict(**shares, layers=experiment.model.prefusion.num_layers, cost=dataclasses.asdict(cost(experiment)))


def read_result(directory: Path, experiment: Experiment) -> dict[str, Any] | None:
  """The result of a point, or None. Raises ConfigError if it is that of another config: the message says what differs.

  What may differ is what a run may be resumed with: mesh, micro-steps, where the dataset lies.
  """
  file = directory / RESULT
  if not file.is_file():
    return None
  found = json.loads(file.read_text())
  stored = json.loads(json.dumps(Experiment.from_dict(found['config']).to_dict()))
  now = json.loads(json.dumps(experiment.to_dict()))
  if changes := differences(dict(config=stored), dict(config=now)):
    lines = '\n  '.join(f'{name}: {what}' for name, what in changes.items())
    raise ConfigError(f'{file}: its config differs from this one; use another --workdir:\n  {lines}')
  return found


def _is_finished(directory: Path, experiment: Experiment, limit: int) -> bool:
  found = read_result(directory, experiment)
  return found is not None and found['limit'] == limit


def _write(directory: Path, result: dict[str, Any]) -> None:
  temporary = directory / f'{RESULT}.part'
  temporary.write_text(json.dumps(result, indent=1) + '\n')
  os.replace(temporary, directory / RESULT)


def results(sweep: Sweep, workdir: Path) -> list[dict[str, Any]]:
  """Of all runs that are finished, in the order of the sweep."""
  found = (
    read_result(directory_of(workdir, point, seed), sweep.experiment(point, seed)) for point, seed in sweep.runs()
  )
  return [result for result in found if result is not None]


def describe_cost(sweep: Sweep, workdir: Path, peak: float, share: float) -> str:
  """What each point will cost; hours at `share` of `peak` FLOP/s, those of finished runs left out of the sum."""
  lines, total = ['point                 layers  tokens   FLOPs/answer   steps  FLOPs/run   hours/run  seeds left'], 0.0
  for point in sweep.points:
    experiment = sweep.experiment(point, sweep.seeds[0])
    one = cost(experiment)
    left = sum(
      read_result(directory_of(workdir, point, seed), sweep.experiment(point, seed)) is None for seed in sweep.seeds
    )
    hours = one.training_flops / (share * peak) / 3600
    total += left * hours
    lines.append(
      f'{point.name:22}{experiment.model.prefusion.num_layers:6}{one.tokens:8}{one.prompt_flops:15.3g}'
      f'{one.steps:8,}{one.training_flops:11.3g}{hours:12.4g}{left:12}'
    )
  lines.append(f'about {total:.3g} hours at {share:.0%} of {peak:.3g} FLOP/s, compilation and evaluation apart')
  return '\n'.join(lines)

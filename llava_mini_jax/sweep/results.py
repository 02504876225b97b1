"""What a point of a sweep leaves in its directory, WORKDIR/POINT/seedN: `result.json`, or `failed.txt`.

A result holds the config, the fingerprints of what its paths lead to, and what was asked. One of another config or of
other data is refused; one of other questions counts as none, so that no table mixes them. A result from before there
were fingerprints in it is compared by its config and its number of questions alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.run_weights import CHECKPOINTS, weights_fingerprint
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.records import open_split
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sweep.grid import Point, Sweep
from llava_mini_jax.train.errors import DamagedError
from llava_mini_jax.train.loop import differences
from llava_mini_jax.train.stored import StoredCheckpoints

RESULT, FAILURE = 'result.json', 'failed.txt'
MAX_NEW_TOKENS = 8


def directory_of(workdir: Path, point: Point, seed: int) -> Path:
  return workdir / point.name / f'seed{seed}'


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a point is asked.

  Attributes:
    limit: the first so many questions; 0 = all. max_new_tokens: of an answer.
  """

  split: str
  limit: int = 0
  max_new_tokens: int = MAX_NEW_TOKENS

  def of(self, experiment: Experiment) -> dict[str, Any]:
    """As it is stored. Raises DataError if the dataset or its split is missing."""
    return dict(dataclasses.asdict(self), questions=open_split(dataset_of(experiment), self.split).fingerprint)


def dataset_of(experiment: Experiment) -> Path:
  """The one whose questions are asked: of a mixture the first."""
  return Path(experiment.data.dataset or experiment.data.mixture[0][0])


def identity(experiment: Experiment) -> dict[str, Any]:
  """What may not differ: the config, what the trainer compares beside it, and the weights that it starts from."""
  train = experiment.train
  inputs = load_inputs(experiment.data, experiment.model, seed=train.seed, start=train.init_from)
  prints = inputs.fingerprints()
  if train.init_from:
    prints['start'] = weights_fingerprint(train.init_from)
  return dict(fingerprints=prints, config=_plain(experiment))


def _plain(experiment: Experiment) -> dict[str, Any]:
  return json.loads(json.dumps(experiment.to_dict()))


def write_result(
  directory: Path, experiment: Experiment, asked: Asked, found: dict[str, Any], of: dict[str, Any]
) -> None:
  """Whole or not at all; a failure of before is forgotten. of: its `identity` when it began."""
  temporary = directory / f'{RESULT}.part'
  temporary.write_text(json.dumps(dict(found, **asked.of(experiment), **of), indent=1) + '\n')
  os.replace(temporary, directory / RESULT)
  (directory / FAILURE).unlink(missing_ok=True)


def check_begun(directory: Path, now: dict[str, Any]) -> None:
  """Raises ConfigError if the run that lies there, unfinished, began with other weights than its start holds now.

  What else may differ the trainer finds. Every process calls it, with the `identity` of the point.
  """
  stored = StoredCheckpoints(directory / 'run' / CHECKPOINTS)
  for step in reversed(stored.steps):
    try:
      began = stored.meta(step).get('start')
    except DamagedError:  # passed over, as the trainer does
      continue
    if began != (start := now['fingerprints'].get('start')):
      changed = f'start: was {began!r}, is {start!r}'
      raise ConfigError(f'{directory}: its run differs from this one; use another --workdir:\n  {changed}')
    return


def read_result(directory: Path, experiment: Experiment, asked: Asked) -> dict[str, Any] | None:
  """The result of a point, or None if there is none for these questions.

  What may differ is what a run may be resumed with: mesh, micro-steps, where the dataset lies.

  Raises:
    ConfigError: it is that of another config or of other data; the message says what differs.
    DataError, CheckpointError: the dataset that it is to be compared with, or the run that it starts from, is missing
      or damaged.
  """
  file = directory / RESULT
  if not file.is_file():
    return None
  found = json.loads(file.read_text())
  now = identity(experiment)
  stored = dict(
    fingerprints=found.get('fingerprints', now['fingerprints']), config=_plain(Experiment.from_dict(found['config']))
  )
  if changes := differences(stored, now):
    lines = '\n  '.join(f'{name}: {what}' for name, what in changes.items())
    raise ConfigError(f'{file}: its run differs from this one; use another --workdir:\n  {lines}')
  return found if all(found.get(name, value) == value for name, value in asked.of(experiment).items()) else None


def results(sweep: Sweep, workdir: Path, *, limit: int = 0, max_new_tokens: int = MAX_NEW_TOKENS) -> list[dict]:
  """Of all runs that have answered these questions, in the order of the sweep. Raises as `read_result`."""
  asked = Asked(sweep.split, limit, max_new_tokens)
  found = (
    read_result(directory_of(workdir, point, seed), sweep.experiment(point, seed), asked)
    for point, seed in sweep.runs()
  )
  return [result for result in found if result is not None]

"""The state that a run begins with: random, or with the parameters of another run or of an imported checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import jax

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.run_weights import starting_parameters
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.step import State, Trainer
from llava_mini_jax.train.tree import flatten, unflatten

_LISTED = 5


def check_start(experiment: Experiment, trainer: Trainer) -> None:
  """Raises ConfigError if parameters would be frozen as they are at random."""
  frozen, config = flatten(trainer.abstract['frozen']), experiment.train
  if frozen and not config.init_from:
    raise ConfigError(
      f'train.groups freeze {len(frozen)} parameter(s), {next(iter(frozen))} among them, which would stay random: '
      'set train.init_from'
    )


def initial_state(experiment: Experiment, trainer: Trainer) -> State:
  """Step 0; call under `use_mesh(trainer.mesh)`.

  Raises:
    ConfigError: `init_from` lacks a parameter that `init_fresh` does not name. CheckpointError, DataError: as
      `run_weights.starting_parameters`.
  """
  config = experiment.train
  state = trainer.init(jax.random.key(config.seed))
  if not config.init_from:
    return state
  loaded = starting_parameters(Path(config.init_from), experiment.model, trainer.mesh)
  parts = {part: flatten(state[part]) for part in ('params', 'frozen')}
  absent = [path for part in parts.values() for path in part if path not in loaded]
  absent = [path for path in absent if not any(re.fullmatch(pattern, path) for pattern in config.init_fresh)]
  if absent:
    listed = ', '.join(absent[:_LISTED]) + (f' and {len(absent) - _LISTED} more' if len(absent) > _LISTED else '')
    raise ConfigError(f'{config.init_from} does not have {listed}; name in train.init_fresh what shall start anew')
  for part in parts.values():
    part |= {path: loaded[path] for path in part if path in loaded}
  return state | {name: unflatten(part) for name, part in parts.items()}

"""The trainer of a run, and the state that it begins with: random, or parameters of another run or an imported one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.run_parameters import open_base, starting_parameters
from llava_mini_jax.convert.run_weights import newest_step, read_experiment, weights_fingerprint
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import replicated
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.fingerprint import fingerprints
from llava_mini_jax.train.guard import Guard
from llava_mini_jax.train.lora import PREFIX, kept, lora_of
from llava_mini_jax.train.optimizer import schedule
from llava_mini_jax.train.step import State, Trainer, make_trainer, saved_part
from llava_mini_jax.train.tree import flatten, sharded_model, unflatten

_LISTED = 5


def trainer_for(experiment: Experiment, mesh: Mesh, total_steps: int) -> Trainer:
  """The trainer of a run of so many steps. Raises as `step.make_trainer`."""
  config = experiment.train
  return make_trainer(
    experiment.model,
    mesh,
    groups=config.groups,
    factor=schedule(total_steps, config.warmup_ratio),
    lora=lora_of(config),
    accumulate=config.accumulate,
    param_dtype=config.param_dtype,
    guard=Guard(config.spike_sigmas, config.spike_window),
    beta1=config.beta1,
    beta2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    max_grad_norm=config.max_grad_norm,
  )


def check_start(experiment: Experiment, trainer: Trainer) -> None:
  """Raises ConfigError if parameters would be frozen as they are at random, or adapters added to adapters."""
  frozen, config = flatten(trainer.abstract['frozen']), experiment.train
  if frozen and not config.init_from:
    raise ConfigError(
      f'train.groups freeze {len(frozen)} parameter(s), {next(iter(frozen))} among them, which would stay random: '
      'set train.init_from'
    )

  if trainer.lora and read_experiment(config.init_from).train.lora_rank:
    raise ConfigError(
      f'train.init_from: {config.init_from} has LoRA adapters itself; export it with --merge_lora and import that'
    )


def initial_state(experiment: Experiment, trainer: Trainer) -> tuple[State, dict[str, Any]]:
  """Step 0, and what its checkpoints have to say of it; call under `use_mesh(trainer.mesh)`.

  Returns:
    The state; and of a run that starts from another {'start': the fingerprint of its weights}, with adapters also
    {'base': {run, step, fingerprints}}: where what is frozen is stored, and what it was.
  Raises:
    ConfigError: `init_from` lacks a parameter that `init_fresh` does not name, or that adapters need. CheckpointError,
      DataError: as `run_parameters.starting_parameters`.
  """
  config, key = experiment.train, jax.random.key(experiment.train.seed)
  if not config.init_from:
    return trainer.init(key), {}
  step = newest_step(config.init_from)
  parts = {part: flatten(trainer.abstract[part]) for part in ('params', 'frozen')}
  prints = {}

  def each(path: str, array: jax.Array) -> Any:
    if path in parts['frozen']:
      prints.update(fingerprints({path: array}))
    return kept(path, array, trainer.lora)

  loaded = starting_parameters(
    Path(config.init_from),
    experiment.model,
    trainer.mesh,
    step,
    config.param_dtype,
    each=each if trainer.lora else None,
  )
  fresh = [re.compile(pattern) for pattern in config.init_fresh] + [re.compile(f'{PREFIX}.*')]
  absent = [path for part in parts.values() for path in part if path not in loaded]
  absent = [path for path in absent if not any(pattern.fullmatch(path) for pattern in fresh)]
  if absent:
    listed = ', '.join(absent[:_LISTED]) + (f' and {len(absent) - _LISTED} more' if len(absent) > _LISTED else '')
    raise ConfigError(f'{config.init_from} does not have {listed}; name in train.init_fresh what shall start anew')
  start = dict(start=weights_fingerprint(config.init_from, step))
  if not trainer.lora:
    return trainer.init(key, loaded), start
  if lost := [path for path in parts['frozen'] if path not in loaded]:
    raise ConfigError(f'train.groups freeze {lost[0]}, which starts anew; a checkpoint of adapters would not hold it')
  return trainer.init(key, loaded), start | dict(base=dict(run=config.init_from, step=step, fingerprints=prints))


def resumed_state(
  experiment: Experiment, trainer: Trainer, checkpoints: Checkpoints, step: int
) -> tuple[State, dict[str, Any]]:
  """The state of a checkpoint, and its meta; what adapters were trained on comes from `train.init_from`.

  A checkpoint from before there was a guard, or with another window, has its counters begin anew.

  Raises:
    CheckpointError: as `Checkpoints.restore`; a base that is gone, or has other numbers than it had.
  """
  wanted = {name: part for name, part in saved_part(trainer, trainer.abstract).items() if name != 'guard'}
  guard = Guard.stored_with(checkpoints.meta(step)['config']['train'])
  counters = dict(guard=guard.abstract(replicated(trainer.mesh))) if guard else {}
  state, meta = checkpoints.restore(wanted | counters, step)
  fresh = jax.device_put(trainer.guard.initial(), trainer.shardings['guard'])
  state['guard'] = trainer.guard.adopt(state.get('guard', {}), fresh)
  if trainer.lora:
    dtype = experiment.train.param_dtype
    base = open_base(experiment.model, meta['base'] | dict(run=experiment.train.init_from), dtype)
    _, leaves = sharded_model(experiment.model, trainer.mesh, jnp.dtype(dtype))
    found = {}
    for path in flatten(trainer.abstract['frozen']):  # one by one: what is kept in fewer bits is never there whole
      found[path] = kept(path, base.load({path: leaves[path]})[path], trainer.lora)
    state['frozen'] = unflatten(found)
  return state, meta

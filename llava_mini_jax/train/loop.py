"""The training run: everything that touches disk, clock or screen, in one straight line."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.run_start import describe_start
from llava_mini_jax.convert.run_weights import is_imported
from llava_mini_jax.data.inputs import Inputs, Order, load_inputs
from llava_mini_jax.data.mixture import Mixture
from llava_mini_jax.data.packing import Packed
from llava_mini_jax.data.pipeline import DeviceBatches, device_batches
from llava_mini_jax.data.sizes import SIZES_NAME
from llava_mini_jax.data.tokenizer import save_tokenizer
from llava_mini_jax.distributed import is_writer
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import batch_sharding, check_batch, make_mesh, process_rows, use_mesh
from llava_mini_jax.train import goodput
from llava_mini_jax.train.bad_samples import BadSamples
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import Preempted
from llava_mini_jax.train.fallback import newest_whole
from llava_mini_jax.train.features import check_experiment, check_tower
from llava_mini_jax.train.goodput import Goodput
from llava_mini_jax.train.guard import Skips
from llava_mini_jax.train.lock import only_trainer
from llava_mini_jax.train.metrics import LOG_NAME, MetricsLog
from llava_mini_jax.train.plots import training_curves
from llava_mini_jax.train.preemption import Preemption
from llava_mini_jax.train.profile import StepProfile
from llava_mini_jax.train.run_log import run_log
from llava_mini_jax.train.start import check_start, initial_state, resumed_state, trainer_for
from llava_mini_jax.train.step import State, Trainer, saved_part
from llava_mini_jax.train.throughput import Throughput
from llava_mini_jax.train.tree import flatten

logger = logging.getLogger(__name__)


def train(
  experiment: Experiment,
  workdir: Path,
  *,
  profile_steps: range | None = None,
  allowed: Sequence[str] = (),
  fallback: bool = True,
  preemption: Preemption | None = None,
  began: float | None = None,
) -> dict[str, float]:
  """Trains to the end, or on from the last checkpoint in `workdir`. Every process of a run calls it.

  Leaves in `workdir`: config.json, tokenizer/, checkpoints/, metrics.jsonl, goodput.jsonl, tensorboard/, curves.png,
  logs/ (a file per process), lock, with `profile_steps` profile/, and sizes.npz if samples are packed or grouped.

  Args:
    allowed: what may differ from the run that is resumed, as `differences` names it.
    fallback: whether it may go on from an older checkpoint if the newest is damaged.
    preemption: who hears SIGTERM, at every step of a single process, and of several at those that are logged or saved.
    began: `time.perf_counter()` that the time of the run counts from; None = now.
  Returns:
    The last step's metrics.
  Raises:
    ConfigError, MeshError, DataError, CheckpointError: before anything is compiled, where that is possible.
    ConfigError also if the run in `workdir` is another one: the message lists what differs.
    TrainingError: `train.max_skipped` steps skipped in a row; another trainer has the workdir.
    Preempted: `preemption` heard that the run is to end; the state is saved.
    DataError: E_BAD_SAMPLES if more are masked than `data.bad_sample_share`.
  """
  config, began = experiment.train, time.perf_counter() if began is None else began

  # -- inputs --------------------------------------------------------------------------------------------------------
  if re.match(r'\w+:/', str(workdir)):
    raise ConfigError(f'workdir: expected a directory of a mounted file system; found the address {workdir}')
  if is_imported(workdir):
    raise ConfigError(f'{workdir}: an imported run; name it in train.init_from and use another --workdir')
  mesh = make_mesh(config.mesh, slices=config.slices)
  check_batch(config.batch_size, mesh, config.accumulate)
  shard_index, shard_count = process_rows(mesh)
  inputs = load_inputs(experiment.data, experiment.model, seed=config.seed, start=config.init_from)
  order = inputs.order(batch_size=config.batch_size, seed=config.seed, kept=workdir / SIZES_NAME)
  total = experiment.total_steps(inputs.rows(order, config.epochs))
  batches = device_batches(
    inputs.iterator(
      order, batch_size=config.batch_size, seed=config.seed, shard_index=shard_index, shard_count=shard_count
    ),
    batch_sharding(mesh),
  )

  # -- state ---------------------------------------------------------------------------------------------------------
  trainer = trainer_for(experiment, mesh, total)
  check_start(experiment, trainer)
  check_experiment(experiment, trainer)
  workdir.mkdir(parents=True, exist_ok=True)
  options = dict(keep=config.keep, verify=config.verify_saves, failed_saves=config.failed_saves)
  with (
    only_trainer(workdir),
    use_mesh(mesh),
    Checkpoints(workdir / 'checkpoints', **options) as checkpoints,
    contextlib.closing(batches),
    contextlib.closing(Goodput(began)) as clock,
  ):
    meta = _meta(experiment, inputs, total)
    with clock.of('restore'):
      state, start, kept, accepted = _start(experiment, trainer, checkpoints, batches, meta, allowed, fallback)
    meta |= kept
    samples = inputs.samples(order, total * config.batch_size)
    bad = BadSamples(experiment.data.bad_sample_share, samples, meta.get('bad_samples', 0))
    check_tower(inputs.features, experiment, trainer, state['frozen'])
    profile = StepProfile(workdir, profile_steps, start=start, total=total)
    with run_log(workdir) as log, contextlib.closing(profile):  # a run that is refused leaves the log as it was
      described = '\n'.join([*accepted, _describe(experiment, trainer, inputs, order, start, total)])
      for note in checkpoints.notes:
        log.warning(note)
      log.info(described)
      if is_writer():
        (workdir / 'config.json').write_text(json.dumps(experiment.to_dict(), indent=2) + '\n')
        save_tokenizer(inputs.tokenizer, workdir / 'tokenizer')
        print(described, flush=True)
        clock.open(workdir, start)
      steps = range(start + 1, total + 1)
      clock.switch('other')
      last = _steps(
        experiment, workdir, trainer, state, batches, checkpoints, meta, bad, profile, clock, steps, preemption
      )
      if is_writer():
        training_curves(workdir / LOG_NAME, workdir / 'curves.png')
        spent = goodput.describe(clock.write(total))
        log.info(spent)
        print(spent, flush=True)
      log.info('finished')
  return last


def _steps(
  experiment: Experiment,
  workdir: Path,
  trainer: Trainer,
  state: State,
  batches: DeviceBatches,
  checkpoints: Checkpoints,
  meta: dict[str, Any],
  bad: BadSamples,
  profile: StepProfile,
  clock: Goodput,
  steps: range,
  preemption: Preemption | None,
) -> dict[str, float]:
  """From a state to the end of the run; returns the last step's metrics. The state is donated."""
  config, total = experiment.train, steps.stop - 1
  throughput = Throughput(experiment.model, trainer)
  skips = Skips(config.max_skipped, before=int(state['guard']['consecutive']))
  pending, last = [], {}
  log = MetricsLog(workdir, start_step=steps.start - 1, total_steps=total, silent=not is_writer())
  with log, clock.of('step'):
    for step in steps:
      with profile.step(step):
        with clock.of('data'):
          batch = next(batches)
        throughput.count(batch)
        state, metrics = trainer.step(state, batch)
      profile.done(step, metrics)
      pending.append((step, metrics))
      save = step % config.save_every == 0 or step == total
      meeting = save or step % config.log_every == 0 or jax.process_count() == 1
      stop = preemption is not None and meeting and preemption.reached()
      save |= stop
      # Metrics go to disk before the checkpoint that covers them, so a kill in between loses no line of the curve.
      if save or step % config.log_every == 0:
        for at, values in jax.device_get(pending):
          last = {name: float(value) for name, value in values.items()}
          bad.count(int(at), last)
          log.write(int(at), last | (throughput.since_last() if at == step else {}))
          skips.count(int(at), last)
        waited = clock.seconds('data')
        log.goodput(step, goodput.shares(clock.write(step)))
        log.flush()
        logger.info('step %d: loss %.6g; waited %.3f s for data since the last line', step, last['loss'], waited)
        pending = []
      if save:
        kept = dict(data=batches.get_state(), bad_samples=bad.found)
        with clock.of('save'):
          put = checkpoints.save_last if step == total or stop else checkpoints.save
          put(step, saved_part(trainer, state), meta | kept, hurry=stop)
      if stop and step < total:
        clock.write(step)
        raise Preempted(f'step {step} of {total} is saved in {checkpoints.directory}')
  return last


def _compare(
  experiment: Experiment, checkpoints: Checkpoints, step: int | None, meta: dict[str, Any], allowed: Sequence[str]
) -> list[str]:
  """Raises ConfigError unless the run that is resumed is this one; what differs and is allowed to, in words."""
  changed = {}
  if step is not None:
    stored = checkpoints.meta(step)
    # Fields that there were none of when it was saved have the value that changes nothing.
    stored['config'] = json.loads(json.dumps(Experiment.from_dict(stored['config']).to_dict()))
    if experiment.train.lora_rank:  # its base may have moved: fingerprints say whether it is the same
      stored['config']['train']['init_from'] = experiment.train.init_from
    changed = differences({name: stored.get(name) for name in meta}, meta)
  # One that no longer differs is as good, so that the same command starts the run again.
  known = changed.keys() | {name.replace('/', '.') for name in flatten(meta)}
  if unknown := [name for name in allowed if name not in known]:
    (close,) = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)
    raise ConfigError(f'allow_config_change: expected a name as {close!r}; found {unknown[0]!r}')
  if refused := [f'{name}: {what}' for name, what in changed.items() if name not in allowed]:
    lines = '\n  '.join(refused)
    raise ConfigError(f'{checkpoints.directory}: its run differs from this one; use another --workdir:\n  {lines}')
  return [f'allowed to differ from step {step} on: {name}: {what}' for name, what in changed.items()]


def _start(
  experiment: Experiment,
  trainer: Trainer,
  checkpoints: Checkpoints,
  batches: DeviceBatches,
  meta: dict[str, Any],
  allowed: Sequence[str],
  fallback: bool,
) -> tuple[State, int, dict[str, Any], list[str]]:
  """The state to go on from, with the data moved to the same place; its step; what its checkpoints keep besides; what
  differs from the run that is resumed, and may.
  """

  def read(step: int) -> tuple[State, int, dict[str, Any], list[str]]:
    accepted = _compare(experiment, checkpoints, step, meta, allowed)
    state, stored = resumed_state(experiment, trainer, checkpoints, step)
    batches.set_state(stored['data'])
    kept = dict(bad_samples=stored.get('bad_samples', 0))
    if 'start' in stored:
      kept['start'] = stored['start']
    if trainer.lora:
      kept['base'] = stored['base'] | dict(run=experiment.train.init_from)
    return state, step, kept, accepted

  found = newest_whole(checkpoints, read, fallback=fallback)
  if found is None:
    _compare(experiment, checkpoints, None, meta, allowed)
    state, base = initial_state(experiment, trainer)
    found = state, 0, base, []
  return found


# What a run may go on with as it likes: it changes no number, or is checked by what the path leads to.
_FREE = re.compile(
  r'config\.(train\.(log_every|save_every|keep|verify_saves|failed_saves|max_skipped|mesh|slices|accumulate)|'
  r'data\.(workers|dataset|tokenizer|template|features|bad_sample)|'
  r'model\.(scan\..*|visual_chunk)).*'
)


def differences(stored: Any, now: Any, path: str = '') -> dict[str, str]:
  """By path `was …, is …` for every leaf that two nested dicts of a run's meta do not share, but for `_FREE` ones."""
  if path == 'config.data.mixture':  # a row without its directory: what lies there is in the fingerprint
    stored, now = ([row[1:] for row in rows or ()] for rows in (stored, now))
  if isinstance(stored, dict) and isinstance(now, dict):
    names = dict.fromkeys([*stored, *now])
    parts = (differences(stored.get(n), now.get(n), f'{path}.{n}' if path else n) for n in names)
    return {name: what for part in parts for name, what in part.items()}
  return {} if stored == now or _FREE.fullmatch(path) else {path: f'was {stored!r}, is {now!r}'}


def _meta(experiment: Experiment, inputs: Inputs, total: int) -> dict[str, Any]:
  """What a checkpoint says of its run, the place in the data apart."""
  return dict(
    total_steps=total,
    **inputs.fingerprints(),
    config=json.loads(json.dumps(experiment.to_dict())),
  )


def _describe(experiment: Experiment, trainer: Trainer, inputs: Inputs, order: Order, start: int, total: int) -> str:
  count = {
    part: sum(math.prod(x.shape) for x in flatten(trainer.abstract[part]).values()) for part in ('params', 'frozen')
  }
  mixture = [inputs.source.describe()] if isinstance(inputs.source, Mixture) else []
  anew = experiment.train.init_from and not start
  begins = [describe_start(Path(experiment.train.init_from), experiment.model)] if anew else []
  summary = (
    f'{count["params"]:,} parameters train, {count["frozen"]:,} frozen; {len(inputs.source):,} records; '
    f'batch {experiment.train.batch_size}; steps {start:,} to {total:,}; mesh {dict(trainer.mesh.shape)}'
  )
  packed = [f'packed: {order.fill(0)}'] if isinstance(order, Packed) else []
  return '\n'.join([*mixture, *begins, *packed, summary])

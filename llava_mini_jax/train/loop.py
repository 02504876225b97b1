"""The training run: everything that touches disk, clock or screen, in one straight line."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax.analyze.flops import peak_flops, training_flops
from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.pipeline import DeviceBatches, device_batches
from llava_mini_jax.data.tokenizer import save_tokenizer
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import batch_sharding, check_batch, make_mesh, use_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.metrics import LOG_NAME, MetricsLog
from llava_mini_jax.train.optimizer import schedule
from llava_mini_jax.train.plots import training_curves
from llava_mini_jax.train.step import Trainer, make_trainer
from llava_mini_jax.train.tree import flatten

State = dict[str, Any]


def train(experiment: Experiment, workdir: Path) -> dict[str, float]:
  """Trains to the end, or on from the last checkpoint in `workdir`.

  Leaves in `workdir`: config.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/, curves.png.

  Returns:
    The last step's metrics.
  Raises:
    ConfigError, MeshError, DataError, CheckpointError: before anything is compiled, where that is possible.
  """
  config = experiment.train

  # -- inputs --------------------------------------------------------------------------------------------------------
  mesh = make_mesh(config.mesh)
  check_batch(config.batch_size, mesh)
  inputs = load_inputs(experiment.data, experiment.model)
  total = experiment.total_steps(len(inputs.source))
  batches = device_batches(
    inputs.iterator(
      batch_size=config.batch_size,
      seed=config.seed,
      shard_index=jax.process_index(),
      shard_count=jax.process_count(),
    ),
    batch_sharding(mesh),
  )

  # -- state ---------------------------------------------------------------------------------------------------------
  factor = schedule(total, config.warmup_ratio)
  trainer = make_trainer(
    experiment.model,
    mesh,
    groups=config.groups,
    factor=factor,
    beta1=config.beta1,
    beta2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    max_grad_norm=config.max_grad_norm,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(workdir / 'checkpoints', keep=config.keep)
  with use_mesh(mesh), checkpoints, contextlib.closing(batches):
    state, start = _start(trainer, checkpoints, batches, experiment, total)
    if jax.process_index() == 0:
      (workdir / 'config.json').write_text(json.dumps(experiment.to_dict(), indent=2) + '\n')
      save_tokenizer(inputs.tokenizer, workdir / 'tokenizer')
      print(_describe(experiment, trainer, len(inputs.source), start, total), flush=True)

    # -- steps -------------------------------------------------------------------------------------------------------
    rates = _Rates(experiment, trainer)
    pending, last = [], {}
    with MetricsLog(workdir, start_step=start, total_steps=total) as log:
      for step in range(start + 1, total + 1):
        state, metrics = trainer.step(state, next(batches))
        pending.append((step, metrics))
        save = step % config.save_every == 0 or step == total
        # Metrics go to disk before the checkpoint that covers them, so a kill in between loses no line of the curve.
        if save or step % config.log_every == 0:
          for at, values in jax.device_get(pending):
            last = {name: float(value) for name, value in values.items()}
            log.write(int(at), last | (rates.since_last(len(pending)) if at == step else {}))
          log.flush()
          pending = []
        if save:
          checkpoints.save(step, state, _meta(experiment, batches, total))
      checkpoints.wait()
  training_curves(workdir / LOG_NAME, workdir / 'curves.png')
  return last


def _start(
  trainer: Trainer, checkpoints: Checkpoints, batches: DeviceBatches, experiment: Experiment, total: int
) -> tuple[State, int]:
  """The state to go on from, with the data moved to the same place, and its step."""
  step = checkpoints.latest_step
  if step is None:
    return trainer.init(jax.random.key(experiment.train.seed)), 0
  meta = checkpoints.meta(step)
  if meta['total_steps'] != total:
    raise ConfigError(
      f'{checkpoints.directory}: its run has {meta["total_steps"]} steps, this one {total}; use another --workdir'
    )
  state, meta = checkpoints.restore(trainer.abstract, step)
  batches.set_state(meta['data'])
  return state, step


def _meta(experiment: Experiment, batches: DeviceBatches, total: int) -> dict[str, Any]:
  return dict(data=batches.get_state(), total_steps=total, config=json.loads(json.dumps(experiment.to_dict())))


class _Rates:
  """Throughput between two logged steps; counts static shapes, so padding is included."""

  def __init__(self, experiment: Experiment, trainer: Trainer):
    data, rows = experiment.data, experiment.train.batch_size
    trains = {path.split('/')[0] for path in flatten(trainer.abstract['params']) if path != 'decoder/embed_tokens'}
    self._tokens, self._images = rows * data.row_length, rows * data.visuals_per_row
    self._flops = training_flops(
      experiment.model,
      trains=trains,
      rows=rows,
      length=data.row_length,
      visuals=data.visuals_per_row,
      fused_text=data.fused_text or data.row_length,
    )
    self._peak = peak_flops(experiment.model.dtype)
    self._time: float | None = None

  def since_last(self, steps: int) -> dict[str, float]:
    """{} the first time, which would time the compilation."""
    now, before = time.perf_counter(), self._time
    self._time = now
    if before is None:
      return {}
    per_second = steps / (now - before)
    return dict(
      steps_per_second=per_second,
      tokens_per_second=per_second * self._tokens,
      images_per_second=per_second * self._images,
      mfu=per_second * self._flops / self._peak,
    )


def _describe(experiment: Experiment, trainer: Trainer, records: int, start: int, total: int) -> str:
  count = {part: sum(leaf.size for leaf in flatten(trainer.abstract[part]).values()) for part in ('params', 'frozen')}
  return (
    f'{count["params"]:,} parameters train, {count["frozen"]:,} frozen; {records:,} records; '
    f'batch {experiment.train.batch_size}; steps {start:,} to {total:,}; mesh {dict(trainer.mesh.shape)}'
  )

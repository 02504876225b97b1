"""How fast an experiment's input pipeline is, alone, and which share of a training step waits for it.

Enters: an Experiment whose dataset is prepared. Leaves: images per second, and seconds per batch and step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time

import jax

from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.pipeline import device_batches
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import batch_sharding, make_mesh, process_rows, use_mesh
from llava_mini_jax.train.step import make_trainer


@dataclasses.dataclass(frozen=True)
class InputSpeed:
  images_per_batch: int
  alone: float  # seconds per batch, nothing else running
  step: float  # seconds per training step, input included
  waited: float  # of those, seconds that the step waited for its batch

  @property
  def images_per_second(self) -> float:
    return self.images_per_batch / self.alone


def input_speed(experiment: Experiment, *, batches: int = 20) -> InputSpeed:
  """Averages over so many batches, the first two left out. Raises as `train.loop.train`, for what is not there."""
  config = experiment.train
  mesh = make_mesh(config.mesh, slices=config.slices)
  inputs = load_inputs(experiment.data, experiment.model, seed=config.seed, start=config.init_from)
  order = inputs.order(batch_size=config.batch_size, seed=config.seed)
  index, count = process_rows(mesh)

  def stream():
    iterator = inputs.iterator(
      order, batch_size=config.batch_size, seed=config.seed, shard_index=index, shard_count=count
    )
    return contextlib.closing(device_batches(iterator, batch_sharding(mesh)))

  with stream() as source:
    images, alone = _alone(source, batches)
  trainer = make_trainer(experiment.model, mesh, groups=config.groups, factor=lambda step: 1.0)
  with use_mesh(mesh), stream() as source:
    state, waited = trainer.init(jax.random.key(config.seed)), 0.0
    for i in range(batches + 2):
      if i == 2:  # the first ones compile
        waited, begun = 0.0, time.perf_counter()
      before = time.perf_counter()
      batch = next(source)
      waited += time.perf_counter() - before
      state, metrics = trainer.step(state, batch)
      jax.block_until_ready(metrics)
  return InputSpeed(images, alone, (time.perf_counter() - begun) / batches, waited / batches)


def _alone(source, batches: int) -> tuple[int, float]:
  """(images per batch, seconds per batch)."""
  for _ in range(2):
    batch = next(source)
  before = time.perf_counter()
  for _ in range(batches):
    batch = jax.block_until_ready(next(source))
  return batch.pixels.shape[0] * batch.pixels.shape[1], (time.perf_counter() - before) / batches


def describe(found: InputSpeed) -> str:
  return (
    f'input alone: {found.images_per_second:,.0f} images/s ({1e3 * found.alone:.1f} ms per batch of '
    f'{found.images_per_batch}); training step {1e3 * found.step:.1f} ms, of which it waits for input '
    f'{1e3 * found.waited:.1f} ms ({found.waited / found.step:.1%})'
  )

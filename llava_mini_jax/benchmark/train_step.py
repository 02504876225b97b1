"""The training step on this machine's CPU beside the same step in torch, in turns, so that both meet the same weather.

Enters: the name of a size. Leaves: seconds per step of each, by the wall clock and of processor time, and their ratio.
Processor time (of all threads) hardly depends on what else the machine does: with one thread each (taskset) it compares
fairly where the machine is not quiet. With several, torch's threads wait for each other awake and look worse.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time

import jax
import numpy as np

from llava_mini_jax.config import ConfigError, LlavaMiniConfig, ScanConfig, require_choice
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.markdown import table
from llava_mini_jax.presets import PRESETS
from llava_mini_jax.sharding import batch_sharding, make_mesh, use_mesh
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

RATE = 1e-4
SCAN = ScanConfig(remat='none', unroll=True)  # torch recomputes nothing, and its loop over layers is written out
CHECKED, TOLERANCE = 3, 1e-4  # steps whose losses are compared, and by how much they may differ


@dataclasses.dataclass(frozen=True)
class Size:
  model: LlavaMiniConfig
  rows: int
  length: int
  question: int  # tokens that are fused
  answer: int  # tokens that are learnt


def _medium() -> LlavaMiniConfig:
  """Width 512 and 8 layers throughout, 576 patches; too wide for a loop over layers to be written out where it asks."""
  tiny = PRESETS['tiny']()
  wide = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8)
  vision = dataclasses.replace(
    tiny.vision, **wide | dict(intermediate_size=2048, num_attention_heads=8, image_size=336, patch_size=14)
  )
  decoder = dataclasses.replace(
    tiny.decoder, **wide, vocab_size=8192, num_attention_heads=8, num_key_value_heads=8, head_dim=64
  )
  prefusion = dataclasses.replace(tiny.prefusion, num_layers=2)
  return dataclasses.replace(
    tiny, vision=vision, decoder=decoder, prefusion=prefusion, scan=ScanConfig(remat='none', unroll=False)
  )


SIZES = {
  'tiny': lambda: Size(PRESETS['tiny'](), rows=16, length=128, question=104, answer=16),
  'medium': lambda: Size(_medium(), rows=2, length=128, question=64, answer=32),
}


def random_batch(size: Size, rows: int, seed: int = 0) -> Batch:
  """Rows of an image, a question and an answer of random tokens."""
  shape = RowShape.for_model(size.model, length=size.length, fused_text=size.question)
  rng = np.random.default_rng(seed)
  made = []
  for row in range(rows):
    text = rng.integers(1, size.model.decoder.vocab_size, size.question + size.answer)
    ids = np.insert(text, 1, IMAGE_TOKEN_ID).astype(np.int32)
    learn = np.arange(len(ids)) >= len(ids) - size.answer
    made.append(build_row(ids, learn, shape, where=f'row {row}'))
    side = size.model.vision.image_size
    made[-1]['pixels'] = rng.normal(size=(1, 1, side, side, 3)).astype(np.float32)
  return Batch(**{name: np.stack([row[name] for row in made]) for name in made[0]})


class JaxStep:
  """The trainer's own step, rows over the first `devices` devices."""

  def __init__(self, size: Size, scan: ScanConfig = SCAN, devices: int = 1):
    model = dataclasses.replace(size.model, scan=scan)
    self.mesh = make_mesh((devices, 1, 1), jax.devices()[:devices])
    self._trainer = make_trainer(model, self.mesh, groups=(('.*', RATE),), factor=lambda step: 1.0)
    with use_mesh(self.mesh):
      self._state = self._trainer.init(jax.random.key(0))

  def params(self) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in flatten(self._state['params']).items()}

  def step(self, batch: Batch) -> float:
    with use_mesh(self.mesh):
      self._state, metrics = self._trainer.step(self._state, jax.device_put(batch, batch_sharding(self.mesh)))
    return float(metrics['loss'])


@dataclasses.dataclass(frozen=True)
class Clock:
  """Seconds per step of every round."""

  wall: tuple[float, ...]
  processor: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
  size: str
  jax: Clock
  torch: Clock
  threads: int
  losses: tuple[tuple[float, float], ...]  # (jax, torch) of the first steps

  def ratio(self, clock: str = 'wall', of=min) -> float:
    """Time of JAX / time of torch; below 1, JAX is faster. clock: wall or processor."""
    return of(getattr(self.jax, clock)) / of(getattr(self.torch, clock))


def compare(name: str, *, rounds: int = 10, steps: int = 1) -> Result:
  """Both take the same steps from the same parameters; then their times, in turns.

  Args:
    name: of SIZES. rounds: times that each is measured. steps: taken in a row each time.
  Raises:
    ArithmeticError: they do not compute the same: losses of the first steps differ by more than TOLERANCE.
    ConfigError: another size, or torch is not installed.
  """
  require_choice('size', name, tuple(SIZES))
  try:
    import torch

    from llava_mini_jax.benchmark.torch_twin import Twin, to_torch
  except ImportError as error:
    raise ConfigError("train: expected the package torch; pip install -e '.[convert]'") from error
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  size = SIZES[name]()
  batch = random_batch(size, size.rows)
  ours = JaxStep(size)
  twin, theirs = Twin(size.model, ours.params(), rate=RATE), to_torch(batch)
  losses = tuple((ours.step(batch), float(twin.step(theirs))) for _ in range(CHECKED))
  if max(abs(a - b) for a, b in losses) > TOLERANCE:
    raise ArithmeticError(f'{name}: expected the losses of both to agree within {TOLERANCE}; found {losses}')

  def timed(step) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
      step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps

  rows = [(*timed(lambda: ours.step(batch)), *timed(lambda: float(twin.step(theirs)))) for _ in range(rounds)]
  jax_wall, jax_cpu, torch_wall, torch_cpu = zip(*rows, strict=True)
  return Result(name, Clock(jax_wall, jax_cpu), Clock(torch_wall, torch_cpu), threads, losses)


def describe(results: list[Result]) -> str:
  """A Markdown table: milliseconds per step, minimum / median of the rounds."""
  rows = []
  for r in results:
    for clock in ('wall', 'processor'):
      times = [
        f'{1e3 * min(t):.1f} / {1e3 * statistics.median(t):.1f}'
        for t in (getattr(r.jax, clock), getattr(r.torch, clock))
      ]
      ratios = f'{r.ratio(clock):.2f} / {r.ratio(clock, statistics.median):.2f}'
      rows.append([r.size, r.threads, clock, *times, ratios])
  return '\n'.join(table(['size', 'threads', 'clock', 'JAX ms', 'torch ms', 'JAX / torch'], rows))

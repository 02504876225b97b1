"""One training step on 1, 2, 4 and 8 devices: do they compute the same? Enters: a size. Leaves: losses.

Emulated devices (XLA_FLAGS=--xla_force_host_platform_device_count=8) share the processor, so no time is measured.
"""

from __future__ import annotations

import dataclasses

import jax

from llava_mini_jax.benchmark.train_step import SIZES, JaxStep, random_batch
from llava_mini_jax.config import require_choice
from llava_mini_jax.markdown import table
from llava_mini_jax.sharding import MeshError

ROWS, STEPS = 8, 3


@dataclasses.dataclass(frozen=True)
class Scaling:
  size: str
  losses: dict[int, tuple[float, ...]]  # of each step, by number of devices

  @property
  def worst(self) -> float:
    """Largest difference from one device, of any step."""
    one = self.losses[1]
    return max(abs(a - b) for found in self.losses.values() for a, b in zip(found, one, strict=True))


def scaling(name: str, counts: tuple[int, ...] = (1, 2, 4, 8)) -> Scaling:
  """The same steps on the same global batch, rows divided over the devices. Raises MeshError if there are too few."""
  require_choice('size', name, tuple(SIZES))
  if jax.device_count() < max(counts):
    raise MeshError(f'scaling: expected {max(counts)} devices; found {jax.device_count()}')
  size = SIZES[name]()
  batch = random_batch(size, ROWS)
  losses = {}
  for count in counts:
    trainer = JaxStep(size, devices=count)
    losses[count] = tuple(trainer.step(batch) for _ in range(STEPS))
  return Scaling(name, losses)


def describe(found: Scaling) -> str:
  head = [f'{found.size}: devices', *(f'loss at step {i + 1}' for i in range(STEPS))]
  lines = table(head, [[count, *(f'{x:.7f}' for x in losses)] for count, losses in found.losses.items()])
  return '\n'.join([*lines, '', f'largest difference from one device: {found.worst:.1e}'])

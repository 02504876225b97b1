"""Which training steps count: one whose numbers are not finite, or a spike, or that has nothing to learn, is skipped.

Enters, inside the jitted step: loss, gradient norm and number of target tokens of the global batch, the same on every
device, so all agree. Leaves: a decision, and counters that are part of the state, so that checkpoints hold them; on the
host, the end of a run that skips one step after another. A skipped step leaves parameters and optimizer as they were,
to the bit: they are selected, never multiplied, since 0 · NaN is NaN.

The spike rule is OLMo-core's SkipStepOptimizer: loss or gradient norm more than so many standard deviations above the
mean of a window. Here the window holds steps that counted alone, so what is skipped never widens it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.train.errors import TrainingError

GuardState = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Guard:
  """spike_sigmas: 0 = no spike rule. spike_window: steps that it compares with; it acts once half of them are there."""

  spike_sigmas: float = 0.0
  spike_window: int = 128

  def initial(self) -> GuardState:
    """Of a run that has taken no step.

    Returns:
      int32 `skipped`, so far, and `consecutive`, the last ones in a row; with a spike rule also int32 `accepted`, and
      float32[window] `losses` and `grad_norms` of the last accepted steps, the newest at (accepted - 1) % window.
    """
    counters = dict(skipped=jnp.int32(0), consecutive=jnp.int32(0))
    if not self.spike_sigmas:
      return counters
    windows = {name: jnp.zeros(self.spike_window, jnp.float32) for name in ('losses', 'grad_norms')}
    return counters | dict(accepted=jnp.int32(0)) | windows

  def abstract(self, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of `initial`."""
    shapes = jax.eval_shape(self.initial)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in shapes.items()}

  def judge(
    self, state: GuardState, loss: jax.Array, grad_norm: jax.Array, target_tokens: jax.Array
  ) -> tuple[jax.Array, GuardState]:
    """Whether the step counts, bool[], and the state after it. Scalars in; nothing here raises."""
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (target_tokens > 0)
    new, windows = {}, dict(losses=loss, grad_norms=grad_norm)
    if self.spike_sigmas:
      count = state['accepted']
      calm = [~self._is_spike(value, state[name], count) for name, value in windows.items()]
      ok &= calm[0] & calm[1]
      at = count % self.spike_window
      new = {name: state[name].at[at].set(jnp.where(ok, value, state[name][at])) for name, value in windows.items()}
      new['accepted'] = count + ok
    skipped = (~ok).astype(jnp.int32)
    new |= dict(skipped=state['skipped'] + skipped, consecutive=(state['consecutive'] + 1) * skipped)
    return ok, new

  def _is_spike(self, value: jax.Array, window: jax.Array, count: jax.Array) -> jax.Array:
    held = jnp.arange(self.spike_window) < count
    number = jnp.maximum(held.sum(), 1)
    mean = jnp.where(held, window, 0).sum() / number
    deviation = jnp.sqrt(jnp.where(held, jnp.square(window - mean), 0).sum() / jnp.maximum(number - 1, 1))
    enough = count >= max(2, self.spike_window // 2)
    return enough & (value - mean > self.spike_sigmas * deviation)

  @classmethod
  def stored_with(cls, config: Mapping[str, Any]) -> Guard | None:
    """That of a checkpoint, from the `train` section of the config in its meta; None = from before there were any."""
    fields = [field.name for field in dataclasses.fields(cls)]
    return cls(*(config[name] for name in fields)) if set(fields) <= config.keys() else None

  def adopt(self, stored: GuardState, fresh: GuardState) -> GuardState:
    """Counters that go on from `stored`; its window only if it is one like this (`fresh`), else one that is empty."""
    same = {name: leaf.shape for name, leaf in stored.items()} == {name: leaf.shape for name, leaf in fresh.items()}
    kept = fresh.keys() if same else stored.keys() & {'skipped', 'consecutive'}
    return fresh | {name: stored[name] for name in kept}


def select(ok: jax.Array, new: Any, old: Any) -> Any:
  """Each leaf of `new`, or of `old` bit for bit."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


@dataclasses.dataclass
class Skips:
  """Looks at the metrics of finished steps, on the host, and ends a run that gets nowhere.

  Attributes:
    limit: skipped steps in a row that end it (`train.max_skipped`). before: in a row that the state was restored with.
  """

  limit: int
  before: int = 0
  found: list[str] = dataclasses.field(default_factory=list, init=False)

  def count(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes the metrics of one step. Raises TrainingError at the last one that is bearable, with all since the first.

    The state is that of before the first: a checkpoint of it would hold no more.
    """
    if not metrics['skipped']:
      self.before, self.found = 0, []
      return
    self.found.append(f'step {step}: {_reason(metrics)}')
    number = self.before + len(self.found)
    if number >= self.limit:
      earlier = f', {self.before} of them before it was resumed' if self.before else ''
      raise TrainingError(
        f'step {step}: {number} step(s) skipped in a row{earlier} (train.max_skipped={self.limit}); parameters are '
        'those from before the first:\n  ' + '\n  '.join(self.found)
      )


def _reason(metrics: Mapping[str, float]) -> str:
  numbers = {name: metrics[name] for name in ('loss', 'grad_norm')}
  found = ', '.join(f'{name} {value:.6g}' for name, value in numbers.items())
  if not all(map(math.isfinite, numbers.values())):
    return f'expected finite numbers; found {found}'
  if not metrics['target_tokens']:
    return f'expected target tokens; found none ({found})'
  return f'expected no spike (train.spike_sigmas); found {found}'

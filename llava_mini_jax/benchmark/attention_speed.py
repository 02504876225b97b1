"""Attention on this machine's CPU: as the model has it, the library's, and torch's, forward and with its gradient."""

from __future__ import annotations

import dataclasses
import importlib.util
import timeit
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.markdown import table
from llava_mini_jax.models.attention import attend_on_cpu

TOLERANCE = 1e-3
# rows, tokens, query heads, key heads, width of a head, causal: the tower at `medium`, the decoder, with shared keys
SHAPES = ((2, 577, 8, 8, 64, False), (2, 640, 8, 8, 64, True), (2, 640, 8, 2, 64, True))


@dataclasses.dataclass(frozen=True)
class Speed:
  shape: tuple
  system: str
  forward: float  # seconds, the least of the rounds
  both: float


def speeds(rounds: int) -> Iterator[Speed]:
  """Raises ConfigError: torch is not installed. ArithmeticError: two of the systems give other values."""
  if not importlib.util.find_spec('torch'):
    raise ConfigError("attention: expected the package torch; pip install -e '.[convert]'")
  for shape in SHAPES:
    rows, length, queries, shared, width, causal = shape
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(rows, length, n, width)).astype(np.float32) for n in (queries, shared, shared)]
    expected = None
    for system, attend in (
      ('attend_on_cpu', _in_jax(attend_on_cpu, heads, causal)),
      ('jax.nn', _in_jax(jax.nn.dot_product_attention, heads, causal)),
      ('torch', _in_torch(heads, causal)),
    ):
      forward, both = attend
      found = [np.asarray(x) for x in (forward(), *both())]
      expected = expected or found
      worst = max(float(np.max(abs(a - b))) for a, b in zip(found, expected, strict=True))
      if not worst <= TOLERANCE:  # nor is NaN
        raise ArithmeticError(f'attention: expected values within {TOLERANCE}; {system} differs by {worst}')
      least = [min(timeit.repeat(run, number=1, repeat=rounds)) for run in (forward, both)]  # both have run before
      yield Speed(shape, system, *least)


def _in_jax(attend: Callable, heads: list[np.ndarray], causal: bool) -> tuple[Callable, Callable]:
  """Calls that return when the output is there, [B L N H]; or the gradients of the sum of its squares."""
  (rows, length), arrays = heads[0].shape[:2], [jnp.asarray(x) for x in heads]
  mask = jnp.tril(jnp.ones((rows, 1, length, length), bool)) if causal else None
  forward = jax.jit(lambda mask, *heads: attend(*heads, mask=mask))
  both = jax.jit(jax.grad(lambda mask, *heads: jnp.square(forward(mask, *heads)).sum(), argnums=(1, 2, 3)))
  return tuple(lambda f=f: jax.block_until_ready(f(mask, *arrays)) for f in (forward, both))


def _in_torch(heads: list[np.ndarray], causal: bool) -> tuple[Callable, Callable]:
  import torch

  leaves = [torch.from_numpy(x).requires_grad_() for x in heads]

  def attend() -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in leaves)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

  return torch.no_grad()(attend), lambda: torch.autograd.grad(attend().square().sum(), leaves)


def describe(found: list[Speed]) -> str:
  head = ['rows, tokens, heads, key heads, width, causal', 'system', 'forward ms', 'and gradient ms']
  cells = ([', '.join(map(str, s.shape)), s.system, f'{1e3 * s.forward:.1f}', f'{1e3 * s.both:.1f}'] for s in found)
  return '\n'.join(table(head, cells))

"""Attention on this machine's CPU: as the model has it, the library's, and torch's, forward and with its gradient."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.markdown import table
from llava_mini_jax.models.attention import attend_on_cpu

# rows, tokens, query heads, key heads, width of a head, causal: the tower at `medium`, the decoder, with shared keys
SHAPES = ((2, 577, 8, 8, 64, False), (2, 640, 8, 8, 64, True), (2, 640, 8, 2, 64, True))


@dataclasses.dataclass(frozen=True)
class Speed:
  shape: tuple
  system: str
  forward: float  # seconds, the least of the rounds
  both: float


def speeds(rounds: int) -> Iterator[Speed]:
  """Raises ConfigError: torch is not installed."""
  if not importlib.util.find_spec('torch'):
    raise ConfigError("attention: expected the package torch; pip install -e '.[convert]'")
  for shape in SHAPES:
    rows, length, heads, shared, width, causal = shape
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(rows, length, n, width)).astype(np.float32) for n in (heads, shared, shared)]
    for system, attend in (('attend_on_cpu', attend_on_cpu), ('jax.nn', jax.nn.dot_product_attention)):
      yield Speed(shape, system, *_jax_times(attend, heads, causal, rounds))
    yield Speed(shape, 'torch', *_torch_times(heads, causal, rounds))


def _jax_times(attend: Callable, heads: list[np.ndarray], causal: bool, rounds: int) -> tuple[float, float]:
  (rows, length), arrays = heads[0].shape[:2], [jnp.asarray(x) for x in heads]
  mask = jnp.tril(jnp.ones((rows, 1, length, length), bool)) if causal else None
  forward = jax.jit(lambda mask, *heads: attend(*heads, mask=mask))
  both = jax.jit(jax.grad(lambda mask, *heads: jnp.square(forward(mask, *heads)).sum(), argnums=(1, 2, 3)))
  run = [lambda f=f: jax.block_until_ready(f(mask, *arrays)) for f in (forward, both)]
  return _least(run[0], rounds), _least(run[1], rounds)


def _torch_times(heads: list[np.ndarray], causal: bool, rounds: int) -> tuple[float, float]:
  import torch

  tensors = [torch.from_numpy(x).transpose(1, 2).contiguous().requires_grad_() for x in heads]

  def forward() -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)

  with torch.no_grad():
    alone = _least(forward, rounds)
  return alone, _least(lambda: torch.autograd.grad(forward().square().sum(), tensors), rounds)


def _least(run: Callable[[], object], rounds: int) -> float:
  run()
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return min(times)


def describe(found: list[Speed]) -> str:
  head = ['rows, tokens, heads, key heads, width, causal', 'system', 'forward ms', 'and gradient ms']
  cells = ([', '.join(map(str, s.shape)), s.system, f'{1e3 * s.forward:.1f}', f'{1e3 * s.both:.1f}'] for s in found)
  return '\n'.join(table(head, cells))

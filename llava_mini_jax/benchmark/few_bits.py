"""What kernels in few bits cost in accuracy and save in memory, with random weights.

Enters: the name of a size of `train_step.SIZES`. Leaves: bytes of all parameters, and how far logits are from those of
the same model in float32, teacher-forced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.benchmark.asking import model_of, random_run
from llava_mini_jax.benchmark.train_step import SIZES, random_batch
from llava_mini_jax.config import QUANTIZED, require_choice
from llava_mini_jax.markdown import table
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.tree import merge


@dataclasses.dataclass(frozen=True)
class Kept:
  size: str
  kernels: str  # '' = as the rest
  dtype: str
  bytes: int  # of all parameters, packed
  error: float  # root mean square over logits, relative to their spread
  same: float  # share of positions with the same likeliest token


def few_bits(size: str) -> Iterator[Kept]:
  """float32, bfloat16, and every kind of few bits with the rest in float32. Raises ConfigError for another size."""
  require_choice('size', size, tuple(SIZES))
  batch, mesh = random_batch(SIZES[size](), 2), make_mesh((1, 1, 1), jax.devices()[:1])
  expected = None
  for dtype, kernels in (('float32', ''), ('bfloat16', ''), *(('float32', kind) for kind in QUANTIZED)):
    run = random_run(model_of(size, dtype), mesh, quantize=kernels)
    with use_mesh(mesh):
      logits = jax.jit(lambda params, batch, of=run.graphdef: merge(of, params)(batch))(run.params, batch)
    logits = np.asarray(logits, np.float64)
    expected = logits if expected is None else expected
    error = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
    same = float((logits.argmax(-1) == expected.argmax(-1))[np.asarray(batch.segment_ids) > 0].mean())
    yield Kept(size, kernels, dtype, packed_bytes(run.params), float(error), same)


def packed_bytes(params: Any) -> int:
  """On accelerators, where two numbers of four bits share a byte; on CPUs each has its own."""
  return sum(x.size * _bits(x.dtype) for x in jax.tree.leaves(params)) // 8


def _bits(dtype: Any) -> int:
  return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


def describe(found: Sequence[Kept]) -> str:
  rows = []
  for k in found:
    whole = next(x.bytes for x in found if x.size == k.size and x.dtype == 'float32' and not x.kernels)
    cells = [k.size, k.dtype, k.kernels or k.dtype, f'{k.bytes / 2**20:.1f}', f'{k.bytes / whole:.2f}']
    rows.append([*cells, f'{100 * k.error:.2f}%', f'{100 * k.same:.1f}%'])
  head = ['size', 'computed in', 'kernels', 'MiB', 'of float32', 'error of logits', 'same token']
  return '\n'.join(table(head, rows))

"""Kernels kept in a few bits, as qwix's QArray in the place of an array; `layers.linear` multiplies with either.

Scales are float32. int8 has one for each output of each layer; int4 and nf4 have one for each block of up to 64 inputs
besides, as QLoRA does (arXiv:2305.14314, section 3; its double quantization of the scales is left out). A QArray is a
pytree of arrays with the same leading axes, so it is scanned, sharded and donated like the array that it stands for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding, PartitionSpec

BLOCK = 64
# The largest number becomes the last step. qwix alone puts it between two, where rounding differs by program.
_RANGE = dict(int8=127.5 / 127, int4=7.5 / 7, nf4=1.0)


def quantize(kernel: jax.Array, kind: str, *, layers: int, inputs: int) -> qwix.QArray:
  """Rounds each number to the nearest of 255 (int8) or 15 (int4) even steps or of 16 uneven ones (nf4).

  Args:
    kernel: [layer… in… out…].
    kind: one of `config.QUANTIZED`.
    layers, inputs: how many axes of each kind it has.
  """
  outputs = range(layers + inputs, kernel.ndim)
  apart, blocks = [*range(layers), *outputs], {}
  if kind != 'int8':
    last = layers + inputs - 1
    apart += range(layers, last)
    blocks = {last: max(size for size in range(1, BLOCK + 1) if kernel.shape[last] % size == 0)}
  return qwix.quantize(
    kernel.astype(jnp.float32),
    kind,
    channelwise_axes=sorted(apart),
    tiled_axes=blocks,
    calibration_method=f'absmax,{_RANGE[kind]}',
  )


def dequantize(kernel: qwix.QArray, dtype: Any) -> jax.Array:
  """The kernel that it stands for, rounded once to `dtype`."""
  return qwix.dequantize(kernel).astype(dtype)


def abstract(leaf: jax.ShapeDtypeStruct, kind: str, *, layers: int, inputs: int) -> qwix.QArray:
  """What `quantize` makes of a sharded kernel: the numbers lie as the kernel does, and so do scales where they can."""
  found = jax.eval_shape(lambda x: quantize(x, kind, layers=layers, inputs=inputs), leaf)
  spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))

  def placed(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    axes = [axis if size == whole else None for axis, size, whole in zip(spec, part.shape, leaf.shape, strict=True)]
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)

  return jax.tree.map(placed, found)

"""Fingerprints of parameters: equal bits have equal ones on every mesh, and one flipped bit gives another.

Each element's bits are mixed with its place in the array, and the mixed numbers are added up modulo 2³². Integers add
up to the same in any order, so nothing depends on how the array is cut; parts can be taken one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

_SEEDS = (0x9E3779B9, 0x85EBCA6B)
_PART_BYTES = 2**26
_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3: every bit of uint32 x changes about half of the bits."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@jax.jit
def _sums(array: jax.Array, offset: jax.Array) -> jax.Array:
  """uint32[2] of an array whose first element is number `offset`; overflow is meant."""
  bits = jax.lax.bitcast_convert_type(array, _UINT[array.dtype.itemsize]).astype(jnp.uint32)
  strides = [math.prod(array.shape[axis + 1 :]) % 2**32 for axis in range(array.ndim)]
  places = (jax.lax.broadcasted_iota(jnp.uint32, array.shape, n) * jnp.uint32(s) for n, s in enumerate(strides))
  place = functools.reduce(jnp.add, places, offset)
  return jnp.stack([_mix(bits ^ _mix(place ^ jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in _SEEDS])


def _text(sums: np.ndarray) -> str:
  return ''.join(f'{int(part):08x}' for part in sums)


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
  """16 hexadecimal digits for each array of 8, 16 or 32 bits."""
  sums = {name: _sums(array, jnp.uint32(0)) for name, array in arrays.items()}
  return {name: _text(part) for name, part in jax.device_get(sums).items()}


def fingerprint_on_host(array: np.ndarray) -> str:
  """The same, with 64 MiB of the array in memory at a time, so that it may be a memory map."""
  rows = max(1, _PART_BYTES // max(1, array[:1].nbytes))
  total = np.zeros(2, np.uint64)
  for start in range(0, len(array), rows):
    offset = start * array[:1].size % 2**32
    total += np.asarray(_sums(array[start : start + rows], jnp.uint32(offset)))
  return _text(total % 2**32)

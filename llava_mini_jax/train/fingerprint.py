"""Fingerprints of arrays: equal bits have equal ones on every mesh, and one flipped bit gives another.

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
from jax.sharding import NamedSharding, PartitionSpec, Sharding

_SEEDS = (0x9E3779B9, 0x85EBCA6B)
_PART_BYTES = 2**26
_UINT = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}  # by bits


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3: every bit of uint32 x changes about half of the bits."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sums(array: jax.Array, offset: jax.Array) -> jax.Array:
  """uint32[2] of an array whose first word is number `offset`; overflow is meant."""
  words = _words(array)
  strides = [math.prod(words.shape[axis + 1 :]) % 2**32 for axis in range(words.ndim)]
  places = (jax.lax.broadcasted_iota(jnp.uint32, words.shape, n) * jnp.uint32(s) for n, s in enumerate(strides))
  place = functools.reduce(jnp.add, places, offset)
  return jnp.stack([_mix(words ^ _mix(place ^ jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in _SEEDS])


def _words(array: jax.Array) -> jax.Array:
  """The bits as uint32: one for an element; two, on the last axis, for 64 bits; complex numbers as their two parts."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    array = jnp.stack([array.real, array.imag], axis=-1)
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  about = jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo
  return jax.lax.bitcast_convert_type(array, _UINT[about(array.dtype).bits]).astype(jnp.uint32)


@functools.cache
def _summing(where: Sharding | None):
  """On every process alike, if the array lies on several."""
  return jax.jit(_sums, out_shardings=where)


def _text(sums: np.ndarray) -> str:
  return ''.join(f'{int(part):08x}' for part in sums)


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
  """16 hexadecimal digits for each array, of any dtype. Every process that holds a part of one has to call it."""
  # One at a time: on CPUs, programs under way run in any order, and each waits for the other processes. With more of
  # them than threads, two processes may wait for each other for ever.
  return {name: _text(jax.device_get(_summing(_whole(array))(array, np.uint32(0)))) for name, array in arrays.items()}


def _whole(array: jax.Array) -> Sharding | None:
  sharding = getattr(array, 'sharding', None)
  return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def fingerprint_on_host(array: np.ndarray) -> str:
  """The same, with 64 MiB of the array in memory at a time, so that it may be a memory map."""
  array = np.atleast_1d(array)
  rows = max(1, _PART_BYTES // max(1, array[:1].nbytes))
  words = array[:1].size * max(1, array.dtype.itemsize // 4)  # of a row
  total = np.zeros(2, np.uint64)
  for start in range(0, len(array), rows):
    offset = np.uint32(start * words % 2**32)
    total += np.asarray(_summing(None)(array[start : start + rows], offset))
  return _text(total % 2**32)

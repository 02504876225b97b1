"""What a checkpoint says of itself besides its arrays: the run's meta, and of every leaf dtype, shape and fingerprint.

Enters: a state and a meta, which is JSON. Leaves: one JSON object that is stored with the arrays, with a checksum over
all of it and the step, so that a flipped bit in a data position is seen as one in a parameter is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.train.errors import DamagedError
from llava_mini_jax.train.fingerprint import fingerprints

_KEY = 'integrity'  # beside the fields of the meta
LISTED = 5  # leaves that a message names


@dataclasses.dataclass(frozen=True)
class Leaf:
  dtype: str
  shape: tuple[int, ...]
  fingerprint: str

  def __str__(self) -> str:
    return described(self)

  @property
  def struct(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Record:
  meta: dict[str, Any]
  leaves: dict[str, Leaf]  # by path in the state

  def stored(self, step: int) -> dict[str, Any]:
    """As it is stored with the checkpoint of a step."""
    return self.meta | {_KEY: dict(leaves=self._leaves(), checksum=self.checksum(step))}

  def checksum(self, step: int) -> str:
    return _checksum(step, self.meta, self._leaves())

  def _leaves(self) -> dict[str, list]:
    return {path: [leaf.dtype, list(leaf.shape), leaf.fingerprint] for path, leaf in self.leaves.items()}

  @classmethod
  def parse(cls, stored: Mapping[str, Any], step: int) -> Record:
    """Inverse of `stored`. Raises DamagedError: none, another step's, or one that is not what was written."""
    meta = dict(stored)
    kept = meta.pop(_KEY, None)
    if kept is None:
      raise DamagedError('it says nothing of its leaves (is it of an older version?)')
    try:
      if kept['checksum'] != _checksum(step, meta, kept['leaves']):
        raise DamagedError(f'its metadata are not those that step {step} was saved with')
      leaves = {path: Leaf(dtype, tuple(shape), sums) for path, (dtype, shape, sums) in kept['leaves'].items()}
    except (KeyError, TypeError, ValueError) as error:
      raise DamagedError('its metadata are not what was saved') from error
    return cls(meta, leaves)

  def compare(self, found: Mapping[str, jax.Array]) -> None:
    """Raises DamagedError naming leaves, some or all of those there are, that have other bits than were saved."""
    sums = fingerprints(found)
    if other := [path for path in sorted(sums) if sums[path] != self.leaves[path].fingerprint]:
      raise DamagedError(f'other bits than were saved in {listed(other)}')


def record_of(state: Any, meta: dict[str, Any]) -> Record:
  """Of a state on the devices; waits for it, and every process that holds a part of it has to call this."""
  flat = by_path(state)
  sums = fingerprints(flat)
  return Record(meta, {path: Leaf(str(x.dtype), tuple(x.shape), sums[path]) for path, x in flat.items()})


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves by path; named tuples, lists and dicts look alike on disk."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(map(_name, path)): leaf for path, leaf in flat}


def described(leaf: Any) -> str:
  return f'{leaf.dtype}{list(leaf.shape)}'


def listed(paths: Sequence[str]) -> str:
  """All, or the first of many."""
  return ', '.join(paths[:LISTED]) + (' and more' if len(paths) > LISTED else '')


def _name(entry: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)


def _checksum(step: int, meta: Any, leaves: Any) -> str:
  text = json.dumps([step, meta, leaves], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()

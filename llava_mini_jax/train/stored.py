"""Reading checkpoints, through Orbax v1; this file and `checkpoint` alone know Orbax.

Enters: a directory of checkpoints, one for each step. Leaves: states in the shardings that are asked for, whichever
mesh wrote them, and meta. Orbax puts no checksum on arrays; a checkpoint's `record` has fingerprints of them, which
whatever is read here is compared with.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from llava_mini_jax.distributed import first_fault
from llava_mini_jax.train.errors import CheckpointError, DamagedError, mismatches
from llava_mini_jax.train.record import LISTED, Record, by_path, described, listed
from llava_mini_jax.train.tree import flatten, unflatten

T = TypeVar('T')

_REASON = 400  # characters


class StoredCheckpoints:
  """The checkpoints of one run, for reading."""

  def __init__(self, directory: str | os.PathLike):
    self.directory = Path(directory).absolute()
    self.verified: set[int] = set()  # steps that were read, and were what they had been

  @property
  def steps(self) -> list[int]:
    """Of everything that has the name of a checkpoint, damaged or not; the unfinished ones have other names."""
    if not self.directory.is_dir():
      return []
    return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

  @property
  def latest_step(self) -> int | None:
    return max(self.steps, default=None)

  def require(self, step: int | None = None) -> int:
    """`step`, or the newest one. Raises CheckpointError if there is no such step."""
    steps = self.steps
    if not steps or (step is not None and step not in steps):
      wanted = '' if step is None else f' of step {step}'
      raise CheckpointError(f'no checkpoint{wanted} in {self.directory} (steps there: {steps or "none"})')
    return steps[-1] if step is None else step

  def meta(self, step: int | None = None) -> dict[str, Any]:
    """The meta alone. Every process of a run calls it.

    Raises CheckpointError: there is no such step, or its meta is not what was saved.
    """
    return self._record(self.require(step)).meta

  def checksum(self, step: int | None = None) -> str:
    """Of the meta and every leaf, as they were saved; no array is read. Any process may call it alone.

    Raises as `meta`.
    """
    step = self.require(step)
    try:
      return self._parse(step).checksum(step)
    except Exception as error:  # as in `_together`
      raise self._damaged(step, reason(error)) from error

  def restore(self, abstract: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state, in the shardings of `abstract`, and the meta. Every process of a run calls it.

    Raises:
      CheckpointError: no such step, or leaves that are missing, unexpected, misshaped or of another dtype.
      DamagedError: on every process, if one of them finds other bits than were saved, or none.
    """
    step = self.require(step)
    record = self._record(step)
    wanted, found = ({p: described(x) for p, x in part.items()} for part in (by_path(abstract), record.leaves))
    if faults := mismatches(wanted, found):
      raise CheckpointError(f'{self.directory}/{step} does not fit this run:\n  ' + '\n  '.join(faults))
    state = self._read(step, abstract, record)
    self.verified.add(step)
    return state, record.meta

  def stored_parameters(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that is there, trained or frozen, by path; reads none of them.

    Raises:
      CheckpointError: no such step, or a damaged one.
    """
    record = self._record(self.require(step))
    return {path: record.leaves[f'{part}/{path}'].struct for path, part in _parameters(record).items()}

  def restore_parameters(
    self, shardings: Mapping[str, jax.sharding.Sharding], step: int | None = None
  ) -> dict[str, jax.Array]:
    """Some parameters by path; what is not asked for is not read. Every process of a run calls it.

    Args:
      shardings: of the parameters wanted, by path.
    Raises:
      CheckpointError: no such step, a damaged one, or one without a parameter that is wanted.
    """
    step = self.require(step)
    record = self._record(step)
    there = _parameters(record)
    if missing := sorted(shardings.keys() - there.keys()):
      raise CheckpointError(f'{self.directory}/{step}: missing {missing}')
    wanted = {f'{there[path]}/{path}': where for path, where in shardings.items()}
    abstract = {
      path: jax.ShapeDtypeStruct(record.leaves[path].shape, record.leaves[path].struct.dtype, sharding=where)
      for path, where in wanted.items()
    }
    found = self._read(step, unflatten(abstract), record, partial=True) if abstract else {}
    return {path: leaf for part in found.values() for path, leaf in flatten(part).items()}

  def _record(self, step: int) -> Record:
    return self._together(step, lambda: self._parse(step))

  def _parse(self, step: int) -> Record:
    with _alone():
      stored = ocp.checkpointables_metadata(self.directory / str(step)).custom_metadata
    if not stored:  # Orbax only logs that the file is missing or broken
      raise DamagedError('its metadata are missing or cannot be parsed')
    return Record.parse(stored, step)

  def _read(self, step: int, abstract: Any, record: Record, *, partial: bool = False) -> Any:
    """What is read of a checkpoint is what was saved, or it raises DamagedError naming leaves."""
    try:
      found = self._together(step, lambda: self._load(step, abstract, partial=partial))
    except DamagedError as error:
      paths = [path for path, leaf in by_path(abstract).items() if leaf is not ocp.PLACEHOLDER]
      culprits = list(itertools.islice(self._unreadable(step, abstract, paths), LISTED + 1))
      raise DamagedError(f'{error}; of its leaves cannot be read: {listed(culprits)}') from error
    arrays = {path: leaf for path, leaf in by_path(found).items() if leaf is not ocp.PLACEHOLDER}
    self._together(step, lambda: record.compare(arrays))
    return found

  def _load(self, step: int, abstract: Any, *, partial: bool) -> Any:
    with _alone(partial):
      return ocp.load(self.directory / str(step), abstract, checkpointable_name='state')

  def _unreadable(self, step: int, abstract: Any, paths: Sequence[str]) -> Iterator[str]:
    """Those of the leaves that cannot be read, found by halves; by all processes alike, because Orbax counts reads."""
    fault = ''
    try:
      self._load(step, only(abstract, paths), partial=True)
    except Exception as error:  # whatever it is, it is one of these leaves
      fault = reason(error)
    if first_fault(fault):
      if len(paths) == 1:
        yield paths[0]
      else:
        half = len(paths) // 2
        yield from self._unreadable(step, abstract, paths[:half])
        yield from self._unreadable(step, abstract, paths[half:])

  def _together(self, step: int, read: Callable[[], T]) -> T:
    """Raises DamagedError, on all processes alike, if one of them raises anything: a flipped bit may make Orbax do so,
    and what it says of files that are missing or cut short names neither the checkpoint nor that it is damaged.
    """
    try:
      found, fault = read(), ''
    except Exception as error:
      found, fault = None, reason(error)
    if fault := first_fault(fault):
      raise self._damaged(step, fault)
    return found

  def _damaged(self, step: int, fault: str) -> DamagedError:
    return DamagedError(f'{self.directory}/{step} is damaged: {fault}')


def only(abstract: Any, paths: Collection[str]) -> Any:
  """The tree with nothing to be read but the leaves of these paths."""
  kept = iter([leaf if path in paths else ocp.PLACEHOLDER for path, leaf in by_path(abstract).items()])
  return jax.tree.map(lambda _: next(kept), abstract)


def reason(error: Exception) -> str:
  """The beginning of what it says: libraries quote files and their own innards."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return line if len(line) <= _REASON else f'{line[:_REASON]}…'


def _parameters(record: Record) -> dict[str, str]:
  """The part of the state that a parameter is in, by path."""
  split = (path.partition('/') for path in record.leaves)
  return {path: part for part, _, path in split if part in ('params', 'frozen')}


def _alone(partial: bool = False) -> ocp.Context:
  """A process reads by itself, and never waits for one whose files are damaged."""
  index = jax.process_index()
  context = ocp.Context()
  context.multiprocessing.primary_host = index
  context.multiprocessing.active_processes = {index}
  context.multiprocessing.barrier_sync_key_prefix = f'reader_{index}'
  context.pytree.loading.partial_load = partial
  return context

"""Checkpoints on disk: a run's saves, in the background, each of which counts when it was read back.

A checkpoint holds the training state (step, parameters, optimizer) and a JSON `meta`: the data position and the
experiment's config; `record` adds fingerprints of all of it. Reading is in `stored`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llava_mini_jax.distributed import as_first, first_fault, is_writer, meet
from llava_mini_jax.train.errors import CheckpointError, DamagedError
from llava_mini_jax.train.record import Record, by_path, record_of
from llava_mini_jax.train.retention import preserved
from llava_mini_jax.train.stored import StoredCheckpoints, only, reason

logger = logging.getLogger(__name__)

MOVED = 'damaged-'  # and the step: a damaged checkpoint out of the way
_TOGETHER = 2**26  # bytes of small leaves that are read back at once; a larger one is read alone


@dataclasses.dataclass
class _Save:
  """One that was begun."""

  step: int
  abstract: Any
  record: Record
  fault: str = ''


class Checkpoints(StoredCheckpoints):
  """The checkpoints of one run.

  Args:
    keep: for the run that writes them: how many of the newest stay, of verified ones 2 at the least; unfinished saves
      of a killed run are cleared away. None = nothing is deleted.
    verify: a save counts when it was read back from disk and is what was saved.
    failed_saves: so many in a row raise CheckpointError; fewer are warned of.
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep: int | None = None, verify: bool = True, failed_saves: int = 3
  ):
    super().__init__(directory)
    self._keep, self._verify, self._limit = keep, verify, failed_saves
    self._checkpointer: ocp.training.Checkpointer | None = None
    self._begun: _Save | None = None
    self._failures = 0
    self.notes: list[str] = []  # what was warned of

  def save(self, step: int, state: dict[str, Any], meta: dict[str, Any], *, hurry: bool = False) -> None:
    """Writes in the background; the state may be donated at once. Every process of a run calls it.

    Args:
      hurry: the save before this one is not read back.
    Raises:
      CheckpointError: the save before this one was the last of too many that failed; see `wait`.
    """
    begun = time.perf_counter()
    self.wait(hurry=hurry)
    waited = time.perf_counter()
    record = record_of(state, meta)
    summed = time.perf_counter()
    if step in self.steps:
      raise CheckpointError(f'{self.directory}/{step}: expected none, for it is to be written; found one')
    self._begun = _Save(step, _abstract(state), record)
    try:
      self._writer().save_checkpointables_async(step, {'state': state}, custom_metadata=record.stored(step))
    except Exception as error:  # a full disk; the next save may find room
      self._begun.fault = reason(error)
    logger.info(
      'checkpoint %d: %.3f s blocked: %.3f s by the one before, %.3f s by fingerprints, %.3f s by its own beginning',
      step, time.perf_counter() - begun, waited - begun, summed - waited, time.perf_counter() - summed,
    )  # fmt: skip

  def wait(self, *, hurry: bool = False) -> None:
    """Until what was begun is on disk, and read back. One that failed is told, moved aside, and not counted.

    Args:
      hurry: it is not read back, and never counts as verified.
    Raises:
      CheckpointError: `failed_saves` in a row have failed.
    """
    save, self._begun = self._begun, None
    if save is None:
      return
    try:
      if not save.fault:
        self._writer().wait()
    except Exception as error:
      save.fault = reason(error)
    fault, begun = first_fault(save.fault), time.perf_counter()
    verify = self._verify and not hurry
    if not fault and verify:
      try:
        self._read_back(save)
      except DamagedError as error:  # on all processes alike
        fault = str(error)
    if fault:
      self._failed(save.step, fault)
      return
    self._failures = 0
    if verify:
      self.verified.add(save.step)
      logger.info('checkpoint %d: verified in %.3f s', save.step, time.perf_counter() - begun)

  def save_last(self, step: int, state: dict[str, Any], meta: dict[str, Any], *, hurry: bool = False) -> None:
    """Saves, and returns when the checkpoint is on disk and read back; tries again while it may. Then deletes what need
    not stay.

    Args:
      hurry: nothing is read back or deleted: whoever restores it verifies it.
    Raises:
      CheckpointError: `failed_saves` in a row have failed.
    """
    saved = False
    while not saved:
      self.save(step, state, meta, hurry=hurry)
      self.wait(hurry=hurry)
      saved = not self._failures
    for old in () if hurry else self._superfluous(self.steps):
      self._writer().delete(old)

  def move_aside(self, steps: list[int]) -> list[str]:
    """Renames their directories to `damaged-STEP`, out of the way of later saves; the new names."""
    names = []
    for step in steps:
      name = f'{MOVED}{step}'
      while (self.directory / name).exists():
        name += '-again'
      names.append(name)
    meet('names of damaged checkpoints')
    if is_writer():
      for step, name in zip(steps, names, strict=True):
        (self.directory / str(step)).rename(self.directory / name)
    meet('damaged checkpoints moved')
    self.close()
    return names

  def warn(self, note: str) -> None:
    self.notes.append(note)
    logger.warning('%s', note)
    if is_writer():
      print(f'warning: {note}', file=sys.stderr, flush=True)

  def close(self) -> None:
    """Waits for what is being written. What fails then is told, and not raised: `wait` is for who wants to know."""
    checkpointer, self._checkpointer = self._checkpointer, None
    if checkpointer is None:
      return
    try:
      checkpointer.close()
    except Exception as error:
      logger.warning('%s: while it was closed: %s', self.directory, reason(error))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _writer(self) -> ocp.training.Checkpointer:
    """Made when it is needed: it lists the directory once and for all."""
    if self._checkpointer is None:
      self._checkpointer = ocp.training.Checkpointer(
        self.directory,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=_Preserved(self),
        cleanup_tmp_directories=self._keep is not None,
      )
    return self._checkpointer

  def _read_back(self, save: _Save) -> None:
    """A few leaves at a time, in their own shardings."""
    if self._record(save.step).checksum(save.step) != save.record.checksum(save.step):
      raise DamagedError(f'{self.directory}/{save.step} is damaged: its metadata are not what was saved')
    for paths in _groups(save.abstract):
      self._read(save.step, only(save.abstract, paths), save.record, partial=True)

  def _failed(self, step: int, fault: str) -> None:
    self._failures += 1
    self.close()  # a new writer knows nothing of it
    there = as_first([step in self.steps])[0]
    aside = f'; moved aside: {self.move_aside([step])[0]}' if there else ''
    self.warn(f'{self.directory}/{step} was not saved ({self._failures} of {self._limit} in a row): {fault}{aside}')
    if self._failures >= self._limit:
      raise CheckpointError(
        f'{self.directory}: {self._failures} saves in a row failed, the last one of step {step}: {fault}'
      )

  def _superfluous(self, steps: Sequence[int]) -> list[int]:
    stay = preserved(steps, self._keep, self.verified if self._verify else None)
    return [step for step, kept in zip(steps, stay, strict=True) if not kept]


@dataclasses.dataclass(frozen=True)
class _Preserved:
  """What Orbax asks when a save has begun; it deletes when the save has ended well."""

  checkpoints: Checkpoints

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: ocp.training.preservation_policies.PreservationContext
  ) -> Sequence[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    superfluous = self.checkpoints._superfluous(steps)
    return [step not in superfluous for step in steps]


def _abstract(state: Any) -> Any:
  """Arrays of NumPy are read back to a device of this process."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', here)), state)


def _groups(abstract: Any) -> Iterator[set[str]]:
  """Paths of leaves that are together no more than `_TOGETHER`, or of one."""
  group, size = set(), 0
  for path, leaf in by_path(abstract).items():
    nbytes = leaf.size * leaf.dtype.itemsize
    if group and size + nbytes > _TOGETHER:
      yield group
      group, size = set(), 0
    group.add(path)
    size += nbytes
  if group:
    yield group

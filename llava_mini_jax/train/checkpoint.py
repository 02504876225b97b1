"""Checkpoints on disk, through Orbax v1; the only file that knows Orbax.

A checkpoint holds the training state (step, parameters, optimizer) and a JSON
`meta`: the data position and the experiment's config. Restoring goes straight
to the shardings of the mesh at hand, whichever mesh wrote it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llava_mini_jax.train.errors import CheckpointError, mismatches
from llava_mini_jax.train.tree import flatten, unflatten

_POLICY = ocp.training.save_decision_policies
_KEEP = ocp.training.preservation_policies


class Checkpoints:
  """The checkpoints of one run.

  Args:
    keep: for the run that writes them: how many of the newest stay; unfinished saves of a killed run are cleared away.
      None = a reader, which deletes nothing.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int | None = None):
    self.directory = Path(directory).absolute()
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      save_decision_policy=_POLICY.FixedIntervalPolicy(1),
      preservation_policy=_KEEP.LatestN(keep),
      cleanup_tmp_directories=keep is not None,
    )

  @property
  def latest_step(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes in the background; the state may be donated at once."""
    self._checkpointer.save_checkpointables_async(step, {'state': state}, custom_metadata=meta)

  def restore(self, abstract: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state, in the shardings of `abstract`, and the meta.

    Raises:
      CheckpointError: no such step, a damaged one, or leaves that are missing, unexpected, misshaped or of another
        dtype.
    """
    step = self.require(step)
    meta = self.meta(step)
    with self._naming(step):
      self._compare(abstract, step)
      return self._checkpointer.load_checkpointables(step, {'state': abstract})['state'], meta

  def stored_parameters(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that is there, trained or frozen, by path; reads none of them.

    Raises:
      CheckpointError: no such step, or a damaged one.
    """
    step = self.require(step)
    with self._naming(step):
      parts = self._parts(step)
    return {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for part in parts.values() for p, x in part.items()}

  def restore_parameters(
    self, shardings: Mapping[str, jax.sharding.Sharding], step: int | None = None
  ) -> dict[str, jax.Array]:
    """Some parameters by path; what is not asked for is not read.

    Args:
      shardings: of the parameters wanted, by path.
    Raises:
      CheckpointError: no such step, a damaged one, or one without a parameter that is wanted.
    """
    step = self.require(step)
    with self._naming(step):
      abstract, there = {}, self._parts(step)
      for name, part in there.items():
        here = shardings.keys() & part.keys()
        wanted = {p: jax.ShapeDtypeStruct(part[p].shape, part[p].dtype, sharding=shardings[p]) for p in here}
        abstract |= {name: unflatten(wanted)} if wanted else {}
      if missing := sorted(shardings.keys() - {path for part in there.values() for path in part}):
        raise CheckpointError(f'{self.directory}/{step}: missing {missing}')
      if not abstract:
        return {}
      context = ocp.Context()
      context.pytree.loading.partial_load = True
      with context:
        loaded = ocp.load(self.directory / str(step), abstract, checkpointable_name='state')
    return {path: leaf for part in loaded.values() for path, leaf in flatten(part).items()}

  def _parts(self, step: int) -> dict[str, dict[str, Any]]:
    stored = self._checkpointer.checkpointables_metadata(step).metadata['state']
    return {name: flatten(stored[name]) for name in ('params', 'frozen') if name in stored}

  def meta(self, step: int | None = None) -> dict[str, Any]:
    """The meta alone. Raises CheckpointError if there is no such step, or its meta cannot be read."""
    step = self.require(step)
    with self._naming(step):
      meta = self._checkpointer.checkpointables_metadata(step).custom_metadata
    if not meta:  # Orbax only logs that the file is missing or broken
      raise CheckpointError(f'{self.directory}/{step} is damaged: its metadata is missing or cannot be parsed')
    return meta

  def wait(self) -> None:
    """Until everything is written; raises what a background write raised."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def require(self, step: int | None = None) -> int:
    """`step`, or the newest one. Raises CheckpointError if there is no such step."""
    steps = [c.step for c in self._checkpointer.checkpoints]
    if not steps or (step is not None and step not in steps):
      wanted = '' if step is None else f' of step {step}'
      raise CheckpointError(f'no checkpoint{wanted} in {self.directory} (steps there: {steps or "none"})')
    return steps[-1] if step is None else step

  @contextlib.contextmanager
  def _naming(self, step: int):
    """What Orbax raises of files that are missing or cut short says neither which checkpoint nor that it is damaged."""
    try:
      yield
    except (KeyError, TypeError, ValueError, OSError) as error:
      reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
      raise CheckpointError(f'{self.directory}/{step} is damaged: {reason}') from error

  def _compare(self, abstract: dict[str, Any], step: int) -> None:
    """Orbax casts dtypes silently and reports one kind of mismatch at a time; list them all."""
    stored = self._checkpointer.checkpointables_metadata(step).metadata['state']
    faults = mismatches(_described(abstract), _described(stored))
    if faults:
      raise CheckpointError(f'{self.directory}/{step} does not fit this run:\n  ' + '\n  '.join(faults))


def _described(tree: Any) -> dict[str, str]:
  """dtype[shape] of leaves by path; named tuples, lists and dicts look alike on disk."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(_key(entry) for entry in path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in flat}


def _key(entry: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)

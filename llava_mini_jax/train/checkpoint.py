"""Checkpoints on disk, through Orbax v1; the only file that knows Orbax.

A checkpoint holds the training state (step, parameters, optimizer) and a JSON
`meta`: the data position and the experiment's config. Restoring goes straight
to the shardings of the mesh at hand, whichever mesh wrote it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llava_mini_jax.train.errors import CheckpointError
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
    step = self._require(step)
    meta = self.meta(step)
    with self._naming(step):
      self._compare(abstract, step)
      return self._checkpointer.load_checkpointables(step, {'state': abstract})['state'], meta

  def restore_parameters(self, shardings: dict[str, Any], step: int | None = None) -> dict[str, Any]:
    """Only the parameters (trained and frozen, as one nested dict), for inference.

    Args:
      shardings: of every parameter, nested like them.
    Raises:
      CheckpointError: no such step, a damaged one, or other parameters than `shardings` names.
    """
    step = self._require(step)
    with self._naming(step):
      return self._restore_parameters(flatten(shardings), step)

  def _restore_parameters(self, where: dict[str, Any], step: int) -> dict[str, Any]:
    stored = self._checkpointer.checkpointables_metadata(step).metadata['state']
    parts = {part: flatten(stored[part]) for part in ('params', 'frozen')}
    found = {path for part in parts.values() for path in part}
    if found != set(where):
      raise CheckpointError(
        f'{self.directory}/{step}: missing {sorted(set(where) - found)}, unexpected {sorted(found - set(where))}'
      )
    abstract = {
      part: unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[path]) for path, leaf in leaves.items()}
      )
      for part, leaves in parts.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      loaded = ocp.load(self.directory / str(step), abstract, checkpointable_name='state')
    return unflatten(flatten(loaded['params']) | flatten(loaded['frozen']))

  def meta(self, step: int | None = None) -> dict[str, Any]:
    """The meta alone. Raises CheckpointError if there is no such step, or its meta cannot be read."""
    step = self._require(step)
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

  def _require(self, step: int | None) -> int:
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
    stored = _leaves(self._checkpointer.checkpointables_metadata(step).metadata['state'])
    wanted = _leaves(abstract)
    faults = [f'{path}: missing' for path in sorted(wanted.keys() - stored.keys())]
    faults += [f'{path}: unexpected' for path in sorted(stored.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & stored.keys()):
      expected, found = (f'{leaf.dtype}{list(leaf.shape)}' for leaf in (wanted[path], stored[path]))
      if expected != found:
        faults.append(f'{path}: expected {expected}, found {found}')
    if faults:
      raise CheckpointError(f'{self.directory}/{step} does not fit this run:\n  ' + '\n  '.join(faults))


def _leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path; named tuples, lists and dicts look alike on disk."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(_key(entry) for entry in path): leaf for path, leaf in flat}


def _key(entry: Any) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)

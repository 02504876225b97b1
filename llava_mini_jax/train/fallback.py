"""Which checkpoint a run goes on from: the newest that is whole, and never none because all are damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llava_mini_jax.distributed import as_first
from llava_mini_jax.train.checkpoint import MOVED, Checkpoints
from llava_mini_jax.train.errors import CheckpointError, DamagedError

T = TypeVar('T')


def newest_whole(checkpoints: Checkpoints, read: Callable[[int], T], *, fallback: bool = True) -> T | None:
  """What `read` gives of the newest checkpoint that is whole; None = the run has saved none yet.

  Damaged ones that are newer are warned of and moved aside. Every process of a run calls it; all go on from the same.

  Args:
    read: reads and verifies the checkpoint of a step; of a damaged one it raises DamagedError on every process.
    fallback: False = a damaged newest checkpoint ends the run.
  Raises:
    DamagedError: without fallback, that of the newest. CheckpointError: there is none that is whole; and what `read`
      raises besides.
  """
  steps, faults = as_first(checkpoints.steps), {}
  for step in reversed(steps):
    try:
      found = read(step)
    except DamagedError as error:
      if not fallback:
        raise
      faults[step] = str(error)
      continue
    if faults:
      names = checkpoints.move_aside(list(faults))
      for (damaged, fault), name in zip(faults.items(), names, strict=True):
        checkpoints.warn(f'{fault}; going on from step {step} instead of {damaged}; moved aside: {name}')
    return found
  if faults:
    lines = '\n  '.join(faults.values())
    raise CheckpointError(
      f'{checkpoints.directory}: no checkpoint is whole; the run does not start anew over them:\n  {lines}'
    )
  if aside := sorted(path.name for path in checkpoints.directory.glob(f'{MOVED}*')):
    raise CheckpointError(
      f'{checkpoints.directory}: expected a checkpoint that is whole; found damaged ones alone: {", ".join(aside)}; '
      'remove them to start anew'
    )
  return None

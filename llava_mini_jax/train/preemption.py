"""Whether the run is to end: SIGTERM, which schedulers send before they take a machine away.

JAX has a service for this (`multihost_utils.reached_preemption_sync_point`), which is not used: it takes the last
number that it was asked about for the step of the process, and Orbax asks it from the thread that ends a save, about a
step that is over (`CheckpointManager._finalize_checkpoint`). A signal that comes then is heard and never acted on.
"""

from __future__ import annotations

import signal
from types import FrameType

from llava_mini_jax.distributed import first_fault


class Preemption:
  """Inside, SIGTERM is noted and does nothing else. To be entered on the main thread."""

  def __init__(self):
    self._noted = False

  def __enter__(self) -> Preemption:
    self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._noted = True

  def reached(self) -> bool:
    """Whether any process of the run was told to end. All call it at the same steps, and wait for each other."""
    return bool(first_fault('SIGTERM' if self._noted else ''))

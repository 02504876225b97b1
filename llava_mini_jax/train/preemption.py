"""Whether the run is to end: SIGTERM, which schedulers send before they take a machine away.

JAX's preemption service hears the signal on any process, and lets all of them stop after the same step
(`jax.experimental.multihost_utils.reached_preemption_sync_point`). It runs where `distributed.processes` has started
`jax.distributed`, as `launch/train.py` does also for one process; elsewhere nothing changes what a signal does.
"""

from __future__ import annotations

from jax.experimental import multihost_utils


class Preemption:
  """To be asked by every process after each of its steps."""

  def __init__(self):
    # Calls, not steps of the run: the service counts from 0, and stops one after the last count that it knows.
    self._calls = 0

  def reached(self) -> bool:
    """Whether this step is the one after which all processes end; True once."""
    self._calls += 1
    return multihost_utils.reached_preemption_sync_point(self._calls)

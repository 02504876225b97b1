"""recorded_run.py whose batches have a pixel that is not a number in some steps, on one process.

python tests/faulty_run.py RECORD.jsonl ARGUMENTS...

Its rows are of process 1 where there are two; one process alone poisons the same row of the batch.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np

from llava_mini_jax.train import loop

ROWS, FAULTS = 8, {1: np.nan, 3: np.inf, 8: np.nan}  # of a batch; by step
SECOND = 1  # row i of the global batch belongs to process i % count


class Faulty:
  """An iterator of batches with faults, by the number of the batch in the stream. drop: leaves these batches out."""

  def __init__(self, iterator, faults: dict[int, float], drop: bool = False):
    self._iterator, self._faults, self._drop = iterator, faults, drop
    self.get_state, self.set_state, self.close = iterator.get_state, iterator.set_state, iterator.close

  def __next__(self):
    arrays = dict(next(self._iterator))
    fault = self._faults.get(self.get_state()['global_next_index'] // ROWS)
    if fault is not None and self._drop:
      return next(self)
    arrays['pixels'] = arrays['pixels'].astype(np.float32) / 127.5 - 1
    share = ROWS // len(arrays['pixels'])
    if fault is not None and (share == 1 or jax.process_index() == SECOND % share):
      arrays['pixels'][SECOND // share, 0, 0, 3, 2, 1] = fault
    return arrays


if __name__ == '__main__':
  device_batches = loop.device_batches
  loop.device_batches = lambda iterator, sharding: device_batches(Faulty(iterator, FAULTS), sharding)
  runpy.run_path(str(Path(__file__).with_name('recorded_run.py')), run_name='__main__')

"""launch/train.py that also writes down which rows this process gave to each batch.

python tests/recorded_run.py RECORD.jsonl ARGUMENTS...

A line per batch prepared: a list with the hash of every row's tokens and pixels.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path

from llava_mini_jax.train import loop


class Recorded:
  """An iterator of batches that writes its rows down."""

  def __init__(self, iterator, record: Path):
    self._iterator, self._record = iterator, record
    self.get_state, self.set_state, self.close = iterator.get_state, iterator.set_state, iterator.close

  def __next__(self):
    arrays = next(self._iterator)
    rows = zip(arrays['tokens'], arrays['pixels'], strict=True)
    with self._record.open('a') as file:
      hashes = [hashlib.sha256(tokens.tobytes() + pixels.tobytes()).hexdigest()[:16] for tokens, pixels in rows]
      file.write(json.dumps(hashes) + '\n')
    return arrays


if __name__ == '__main__':
  record, device_batches = Path(sys.argv.pop(1)), loop.device_batches
  loop.device_batches = lambda iterator, sharding: device_batches(Recorded(iterator, record), sharding)
  sys.argv[0] = str(Path(__file__).parents[1] / 'launch' / 'train.py')
  runpy.run_path(sys.argv[0], run_name='__main__')

"""launch/evaluate.py that also writes down which questions this process read in order to ask them.

python tests/recorded_evaluation.py RECORD.json ARGUMENTS...
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from llava_mini_jax.evaluate import run

if __name__ == '__main__':
  record, question, gathered, read = Path(sys.argv.pop(1)), run._question, run._gathered, []

  def recorded(records, index, *rest):
    read.append(index)
    return question(records, index, *rest)

  def write(own):
    record.write_text(json.dumps(read))
    return gathered(own)

  run._question, run._gathered = recorded, write
  sys.argv[0] = str(Path(__file__).parents[1] / 'launch' / 'evaluate.py')
  runpy.run_path(sys.argv[0], run_name='__main__')

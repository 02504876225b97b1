"""Two programs side by side, from the reports that compile_tpu.py wrote with --json=FILE.

python launch/compare_preflight.py first.json second.json
"""

import sys
from pathlib import Path

from llava_mini_jax.analyze.preflight_report import compare
from llava_mini_jax.cli import launch
from llava_mini_jax.convert.tensor_files import read_json


def main(arguments) -> None:
  if len(arguments) != 3:
    sys.exit(f'error: expected two reports that --json of compile_tpu.py wrote; found {len(arguments) - 1}')
  print(compare(*(read_json(Path(file)) for file in arguments[1:])))


if __name__ == '__main__':
  launch(main, arguments=True)

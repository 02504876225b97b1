"""Two programs side by side, from the reports that compile_tpu.py wrote with --json=FILE.

python launch/compare_preflight.py first.json second.json
"""

import json
import sys
from pathlib import Path

from llava_mini_jax.analyze.preflight_report import compare
from llava_mini_jax.cli import launch
from llava_mini_jax.config import ConfigError


def _report(file: str) -> dict:
  try:
    report = json.loads(Path(file).read_text())
  except ValueError as error:
    raise ConfigError(f'{file}: expected a report; {error}') from error
  if not isinstance(report, dict):
    raise ConfigError(f'{file}: expected one report; found a {type(report).__name__}')
  return report


def main(arguments) -> None:
  if len(arguments) != 3:
    sys.exit(f'error: expected two reports that --json of compile_tpu.py wrote; found {len(arguments) - 1}')
  print(compare(*map(_report, arguments[1:])))


if __name__ == '__main__':
  launch(main, arguments=True)

"""What every launch script shares: bad input ends in one clear line and exit code 1, not in a traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.sharding import MeshError
from llava_mini_jax.train.errors import CheckpointError, TrainingError

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # on import it advises to install PyTorch

USER_ERRORS = (ConfigError, DataError, MeshError, CheckpointError, TrainingError)


def launch(main: Callable[[Sequence[str]], None], *, arguments: bool = False) -> None:
  """Parses flags and runs `main`; the user's mistakes are printed as one message, bugs keep their traceback.

  Args:
    arguments: whether the command takes words besides its flags.
  """

  def wrapped(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries announce every object they make
    if len(argv) > 1 and not arguments:
      sys.exit(f'error: unexpected argument(s): {" ".join(argv[1:])}')
    try:
      main(argv)
    except USER_ERRORS as error:
      sys.exit(f'error: {error}')
    except OSError as error:  # a file that is not there, no permission, a full disk
      sys.exit(f'error: {_one_line(str(error))}')

  app.run(wrapped, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  """Config files run, and overrides are looked up in them, while flags are parsed."""
  for argument in argv:
    name, _, value = argument.lstrip('-').partition('=')
    if name == 'config' and not os.path.isfile(file := value.split(':')[0]):
      sys.exit(f'error: --config: no such file: {file}')
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # a config is a program: it may fail in any way
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps what it catches
      error = error.args[0]
    sys.exit(f'error: {_one_line(str(error.args[0] if error.args else error)) or type(error).__name__}')


def _one_line(text: str) -> str:
  """A message without the traceback that it may quote; of that, only where it ended."""
  before, _, quoted = text.partition('Traceback (most recent call last):')
  last = quoted.strip().splitlines()[-1:]
  return ' '.join(' '.join([before, *(re.sub(r'^[\w.]*\.(?=\w+: )', '', line) for line in last)]).split())

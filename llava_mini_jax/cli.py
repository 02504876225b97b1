"""What every launch script shares: bad input ends in one clear line and exit code 1, not in a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from absl import logging

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.sharding import MeshError
from llava_mini_jax.train.checkpoint import CheckpointError

USER_ERRORS = (ConfigError, DataError, MeshError, CheckpointError)


def run(main: Callable[[Sequence[str]], None], *, arguments: bool = False) -> Callable[[Sequence[str]], None]:
  """Wraps an absl main: errors of the user's input are printed as one message; bugs keep their traceback.

  Args:
    arguments: whether the command takes words besides its flags.
  """

  @functools.wraps(main)
  def wrapped(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries announce every object they make
    if len(argv) > 1 and not arguments:
      sys.exit(f'error: unexpected argument(s): {" ".join(argv[1:])}')
    try:
      main(argv)
    except USER_ERRORS as error:
      sys.exit(f'error: {error}')

  return wrapped

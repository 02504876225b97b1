"""What every launch script shares: bad input ends in one clear line and exit code 1, not in a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from llava_mini_jax.compile_cache import use_compilation_cache
from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.distributed import HEARTBEAT, SINGLE, TIMEOUT, find_cluster, processes
from llava_mini_jax.sharding import MeshError
from llava_mini_jax.train.errors import CheckpointError, Preempted, TrainingError
from llava_mini_jax.train.quiet import quiet_orbax

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # on import it advises to install PyTorch

USER_ERRORS = (ConfigError, DataError, MeshError, CheckpointError, TrainingError)


def define_process_flags() -> None:
  """For scripts that run as several processes."""
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0; not needed on SLURM, GKE and TPU VMs.')
  flags.DEFINE_integer('num_processes', None, 'Processes of the run; 1 alone = look for no others.', lower_bound=1)
  flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.', lower_bound=0)
  flags.DEFINE_integer('start_timeout', TIMEOUT, 'Seconds that they wait for each other at the start.', lower_bound=1)
  flags.DEFINE_integer(
    'heartbeat_timeout', HEARTBEAT, 'Seconds without a sign of life after which one is dead.', lower_bound=1
  )


def launch(
  main: Callable[[Sequence[str]], None],
  *,
  arguments: bool = False,
  several: bool = False,
  keep: bool = True,
) -> None:
  """Parses flags and runs `main`; the user's mistakes are printed as one message, bugs keep their traceback. A run that
  was told to end and has saved (`Preempted`) ends with status 75, EX_TEMPFAIL of sysexits.h.

  Args:
    arguments: whether the command takes words besides its flags.
    several: whether it may be one of several processes; needs `define_process_flags`.
    keep: whether compiled programs are kept (`compile_cache`); not where compiling is what is looked at.
  """

  def wrapped(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries announce every object they make
    quiet_orbax()
    if len(argv) > 1 and not arguments:
      sys.exit(f'error: unexpected argument(s): {" ".join(argv[1:])}')
    f, status = flags.FLAGS, 0
    try:
      cluster, meeting = SINGLE, contextlib.nullcontext()
      if several:
        cluster = find_cluster(f.coordinator, f.num_processes, f.process_id)
        meeting = processes(cluster, timeout=f.start_timeout, heartbeat=f.heartbeat_timeout)
      with meeting:
        try:
          # CPUs of several processes are for tests: what was compiled for their devices is not tried for others.
          if keep and not (cluster.several and jax.default_backend() == 'cpu'):
            use_compilation_cache()
          main(argv)
        except Preempted as error:  # of all processes, which part in peace
          print(f'preempted: {error}', file=sys.stderr, flush=True)
          status = os.EX_TEMPFAIL
        except (*USER_ERRORS, OSError) as error:  # said before the end, for which processes wait for each other
          _fail(error)
    except ConfigError as error:
      _fail(error)
    return status

  app.run(wrapped, flags_parser=_parse)


def integers(flag: str, words: Sequence[str], *, positive: bool = False) -> tuple[int, ...]:
  """The values of a list flag. Raises ConfigError naming the flag and what was found."""
  try:
    values = tuple(map(int, words))
  except ValueError:
    values = None
  if values is None or (positive and any(value < 1 for value in values)):
    raise ConfigError(f'--{flag}: expected {"positive " * positive}integers; found {",".join(words)!r}')
  return values


def _fail(error: Exception) -> None:
  """OSError: a file that is not there, no permission, a full disk."""
  print(f'error: {_one_line(str(error)) if isinstance(error, OSError) else error}', file=sys.stderr, flush=True)
  sys.exit(1)


def _parse(argv: Sequence[str]) -> list[str]:
  """Config files run, and overrides are looked up in them, while flags are parsed."""
  for argument in argv:
    name, _, value = argument.lstrip('-').partition('=')
    if name == 'config' and value and not os.path.isfile(file := value.split(':')[0]):
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

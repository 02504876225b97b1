"""A log file per process: `workdir/logs/process_N.log`."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from llava_mini_jax.train.errors import Preempted

PACKAGE = logging.getLogger('llava_mini_jax')
_FORMAT = '%(asctime)s %(levelname)s %(name)s: %(message)s'


@contextlib.contextmanager
def run_log(workdir: Path) -> Iterator[logging.Logger]:
  """Inside, what this package logs from INFO on, and others from WARNING on, goes to this process's file; and why it
  ended, if by an exception. A run that is started again appends.
  """
  path = workdir / 'logs' / f'process_{jax.process_index()}.log'
  path.parent.mkdir(parents=True, exist_ok=True)
  handler = logging.FileHandler(path, encoding='utf-8')
  handler.setFormatter(logging.Formatter(_FORMAT))
  level, propagate = PACKAGE.level, PACKAGE.propagate
  PACKAGE.setLevel(logging.INFO)
  PACKAGE.propagate = False  # absl's handler would print all of it
  loggers = (PACKAGE, logging.getLogger())
  for logger in loggers:
    logger.addHandler(handler)
  try:
    devices = ', '.join(f'{d.device_kind} {d.id}' for d in jax.local_devices())
    PACKAGE.info(
      'process %d of %d on %s: jax %s; %s', jax.process_index(), jax.process_count(), socket.gethostname(),
      jax.__version__, devices,
    )  # fmt: skip
    yield PACKAGE
  except Preempted as error:
    PACKAGE.info('preempted: %s', error)
    raise
  except BaseException:
    PACKAGE.exception('ended early')
    raise
  finally:
    for logger in loggers:
      logger.removeHandler(handler)
    PACKAGE.setLevel(level)
    PACKAGE.propagate = propagate
    handler.close()

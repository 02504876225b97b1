"""One trainer per workdir: a second would clear away what the first is saving, and save what the first did not train.

The first process of a run holds an advisory lock on `WORKDIR/lock` for as long as it lives; the kernel takes it back
from one that is killed. Readers of the run do not ask for it. Between hosts it holds as far as the file system passes
locks on; where it knows none, the log says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_mini_jax.distributed import is_writer
from llava_mini_jax.train.errors import TrainingError

LOCK_NAME = 'lock'

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_trainer(workdir: Path) -> Iterator[None]:
  """Inside, no other run trains in `workdir`, which must exist. Every process of a run enters it.

  Raises:
    TrainingError: another does, on every process, with its host and process id.
  """
  with (workdir / LOCK_NAME).open('a+') as file:
    held = is_writer() and _take(file.fileno())
    if jax.process_count() > 1:
      held = bool(multihost_utils.broadcast_one_to_all(np.int32(held)))
    file.seek(0)
    if not held:
      raise TrainingError(f'{workdir}: expected to be the only trainer there; found {file.read().strip() or "another"}')
    if is_writer():
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
      file.flush()
    yield


def _take(descriptor: int) -> bool:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    logger.warning('the file system knows no locks (%s): nothing keeps a second trainer away', error)
  return True

"""Several processes on one machine that are one run: started together, and killed one by one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tiny_run import REPOSITORY, environment


def start_processes(program: list, count: int, devices: int, *, log: Path | None = None) -> list[subprocess.Popen]:
  """Starts a Python program as so many processes of so many emulated devices each.

  Args:
    program: its file and arguments, in which {process} is the number of the process.
    log: what process N prints is appended to `log`.N; None = it goes to a pipe.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  started = []
  for index in range(count):
    flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}', f'--process_id={index}']
    words = [str(word).format(process=index) for word in program] + (flags if count > 1 else [])
    out = Path(f'{log}.{index}').open('a') if log else subprocess.PIPE  # noqa: SIM115  the child's from now on
    started.append(
      subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(devices),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that it can be killed with its workers
      )
    )
    if log:
      out.close()
  return started

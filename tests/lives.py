"""A run that is started over and over, on some processes, and what each of its lives did.

A life is tests/recorded_run.py, which writes down the rows of every batch besides.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from processes import start_processes

from llava_mini_jax.train.metrics import LOG_NAME

EXACT = ('step', 'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate')
PREEMPTED = 75  # EX_TEMPFAIL


@dataclasses.dataclass
class Life:
  run: Run
  number: int
  processes: list[subprocess.Popen]

  @property
  def stem(self) -> str:
    return f'{self.run.workdir}.life{self.number}'

  @property
  def printed(self) -> str:
    return '\n'.join(Path(f'{self.stem}.log.{i}').read_text() for i in range(len(self.processes)))

  @property
  def first_step(self) -> int:
    """The one that it went on from."""
    return int(re.search(r'; steps ([\d,]+) to', self.printed)[1].replace(',', ''))

  def samples(self, process: int = 0) -> dict[int, list[str]]:
    """Hashes of the rows that a process gave, by step; a few more than were trained on."""
    path = Path(f'{self.stem}.{process}.jsonl')
    if not path.exists():  # it died before its first batch
      return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]
    return {self.first_step + 1 + i: json.loads(line) for i, line in enumerate(lines)}

  def until(self, what: Callable[[], bool]) -> None:
    while not what():
      if any(process.poll() is not None for process in self.processes):
        self.kill()
        raise AssertionError(self.printed)
      time.sleep(0.002)

  def statuses(self, within: float = 900) -> list[int]:
    """How each of them ended."""
    end = time.monotonic() + within
    try:
      return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
    finally:
      self.kill()

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()


class Run:
  def __init__(self, dataset: Path, workdir: Path, *flags: str, processes: int = 1, devices: int = 1):
    self.dataset, self.workdir, self.flags = dataset, workdir, flags
    self.layout = dict(count=processes, devices=devices)
    self.lives: list[Life] = []

  def start(self, *flags: str, processes: int | None = None, devices: int | None = None) -> Life:
    layout = dict(count=processes or self.layout['count'], devices=devices or self.layout['devices'])
    life = Life(self, len(self.lives), [])
    program = [
      'tests/recorded_run.py',
      f'{life.stem}.{{process}}.jsonl',
      f'--config=tests/tiny_run.py:{self.dataset}',
      f'--workdir={self.workdir}',
      *self.flags,
      *flags,
    ]
    life.processes = start_processes(program, log=Path(f'{life.stem}.log'), **layout)
    self.lives.append(life)
    return life

  def finish(self, *flags: str, **layout: int) -> Life:
    life = self.start(*flags, **layout)
    assert life.statuses() == [0] * len(life.processes), life.printed
    return life

  @property
  def curve(self) -> list[dict[str, str]]:
    """Every number as a hexadecimal float."""
    if not (self.workdir / LOG_NAME).exists():
      return []
    lines = (self.workdir / LOG_NAME).read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith('\n')]
    return [{name: float(row[name]).hex() for name in EXACT} for row in rows]

  @property
  def logged(self) -> int:
    path = self.workdir / LOG_NAME
    return path.read_bytes().count(b'\n') if path.exists() else 0

  def checkpoints(self, pattern: str = '*') -> list[str]:
    return sorted(path.name for path in (self.workdir / 'checkpoints').glob(pattern))

  @property
  def newest(self) -> int:
    return max((int(name) for name in self.checkpoints() if name.isdigit()), default=0)

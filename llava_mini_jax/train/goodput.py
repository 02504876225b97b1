"""Where the wall time of a run went, over all its processes' lives: a ledger in the workdir, and what adds up from it.

Enters: the clock, at every change of what is done, and what JAX says of compiling. Leaves: `goodput.jsonl`, a line at
the start of each life of the run and one whenever metrics are fetched, so that a kill loses no more than what was
computed since; and totals. Every moment belongs to one category, so they add up to the wall time:

  start     imports, inputs, opening what is there
  restore   the state to begin with: drawn, imported or read from a checkpoint
  compile   tracing, lowering and compiling, wherever it happens
  data      waiting for a batch; devices may be computing meanwhile, so input costs at most this
  step      everything else between two batches: devices are only waited for where metrics are fetched
  save      waiting for a checkpoint, at the start of a save and at the end of the run
  lost      `step` and `data` of steps that a later life did again
  down      from the last line of a life to the start of the next
  other     the rest

Only the first process keeps the ledger; the others compute the same steps at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

LEDGER_NAME = 'goodput.jsonl'
CATEGORIES = ('start', 'restore', 'compile', 'data', 'step', 'save', 'lost', 'down', 'other')
_REDONE = ('step', 'data')
_COMPILING = '/jax/core/compile/'  # trace, lowering and compilation report their durations under it


def process_age() -> float:
  """Seconds since this process began, imports and all; 0 where Linux does not say."""
  try:
    started = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
  except OSError:
    return 0.0
  return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf('SC_CLK_TCK')


class Goodput:
  """The clock of one life of a run; to be closed.

  Args:
    began: `time.perf_counter()` when the life began, in `start`.
  """

  def __init__(self, began: float):
    self._seconds = dict.fromkeys(CATEGORIES, 0.0)
    self._now, self._since = 'start', began
    self._began = time.time() - (time.perf_counter() - began)
    self._spans: list[tuple[float, float]] = []  # of compilation, disjoint: what is nested counts once
    self._thread = threading.get_ident()
    self._path: Path | None = None
    self._before = dict.fromkeys(CATEGORIES, 0.0)
    jax.monitoring.register_event_duration_secs_listener(self._compiled)

  def close(self) -> None:
    """Hears no more of what is compiled."""
    jax.monitoring.unregister_event_duration_listener(self._compiled)

  @contextlib.contextmanager
  def of(self, category: str) -> Iterator[None]:
    """Inside, time is of this category; it may be entered inside another."""
    before = self.switch(category)
    try:
      yield
    finally:
      self.switch(before)

  def switch(self, category: str) -> str:
    """From now on, time is of this category. Returns the one before."""
    now, before = time.perf_counter(), self._now
    self._seconds[before] += now - self._since
    self._now, self._since = category, now
    return before

  def seconds(self, category: str) -> float:
    """Of a category that is not the present one, since the last line."""
    return self._seconds[category]

  def _compiled(self, event: str, seconds: float, **_: Any) -> None:
    if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
      return
    end = time.perf_counter()
    begin, inner = end - seconds, 0.0
    while self._spans and self._spans[-1][0] >= begin:  # an outer one ends last
      inner += self._spans[-1][1] - self._spans.pop()[0]
    self._spans.append((begin, end))
    self._seconds['compile'] += seconds - inner
    self._seconds[self._now] -= seconds - inner

  def open(self, workdir: Path, step: int) -> None:
    """Goes on with the ledger of a run that goes on from this step; until then nothing is written."""
    self._path = workdir / LEDGER_NAME
    lines = [*read_ledger(self._path), dict(start=step, at=self._began)]
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    os.replace(temporary, self._path)  # without a last line that a kill cut short
    self._before = totals(lines)

  def write(self, step: int) -> dict[str, float]:
    """A line with the seconds since the last one, if there is a ledger. Returns the totals of all lives until now."""
    self.switch(self._now)
    self._before = {name: value + self._seconds[name] for name, value in self._before.items()}
    if self._path is not None:
      seconds = {name: value for name, value in self._seconds.items() if value}
      with self._path.open('a') as file:
        file.write(json.dumps(dict(step=step, at=time.time(), seconds=seconds)) + '\n')
    self._seconds, self._spans = dict.fromkeys(CATEGORIES, 0.0), []
    return self._before


def read_ledger(path: Path) -> list[dict[str, Any]]:
  """Its lines; a last one that a kill cut short is left out. [] if there is none."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]


def totals(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Seconds by category.

  Args:
    lines: of a ledger: {start: step it goes on from, at: time} and {step: steps done, at: time, seconds: by category}.
  """
  kept: list[tuple[int, dict[str, float]]] = []
  found, last = dict.fromkeys(CATEGORIES, 0.0), None
  for line in lines:
    if 'start' not in line:
      kept.append((line['step'], dict(line['seconds'])))
    elif last is not None:
      found['down'] += max(0.0, line['at'] - last)
      for step, seconds in kept:
        if step > line['start']:
          found['lost'] += sum(seconds.pop(name, 0.0) for name in _REDONE)
    last = line['at']
  for _, seconds in kept:
    for name, value in seconds.items():
      found[name] += value
  return found


def shares(found: dict[str, float]) -> dict[str, float]:
  """Of the time that processes ran, so without `down`; that of `step` is the productive one."""
  ran = sum(found.values()) - found['down']
  return {name: value / ran if ran else 0.0 for name, value in found.items() if name != 'down'}


def describe(found: dict[str, float]) -> str:
  """The totals as a table."""
  share = shares(found)
  lines = [f'  {name:8}{found[name]:12,.1f} s {share[name]:7.1%}' for name in share if found[name] >= 0.05]
  down = f'; {found["down"]:,.1f} s between the lives of the run' if found['down'] else ''
  head = f'goodput {share["step"]:.1%} of {sum(found.values()) - found["down"]:,.1f} s{down}'
  return '\n'.join([head, *lines])

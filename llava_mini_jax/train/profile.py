"""An xprof trace of a few training steps.

Enters: `FIRST:END` and the steps of a run. Leaves: `workdir/profile`, which docs/profiling.md says how to read.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax.config import ConfigError

STEP_NAME = 'train'


def parse_steps(text: str) -> range | None:
  """`10:15` -> steps 10 to 14, as Python counts; '' -> None. Raises ConfigError if it is neither."""
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  steps = range(*map(int, match.groups())) if match else range(0)
  if not steps or steps.start < 1:
    raise ConfigError(f'profile_steps: expected FIRST:END with 1 <= FIRST < END; found {text!r}')
  return steps


class StepProfile:
  """Traces the steps of a range, between `step` and `done`; on None it does nothing.

  Args:
    start, total: the run does steps start + 1 to total; those up to `start` were traced, if at all, before a resume.
  Raises:
    ConfigError: the run ends before the last of them.
  """

  def __init__(self, workdir: Path, steps: range | None, *, start: int, total: int):
    if steps and steps.stop - 1 > total:
      raise ConfigError(f'profile_steps: expected some of steps 1 to {total}; found {steps.start}:{steps.stop}')
    self._steps = range(max(steps.start, start + 1), steps.stop) if steps else range(0)
    # Processes of one host would give their files the same name.
    own = f'process_{jax.process_index()}' if jax.process_count() > 1 else ''
    self._directory, self._running = workdir / 'profile' / own, False

  def step(self, step: int) -> contextlib.AbstractContextManager:
    """Around everything that belongs to a step."""
    if step not in self._steps:
      return contextlib.nullcontext()
    if step == self._steps.start:
      jax.profiler.start_trace(self._directory)
      self._running = True
    return jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=step)

  def done(self, step: int, outputs: Any) -> None:
    """After the step; `outputs` are what the trace of the last one waits for."""
    if self._running and step == self._steps[-1]:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    """Ends a trace that runs, as after an error."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

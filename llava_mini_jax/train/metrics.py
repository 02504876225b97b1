"""What a run leaves to look at: a line per step, TensorBoard files, a progress bar, a picture of the curves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import tqdm

LOG_NAME = 'metrics.jsonl'


class MetricsLog:
  """Writes metrics of a run under `workdir`. After a resume, steps past the checkpoint are dropped and redone.

  silent: writes and shows nothing, for all processes but the first.
  """

  def __init__(self, workdir: Path, *, start_step: int, total_steps: int, silent: bool = False):
    self._silent = silent
    if silent:
      return
    self._path = workdir / LOG_NAME
    truncate(self._path, start_step)
    self._file = self._path.open('a')
    import tensorboardX  # imports PyTorch where there is one: seconds, which only this process shall spend

    self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=start_step + 1)
    self._bar = tqdm.tqdm(total=total_steps, initial=start_step, unit='step', desc='train', dynamic_ncols=True)

  def write(self, step: int, values: dict[str, float]) -> None:
    """One finished step, counted from 1. What is not finite is null in the file, and not in TensorBoard."""
    if self._silent:
      return
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    line = {'step': step, **{name: finite.get(name) for name in values}}
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    for name, value in finite.items():
      self._board.add_scalar(f'train/{name}', value, step)
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix(loss=f'{values["loss"]:.3f}', acc=f'{values["accuracy"]:.3f}', refresh=False)

  def goodput(self, step: int, shares: dict[str, float]) -> None:
    """Where the time until this step went."""
    if self._silent:
      return
    for name, share in shares.items():
      self._board.add_scalar(f'goodput/{name}', share, step)

  def flush(self) -> None:
    if self._silent:
      return
    self._file.flush()
    self._bar.refresh()

  def close(self) -> None:
    if self._silent:
      return
    self._bar.close()
    self._file.close()
    self._board.close()

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def truncate(path: Path, steps: int) -> None:
  """Keeps the lines of the first `steps` steps; a last line cut short by a kill goes too."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines(keepends=True):
    if line.endswith('\n') and json.loads(line)['step'] <= steps:
      kept.append(line)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(kept))
  os.replace(temporary, path)

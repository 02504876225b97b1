"""The training curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

_PANELS = (('loss', 'loss', True), ('accuracy', 'token accuracy', False), ('learning_rate', 'learning rate', False))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Trailing mean over up to `window` values, NaN left out; NaN where there is no other."""
  there = np.isfinite(values)
  total, count = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(there, values, 0.0), there))
  end = np.arange(1, len(values) + 1)
  start = np.maximum(end - window, 0)
  number = count[end] - count[start]
  return np.divide(total[end] - total[start], number, out=np.full(len(values), np.nan), where=number > 0)


def training_curves(log: Path, out: Path) -> None:
  """`metrics.jsonl` -> PNG with loss, token accuracy, learning rate over steps. Nothing to draw is no picture."""
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  if not rows:
    return
  steps = np.array([row['step'] for row in rows])
  window = max(1, len(rows) // 50)
  figure = Figure(figsize=(13, 3.6), layout='constrained')
  axes = figure.subplots(1, len(_PANELS))
  for axis, (key, title, log_scale) in zip(axes, _PANELS, strict=True):
    values = np.array([row[key] for row in rows], float)  # null, of a number that was not finite, is NaN
    if window > 1 and key != 'learning_rate':
      axis.plot(steps, values, color='#b8c4d6', linewidth=0.8, label='each step')
      axis.plot(steps, smooth(values, window), color='#1f4e9c', linewidth=1.8, label=f'mean of {window}')
      axis.legend(frameon=False)
    else:
      axis.plot(steps, values, color='#1f4e9c', linewidth=1.8)
    if log_scale and (values[np.isfinite(values)] > 0).all():
      axis.set_yscale('log')
    axis.set_title(title)
    axis.set_xlabel('step')
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  figure.savefig(out, dpi=120)

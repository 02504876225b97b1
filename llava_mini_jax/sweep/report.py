"""Results of a sweep -> results.csv (a line per run), table.md (a line per point, beside the paper's) and plots.

Means over seeds are given with the standard deviation of the sample (n - 1); of one seed there is none.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llava_mini_jax.markdown import table
from llava_mini_jax.sweep.grid import Sweep

CSV, TABLE = 'results.csv', 'table.md'
_AXES = {  # file: (label, what of a result, logarithmic)
  'accuracy_by_layers.png': ('pre-fusion layers', lambda result: result['layers'], False),
  'accuracy_by_tokens.png': ('vision tokens', lambda result: result['cost']['tokens'], True),
  'accuracy_by_flops.png': ('FLOPs of an answer (every product)', lambda result: result['cost']['prompt_flops'], True),
}
_COLORS = ('#1f4e9c', '#e45756', '#54a24b', '#b279a2', '#f58518')

Result = Mapping[str, Any]


def write_report(sweep: Sweep, results: Sequence[Result], out: Path) -> list[Path]:
  """Writes what the results allow; returns the paths. Each file is replaced whole: several hosts may write them."""
  if not results:
    return []
  out.mkdir(parents=True, exist_ok=True)
  rows = [_flat(result) for result in results]
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with _replaced(out / CSV) as path, path.open('w', newline='') as file:
    writer = csv.DictWriter(file, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  with _replaced(out / TABLE) as path:
    path.write_text(markdown(sweep, results))
  for name, (label, value, log) in _AXES.items():
    with _replaced(out / name) as path:
      _plot(sweep, results, path, label, value, log)
  return [out / name for name in (CSV, TABLE, *_AXES)]


class _replaced:
  """A file beside `path`, of the same kind, that takes its place at the end."""

  def __init__(self, path: Path):
    self._path, self._part = path, path.with_name(f'.{os.getpid()}-{path.name}')

  def __enter__(self) -> Path:
    return self._part

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      os.replace(self._part, self._path)
    else:
      self._part.unlink(missing_ok=True)


def _flat(result: Result) -> dict[str, Any]:
  shares = {}
  for images in ('real', 'blank'):
    found = result[images]
    shares |= {f'{images}_questions': found['count'], f'{images}_accuracy': found['accuracy']}
    shares |= {f'{images}_accuracy_{name}'.replace(' ', '_'): value for name, value in found['by_category'].items()}
  return dict(
    point=result['point'],
    seed=result['seed'],
    prefusion_layers=result['layers'],
    **result['cost'],
    seconds=result['seconds'],
    **shares,
  )


def statistics(results: Sequence[Result], images: str = 'real', category: str = '') -> tuple[float, float | None]:
  """Mean over seeds, and standard deviation of the sample if there are several; of a category, or of all questions."""
  parts = (result[images] for result in results)
  values = np.array([part['by_category'][category] if category else part['accuracy'] for part in parts])
  return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def markdown(sweep: Sweep, results: Sequence[Result]) -> str:
  """A line per point that has results; percent."""
  groups = _by_point(sweep, results)
  categories = sorted({name for result in results for name in result['real']['by_category']})
  paper = list(dict.fromkeys(name for point in sweep.points for name in point.paper))
  head = ['point', 'layers', 'tokens', 'FLOPs', 'seeds', 'all', *categories, 'blank images']
  head += [f'paper: {name}' for name in paper]
  rows = []
  for point in sweep.points:
    if not (found := groups.get(point.name)):
      continue
    one = found[0]
    cells = [point.name, one['layers'], one['cost']['tokens'], f'{one["cost"]["prompt_flops"]:.3g}', len(found)]
    cells += [_percent(*statistics(found, 'real', name)) for name in ('', *categories)]
    cells += [_percent(*statistics(found, 'blank')), *(point.paper.get(name, '') for name in paper)]
    rows.append(cells)
  missing = len(sweep.points) * len(sweep.seeds) - len(results)
  said = f'{len(results)} runs; {missing} to come. ± is the standard deviation over seeds. FLOPs of one answer.'
  return '\n'.join([f'# {sweep.title}', '', *table(head, rows), '', said]) + '\n'


def _by_point(sweep: Sweep, results: Sequence[Result]) -> dict[str, list[Result]]:
  return {point.name: [r for r in results if r['point'] == point.name] for point in sweep.points}


def _percent(mean: float, deviation: float | None) -> str:
  return f'{100 * mean:.1f}' + (f' ± {100 * deviation:.1f}' if deviation is not None else '')


def _plot(sweep: Sweep, results: Sequence[Result], out: Path, label: str, value: Any, log: bool) -> None:
  groups = _by_point(sweep, results)
  figure = Figure(figsize=(6.4, 4.2), layout='constrained')
  axis = figure.subplots()
  for series, color in zip(
    dict.fromkeys(name for point in sweep.points for name in point.series), _COLORS * 9, strict=False
  ):
    found = [groups[point.name] for point in sweep.points if series in point.series and groups[point.name]]
    if not found:
      continue
    found.sort(key=lambda group: value(group[0]))
    x = [value(group[0]) for group in found]
    y, errors = zip(*(statistics(group) for group in found), strict=True)
    errors = [100 * (error or 0.0) for error in errors]
    line = '-' if len(set(x)) == len(x) else ''
    style = dict(marker='o', capsize=3, color=color, linestyle=line, label=series or None)
    axis.errorbar(x, 100 * np.array(y), yerr=errors, **style)
  blank, _ = statistics(results, 'blank')
  axis.axhline(100 * blank, color='#999999', linewidth=0.8, linestyle='--', label='blank images, mean of all')
  if log:
    axis.set_xscale('log')
  elif all(float(value(result)).is_integer() for result in results):
    axis.set_xticks(sorted({value(result) for result in results}))
  counts = sorted({len(group) for group in groups.values() if group})
  axis.set(xlabel=label, ylabel='exact match (%)')
  axis.set_title(f'{sweep.title}\nmean and standard deviation over {"–".join(map(str, counts))} seed(s)', fontsize=9)
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(frameon=False, fontsize=8)
  figure.savefig(out, dpi=120, format='png')

"""The paper's recipe on pods: every model and stage on every topology, one compilation at a time.

Cells are kept in a JSON file, so that a table that was interrupted goes on where it stopped. Leaves: a table in
Markdown, and a picture. Samples are the paper's: 558K captions once, 665K instructions twice. Each chip keeps what its
memory suggests (`REMAT`) and, where that does not fit, nothing.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from llava_mini_jax.analyze.topologies import GIB
from llava_mini_jax.markdown import table

MODELS = ('vicuna_7b', 'llama31_8b', 'vicuna_13b')
STAGES = ('stage2', 'stage1', 'stage2_hd', 'stage2_video')
TOPOLOGIES = ('v5e-64', 'v6e-64', 'v5p-64')
SAMPLES = dict(stage1=558_000, stage2=2 * 665_000)
REMAT = {'v5e-64': ('attention', 'full'), 'v6e-64': ('projections', 'full'), 'v5p-64': ('dots', 'full')}
PAPER_HOURS = 48, 8  # hours, A100s
_START, _END = '<!-- table -->', '<!-- end of table -->'


@dataclasses.dataclass(frozen=True)
class Cell:
  model: str
  stage: str
  topology: str

  @property
  def key(self) -> str:
    return f'{self.model} {self.stage} {self.topology}'

  def command(self, remat: str) -> list[str]:
    config = f'configs/llava_mini_{self.model}.py:{self.stage}'
    flags = [f'--config={config}', f'--topology={self.topology}', f'--config.model.scan.remat={remat}']
    return ['launch/compile_tpu.py', *flags]


def cells(models: Sequence[str], stages: Sequence[str], topologies: Sequence[str]) -> list[Cell]:
  """In the order in which they are worth having."""
  return [Cell(model, stage, where) for model in models for stage in stages for where in topologies]


def fill(file: Path, wanted: Sequence[Cell], extra: Sequence[str] = ()) -> Iterator[tuple[Cell, str]]:
  """Compiles the cells that a file lacks, each in a process of its own, and saves after each.

  Args:
    extra: further arguments of the command, for all cells.
  Yields:
    A cell, and 'kept', 'done' or what went wrong; one that went wrong is tried again next time.
  """
  for cell in wanted:
    table = read(file)
    if cell.key in table:
      yield cell, 'kept'
      continue
    for remat in REMAT.get(cell.topology, ('full',)):
      found, fault = _compiled([*cell.command(remat), *extra])
      if fault or found['fits']:
        break
    if fault:
      yield cell, fault
      continue
    table[cell.key] = {name: value for name, value in found.items() if name not in ('cost', 'collectives')}
    table[cell.key]['remat'] = remat
    file.write_text(json.dumps(table, indent=1) + '\n')
    yield cell, 'done'


def _compiled(command: Sequence[str]) -> tuple[dict[str, Any], str]:
  """A program's report, and '' or what went wrong."""
  with tempfile.TemporaryDirectory() as directory:
    report = Path(directory) / 'report.json'
    done = subprocess.run([sys.executable, *command, f'--json={report}'], capture_output=True, text=True)
    if done.returncode:
      return {}, (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
    return json.loads(report.read_text()), ''


def read(file: Path) -> dict[str, Any]:
  return json.loads(file.read_text()) if file.exists() else {}


def markdown(compiled: Mapping[str, Mapping[str, Any]]) -> str:
  """A row per cell, and per model and topology the hours of both stages."""
  compilers = sorted({', '.join(f'{n} {v}' for n, v in found['versions'].items()) for found in compiled.values()})
  count = f'{len(compiled)} of {len(cells(MODELS, STAGES, TOPOLOGIES))} cells, compiled with {"; ".join(compilers)}.'
  head = ['model', 'stage', 'chips', 'remat', 'GiB per chip', 'predicted ms (full overlap to none)', 'MFU']
  rows = []
  for key, found in _ordered(compiled):
    memory = f'{found["used"] / GIB:.1f} of {found["capacity"] / GIB:.1f}'
    if found['fits']:
      span = f'{found["seconds"] * 1e3:.0f} ({found["seconds_low"] * 1e3:.0f} to {found["seconds_high"] * 1e3:.0f})'
      samples = SAMPLES.get(key.split()[1], 0)
      hours = f'{samples / found["rows"] * found["seconds"] / 3600:.1f}' if samples else ''
      rest = [span, f'{found["mfu"]:.3f}', f'{found["rows_per_second_per_device"]:.2f}', hours]
    else:
      memory, rest = f'**{memory}**', [f'does not fit: {found["suggestion"]}', '', '', '']
    rows.append([*key.split(), found['remat'], memory, *rest])
  recipes = []
  for (model, where), spent in recipe_hours(compiled).items():
    hours = [spent[name] for name in ('seconds', 'seconds_low', 'seconds_high')]
    span = f'{hours[0]:.1f} ({hours[1]:.1f} to {hours[2]:.1f})'
    recipes.append([model, where, span, f'{spent["chip_hours"]:.0f}'])
  hours, chips = PAPER_HOURS
  recipes.append(['the paper, 7B', f'{chips} A100', hours, hours * chips])
  whole = ['model', 'chips', 'predicted hours, both stages (full overlap to none)', 'chip-hours']
  return '\n'.join([count, '', *table([*head, 'rows/s per chip', 'hours'], rows), '', *table(whole, recipes)])


def recipe_hours(compiled: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
  """Of both stages, by model and topology, where both have been compiled and fit: hours and chip-hours."""
  found = {}
  for model in MODELS:
    for where in TOPOLOGIES:
      stages = {stage: compiled.get(Cell(model, stage, where).key, {}) for stage in SAMPLES}
      if not all(stage.get('fits') for stage in stages.values()):
        continue
      hours = {
        name: sum(SAMPLES[stage] / of['rows'] * of[name] for stage, of in stages.items()) / 3600
        for name in ('seconds', 'seconds_low', 'seconds_high')
      }
      devices = next(iter(stages.values()))['devices']
      found[model, where] = hours | dict(chip_hours=hours['seconds'] * devices)
  return found


def insert(document: str, table: str) -> str:
  """The document with the table between its two marks. Raises ValueError if it has none."""
  before, start, rest = document.partition(_START)
  _, end, after = rest.partition(_END)
  if not (start and end):
    raise ValueError(f'expected the marks {_START} and {_END} in the document; found none')
  return f'{before}{start}\n\n{table}\n\n{end}{after}'


def picture(table: Mapping[str, Mapping[str, Any]], file: Path) -> None:
  """Time of a step with its range, and memory beside what a chip has, by model and stage; a colour per topology."""
  rows = [key for key, _ in _ordered(table)]
  labels = list(dict.fromkeys(' '.join(key.split()[:2]) for key in rows))
  places = [where for where in TOPOLOGIES if any(key.endswith(where) for key in rows)]
  figure = matplotlib.figure.Figure(figsize=(11, 1.5 + 0.5 * len(labels)), layout='constrained')
  time, memory = figure.subplots(1, 2, sharey=True)
  height = 0.8 / len(places)
  for i, where in enumerate(places):
    offset = (i - (len(places) - 1) / 2) * height
    shown = [(j + offset, table[f'{label} {where}']) for j, label in enumerate(labels) if f'{label} {where}' in table]
    at = [y for y, _ in shown]
    memory.barh(at, [f['used'] / GIB for _, f in shown], height, label=where, color=f'C{i}')
    memory.plot([f['capacity'] / GIB for _, f in shown], at, '|', color='black', markersize=9)
    for y, found in shown:
      if not found['fits']:
        time.annotate('does not fit', (0, y), (4, 0), textcoords='offset points', va='center', size=7, color=f'C{i}')
    fitting = [(y, f) for y, f in shown if f['fits']]
    seconds, low, high = ([f[name] for _, f in fitting] for name in ('seconds', 'seconds_low', 'seconds_high'))
    reach = [[s - x for s, x in zip(seconds, low, strict=True)], [x - s for s, x in zip(seconds, high, strict=True)]]
    error = dict(ecolor='0.3', capsize=2, elinewidth=1)
    time.barh([y for y, _ in fitting], seconds, height, xerr=reach, error_kw=error, label=where, color=f'C{i}')
  time.set_yticks(range(len(labels)), labels)
  time.invert_yaxis()
  time.set_xlabel('predicted seconds per step of 256 rows; range: full overlap to none')
  memory.set_xlabel('GiB per chip; mark: what a chip has')
  memory.set_xlim(left=0)
  figure.legend(*memory.get_legend_handles_labels(), loc='outside upper center', ncols=len(places))
  for axes in (time, memory):
    axes.grid(axis='x', alpha=0.3)
  figure.savefig(file, dpi=130)


def _ordered(table: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
  order = [cell.key for cell in cells(MODELS, ('stage1', 'stage2', 'stage2_hd', 'stage2_video'), TOPOLOGIES)]
  return [(key, table[key]) for key in order if key in table]

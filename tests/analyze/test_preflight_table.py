"""The table of stages on pods: what is compiled, kept and written."""

from __future__ import annotations

import json
import subprocess

import pytest
from PIL import Image

from llava_mini_jax.analyze import preflight_table
from llava_mini_jax.analyze.preflight_table import Cell, cells, fill, insert, markdown, picture, read, recipe_hours
from llava_mini_jax.analyze.topologies import GIB

VERSIONS = dict(jax='1.0')


def result(seconds: float = 1.0, fits: bool = True, **more) -> dict:
  found = dict(
    fits=fits, used=5 * GIB if fits else 20 * GIB, capacity=16 * GIB, rows=256, devices=64, versions=VERSIONS
  )
  if fits:
    found |= dict(seconds=seconds, seconds_low=seconds / 2, seconds_high=2 * seconds, mfu=0.5)
    found |= dict(rows_per_second_per_device=256 / seconds / 64)
  return found | dict(suggestion='' if fits else 'use more chips', remat='full') | more


@pytest.fixture
def compiler(monkeypatch) -> list[list[str]]:
  """Commands that were run; one for v6e fails, and v5p has no memory to keep products in."""
  commands = []

  def run(program, **_):
    commands.append(program[1:])
    (report,) = (a.removeprefix('--json=') for a in program if a.startswith('--json='))
    with open(report, 'w') as file:
      fits = '--config.model.scan.remat=dots' not in program
      json.dump(result(fits=fits, cost=dict(instructions=[]), collectives=[]), file)
    failed = '--topology=v6e-64' in program
    return subprocess.CompletedProcess(program, int(failed), '', 'Traceback\nerror: no such chip\n' if failed else '')

  monkeypatch.setattr(preflight_table.subprocess, 'run', run)
  return commands


def test_cells_are_compiled_once(compiler, tmp_path):
  file = tmp_path / 'table.json'
  wanted = cells(['vicuna_7b'], ['stage2', 'stage1'], ['v5e-64', 'v6e-64'])
  outcomes = [outcome for _, outcome in fill(file, wanted, ['--mesh=8,8,1'])]
  assert outcomes == ['done', 'error: no such chip'] * 2
  config = '--config=configs/llava_mini_vicuna_7b.py:stage2'
  assert [a for a in compiler[0] if 'json' not in a] == [
    'launch/compile_tpu.py', config, '--topology=v5e-64', '--config.model.scan.remat=attention', '--mesh=8,8,1',
  ]  # fmt: skip
  assert set(read(file)) == {'vicuna_7b stage2 v5e-64', 'vicuna_7b stage1 v5e-64'}
  assert read(file)['vicuna_7b stage1 v5e-64'] == result(remat='attention')  # the instructions left out
  again = [outcome for _, outcome in fill(file, wanted)]
  assert again == ['kept', 'error: no such chip'] * 2 and len(compiler) == 6


def test_a_chip_without_memory_for_it_computes_again(compiler, tmp_path):
  file = tmp_path / 'table.json'
  assert [outcome for _, outcome in fill(file, cells(['vicuna_7b'], ['stage2'], ['v5p-64']))] == ['done']
  assert [flag for command in compiler for flag in command if 'remat' in flag] == [
    '--config.model.scan.remat=dots', '--config.model.scan.remat=full',
  ]  # fmt: skip
  assert read(file) == {'vicuna_7b stage2 v5p-64': result(remat='full')}


def test_hours_of_the_recipe():
  table = {'vicuna_7b stage1 v5e-64': result(2.0), 'vicuna_7b stage2 v5e-64': result(3.0)}
  spent = recipe_hours(table | {'vicuna_7b stage2 v5p-64': result()})
  assert set(spent) == {('vicuna_7b', 'v5e-64')}  # v5p lacks a stage
  hours = (558_000 / 256 * 2 + 2 * 665_000 / 256 * 3) / 3600
  assert spent['vicuna_7b', 'v5e-64'] == pytest.approx(
    dict(seconds=hours, seconds_low=hours / 2, seconds_high=2 * hours, chip_hours=64 * hours)
  )
  assert not recipe_hours(table | {'vicuna_7b stage1 v5e-64': result(fits=False)})


def test_the_documents_table():
  table = {
    'vicuna_7b stage2 v5e-64': result(3.0),
    'vicuna_7b stage1 v5e-64': result(2.0),
    'vicuna_13b stage2 v5e-64': result(fits=False),
  }
  lines = markdown(table).splitlines()
  assert lines[0] == '3 of 36 cells, compiled with jax 1.0.'
  assert lines[4:7] == [
    '| vicuna_7b | stage1 | v5e-64 | full | 5.0 of 16.0 | 2000 (1000 to 4000) | 0.500 | 2.00 | 1.2 |',
    '| vicuna_7b | stage2 | v5e-64 | full | 5.0 of 16.0 | 3000 (1500 to 6000) | 0.500 | 1.33 | 4.3 |',
    '| vicuna_13b | stage2 | v5e-64 | full | **20.0 of 16.0** | does not fit: use more chips |  |  |  |',
  ]
  assert lines[-2:] == ['| vicuna_7b | v5e-64 | 5.5 (2.8 to 11.1) | 355 |', '| the paper, 7B | 8 A100 | 48 | 384 |']


def test_the_table_takes_its_place():
  document = 'before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n'
  new = insert(document, 'new')
  assert new == 'before\n<!-- table -->\n\nnew\n\n<!-- end of table -->\nafter\n' == insert(new, 'new')
  with pytest.raises(ValueError, match='^expected the marks <!-- table --> and <!-- end of table --> in the document'):
    insert('nothing', 'new')


def test_the_picture(tmp_path):
  table = {cell.key: result(1 + i) for i, cell in enumerate(cells(['vicuna_7b'], ['stage2', 'stage1'], ['v5e-64']))}
  picture(table | {Cell('vicuna_13b', 'stage2', 'v5p-64').key: result(fits=False)}, tmp_path / 'table.png')
  image = Image.open(tmp_path / 'table.png')
  assert image.width > 1000 and len(image.convert('RGB').getcolors(1 << 20)) > 50

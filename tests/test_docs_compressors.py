"""docs/compressors.md is true: its table is what is counted, and a compressor is added as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import REPOSITORY, make_dataset

from llava_mini_jax.analyze.compressor_table import rows

PAGE = (REPOSITORY / 'docs' / 'compressors.md').read_text(encoding='utf-8')
PACKAGE = 'llava_mini_jax'


def test_the_table_is_what_is_counted():
  assert [line for line in PAGE.splitlines() if line.startswith('| `')] == rows()


def edit(path: Path, old: str, new: str) -> None:
  text = path.read_text(encoding='utf-8')
  assert text.count(old) == 1, path
  path.write_text(text.replace(old, new), encoding='utf-8')


@pytest.fixture
def copy(tmp_path) -> Path:
  """The package with the page's compressor in it."""
  shutil.copytree(REPOSITORY / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('launch', 'tests'):
    shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', 'golden'))
  code = re.search(r'```python\n(.*?)```', PAGE, re.S).group(1)
  assert len(code.splitlines()) <= 60
  kinds = tmp_path / PACKAGE / 'models' / 'compressors'
  (kinds / 'max_pool.py').write_text(code, encoding='utf-8')
  line = f'from {PACKAGE}.models.compressors.mqt'
  edit(kinds / '__init__.py', line, f'from {PACKAGE}.models.compressors.max_pool import MaxCompressor\n{line}')
  row = re.search(r"`('max_pool': MaxCompressor,)`", PAGE).group(1)
  edit(kinds / '__init__.py', "  'query': QueryCompressor,\n", f"  'query': QueryCompressor,\n  {row}\n")
  edit(tmp_path / PACKAGE / 'config.py', "'voco', 'none')", "'voco', 'max_pool', 'none')")
  return tmp_path


def test_a_compressor_is_added_as_the_page_says(copy, tmp_path_factory):
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([str(copy), str(copy / 'tests')]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  workdir = '--workdir=runs/max_pool'
  changes = ('model.compressor.kind=max_pool', 'train.max_steps=2', 'train.mesh=(1, 1, 1)')
  changes = [f'--config.{change}' for change in changes]
  commands = (
    ('launch/train.py', f'--config=tests/tiny_run.py:{dataset}', workdir, *changes),
    ('launch/evaluate.py', workdir, f'--dataset={dataset}', '--split=train', '--limit=4'),
  )
  for command in commands:
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  assert 'real     images   exact match ' in done.stdout
  assert '"kind": "max_pool"' in (copy / 'runs' / 'max_pool' / 'config.json').read_text(encoding='utf-8')

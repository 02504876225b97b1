"""What the source may not hold: ways for data to become code, and downloads that nobody asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ('llava_mini_jax', 'launch', 'configs') for path in (ROOT / part).rglob('*.py'))
MODULES = {'pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal', 'requests'}
CALLS = {'eval', 'exec', 'os.system', 'os.popen', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'np.fromstring'}
TRUE_ONLY = {'torch.load': 'weights_only'}  # calls that need a keyword to be True
FALSE_ONLY = {'allow_pickle', 'shell', 'trust_remote_code'}  # keywords that may be given as False alone


def faults(source: str) -> Iterator[tuple[int, str]]:
  """(line, what) of everything forbidden."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      module = [node.module or ''] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
      yield from ((node.lineno, f'import {name}') for name in module if name.split('.')[0] in MODULES)
    if not isinstance(node, ast.Call):
      continue
    name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
      yield node.lineno, name
    if name in TRUE_ONLY and not _is(keywords.get(TRUE_ONLY[name]), True):
      yield node.lineno, f'{name} without {TRUE_ONLY[name]}=True'
    yield from ((node.lineno, f'{word}=') for word in FALSE_ONLY & keywords.keys() if not _is(keywords[word], False))


def _is(node: ast.expr | None, value: bool) -> bool:
  return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_data_does_not_become_code(path):
  assert list(faults(path.read_text(encoding='utf-8'))) == []


@pytest.mark.parametrize(
  ('source', 'what'),
  [
    ('import pickle', 'import pickle'),
    ('def f():\n  from pickle import loads', 'import pickle'),
    ('import os, dill.settings', 'import dill.settings'),
    ('eval("1")', 'eval'),
    ('exec(text)', 'exec'),
    ('yaml.load(text)', 'yaml.load'),
    ('os.system("ls")', 'os.system'),
    ('subprocess.run("ls", shell=True)', 'shell='),
    ('subprocess.run("ls", shell=flag)', 'shell='),
    ('np.load(file, allow_pickle=True)', 'allow_pickle='),
    ('AutoModel.from_pretrained(name, trust_remote_code=True)', 'trust_remote_code='),
    ('torch.load(file)', 'torch.load without weights_only=True'),
    ('torch.load(file, weights_only=False)', 'torch.load without weights_only=True'),
  ],
)
def test_each_fault_is_seen(source, what):
  assert [found for _, found in faults(source)] == [what]


@pytest.mark.parametrize(
  'source',
  ['model.eval()', 'np.load(file, allow_pickle=False)', 'torch.load(file, weights_only=True)', 'yaml.safe_load(text)'],
)
def test_what_is_allowed(source):
  assert list(faults(source)) == []


def test_the_files_are_found():
  assert len(FILES) > 60 and ROOT / 'llava_mini_jax' / 'convert' / 'tensor_files.py' in FILES

"""launch/prepare_data.py as its user meets it: what is written, what is said, and how it fails."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.prepare import describe, prepare
from llava_mini_jax.data.records import open_split
from llava_mini_jax.data.tokenizer import fingerprint, load_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
  out = io.BytesIO()
  Image.new('RGB', (8, 8), 'red').save(out, 'PNG')
  (tmp_path / 'images').mkdir()
  (tmp_path / 'images' / 'a.png').write_bytes(out.getvalue())
  return tmp_path / 'images'


def annotate(path: Path, count: int, bad: int = 0) -> Path:
  """`count` good samples followed by `bad` ones that lack their tag."""
  samples = [
    {
      'id': f'{i}',
      'image': 'a.png',
      'conversations': [
        {'from': 'human', 'value': '<image>\nwhat colour?' if i < count else 'what colour?'},
        {'from': 'gpt', 'value': 'red'},
      ],
    }
    for i in range(count + bad)
  ]
  path.write_text(json.dumps(samples))
  return path


def command(*arguments) -> subprocess.CompletedProcess:
  program = [sys.executable, REPOSITORY / 'launch' / 'prepare_data.py', *map(str, arguments)]
  environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
  return subprocess.run(program, env=environment, capture_output=True, text=True)


def test_two_files_become_two_splits(tmp_path, root):
  files = [annotate(tmp_path / 'a.json', 5), annotate(tmp_path / 'b.json', 2)]
  seen = []

  def progress(records, split):
    for record in records:
      seen.append((split, record['id']))
      yield record

  summary = prepare(
    list(map(str, files)), tmp_path / 'out', splits=['train', 'val'], media_roots=[root], progress=progress
  )
  assert {name: split['records'] for name, split in summary['splits'].items()} == {'train': 5, 'val': 2}
  assert summary == json.loads((tmp_path / 'out' / 'summary.json').read_text())
  assert len(open_split(tmp_path / 'out', 'train')) == 5
  assert seen == [('train', str(i)) for i in range(5)] + [('val', '0'), ('val', '1')]
  tokenizer = load_tokenizer(tmp_path / 'out' / 'tokenizer')
  assert summary['tokenizer'] == {'size': len(tokenizer), 'sha256': fingerprint(tokenizer)}
  assert describe(summary).splitlines() == [
    f'train: 5 records from {files[0]}, 0 refused',
    f'val: 2 records from {files[1]}, 0 refused',
    f'tokenizer: {len(tokenizer)} tokens',
  ]


def test_refusals_fail_the_whole_unless_allowed(tmp_path, root):
  file = annotate(tmp_path / 'a.json', 75, bad=25)
  with pytest.raises(DataError) as error:
    prepare([str(file)], tmp_path / 'out', media_roots=[root])
  lines = str(error.value).splitlines()
  assert lines[0] == f'E_REFUSED: {file}: 25 of 100 sample(s) refused, allowed are 0.00% (--max_refused):'
  assert lines[1] == (
    f"  E_IMAGE_TAGS: {file}: record 75: sample '75': found 0 <image> tag(s), expected 1 for its image(s)"
  )
  assert (len(lines), lines[-1]) == (22, '  and 5 more')
  assert sorted(os.listdir(tmp_path)) == ['a.json', 'images']
  with pytest.raises(DataError, match='allowed are 24.00%'):
    prepare([str(file)], tmp_path / 'out', media_roots=[root], max_refused=0.24)

  summary = prepare([str(file)], tmp_path / 'out', media_roots=[root], max_refused=0.25)
  assert summary['splits']['train'] == {'records': 75, 'refused': 25, 'source': str(file)}
  assert [entry['code'] for entry in summary['refused']] == ['E_IMAGE_TAGS'] * 25
  assert describe(summary).splitlines()[1] == lines[1]


def test_the_tokenizer_can_be_left_out(tmp_path, root):
  file = annotate(tmp_path / 'a.json', 2)
  summary = prepare([str(file)], tmp_path / 'out', media_roots=[root], tokenizer_vocab_size=0)
  assert summary['tokenizer'] is None
  assert not (tmp_path / 'out' / 'tokenizer').exists()


@pytest.mark.parametrize(
  ('files', 'splits', 'message'),
  [
    (['a.json'], [], 'split: expected a name of its own for each of 1 source(s); found '),
    (['a.json', 'b.json'], ['x', 'x'], 'split: expected a name of its own for each of 2 source(s); found x, x'),
    (['easy_vqa', 'b.json'], ['x', 'y'], 'source: easy_vqa brings its own splits and cannot be joined with 1 more'),
  ],
)
def test_sources_and_splits_pair(tmp_path, files, splits, message):
  with pytest.raises(ConfigError) as error:
    prepare(files, tmp_path / 'out', splits=splits)
  assert str(error.value) == message
  assert os.listdir(tmp_path) == []


def test_command(tmp_path, root):
  file = annotate(tmp_path / 'a.json', 3)
  done = command(f'--source={file}', f'--media_root={root}', f'--out={tmp_path / "out"}', '--tokenizer_vocab_size=300')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[0] == f'train: 3 records from {file}, 0 refused'
  assert done.stdout.splitlines()[-1] == f'written to {tmp_path / "out"}'
  assert '3 records' in done.stderr  # the progress bar


def test_command_on_bad_input(tmp_path):
  (tmp_path / 'a.json').write_text('[{"id": 1,}]')
  done = command(f'--source={tmp_path / "a.json"}', f'--out={tmp_path / "out"}')
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  place = re.escape(f'error: E_JSON: {tmp_path}/a.json:1:')  # the column is that of the comma or of the brace
  assert re.match(place + r'1[01]: malformed JSON: ', done.stderr.splitlines()[-1])
  assert os.listdir(tmp_path) == ['a.json']

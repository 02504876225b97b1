"""Apache Beam prepares what one process prepares: the same records in the same order, and the same refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import beam_prepare
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.records import open_split

LOCAL = ['--runner=DirectRunner']


@pytest.fixture
def small_blocks(monkeypatch):
  pytest.importorskip('apache_beam')
  monkeypatch.setattr(beam_prepare, '_BLOCK', 3)


@pytest.fixture
def root(tmp_path) -> Path:
  for i in range(4):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f'{i}.png')
  (tmp_path / 'broken.png').write_bytes((tmp_path / '0.png').read_bytes()[:60])
  return tmp_path


def sample(name, image='0.png', text='<image> what?') -> dict:
  turns = [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': f'it is {name}'}]
  return dict(id=name, image=image, conversations=turns)


def annotate(root: Path) -> list[str]:
  """A JSON and a JSONL file with faults of every kind, and ids that come again: of good samples and of bad ones."""
  samples = [sample(str(i), f'{i % 4}.png') for i in range(20)]
  samples[4] = sample('4', 'broken.png')
  samples[7] = sample('7', 'none.png')
  samples[9] = sample('2')
  samples[12] = sample('4')  # the first good one of that id
  samples[15] = sample('2', text='no tag')
  samples[18] = sample('2', '1.png')
  (root / 'a.json').write_text(json.dumps(samples))
  lines = [json.dumps(sample(f'b{i}')) for i in range(5)]
  (root / 'b.jsonl').write_text('\n'.join([*lines[:2], '{"id": ', *lines[2:]]))
  return [str(root / 'a.json'), str(root / 'b.jsonl')]


@pytest.mark.parametrize('number_duplicates', [False, True])
def test_the_dataset_is_that_of_one_process(root, small_blocks, number_duplicates):
  options = dict(splits=['train', 'val'], media_roots=[root], max_refused=0.5, number_duplicates=number_duplicates)
  files = annotate(root)
  expected = prepare(files, root / 'one', **options)
  found = prepare(files, root / 'beam', beam=LOCAL, **options)
  assert found == expected
  assert json.loads((root / 'beam' / 'summary.json').read_text()) == expected
  assert [len(found['refused']), found['splits']['train']['records']] == ([4, 17] if number_duplicates else [6, 15])
  for name in ('train', 'val'):
    one, other = (open_split(root / out, name) for out in ('one', 'beam'))
    assert [one[i] for i in range(len(one))] == [other[i] for i in range(len(other))]
    assert one.fingerprint == other.fingerprint
  ids = [open_split(root / 'beam', 'train')[i]['id'] for i in range(15)]
  assert ('2#2' in ids) == number_duplicates
  assert sorted(path.name for path in (root / 'beam').iterdir() if 'array_record' not in path.name) == sorted(
    path.name for path in (root / 'one').iterdir() if 'array_record' not in path.name
  )


def test_too_many_refusals_leave_nothing(root, small_blocks):
  files = annotate(root)
  messages = []
  for beam in (None, LOCAL):
    with pytest.raises(DataError) as error:
      prepare(files[:1], root / 'out', media_roots=[root], beam=beam)
    messages.append(str(error.value))
  assert messages[0] == messages[1]
  assert messages[0].startswith(f'E_REFUSED: {files[0]}: 5 of 20 sample(s) refused, allowed are 0.00% (--max_refused):')
  assert not [path for path in root.iterdir() if 'out' in path.name]


def test_nothing_to_prepare(root, small_blocks):
  (root / 'empty.json').write_text('[]')
  with pytest.raises(DataError) as error:
    prepare([str(root / 'empty.json')], root / 'out', beam=LOCAL)
  assert str(error.value) == 'E_EMPTY: split train: expected at least one record; found none'
  (root / 'bad.json').write_text(json.dumps([sample('a', 'none.png')]))
  with pytest.raises(DataError) as error:
    prepare([str(root / 'bad.json')], root / 'out', media_roots=[root], max_refused=1.0, beam=LOCAL)
  assert str(error.value) == (
    'E_EMPTY: train: expected at least one record; every sample of a split was refused: without Beam you see why'
  )
  with pytest.raises(ConfigError) as error:
    prepare(['easy_vqa'], root / 'out', beam=LOCAL)
  assert str(error.value) == ('source: easy_vqa is no annotation file; expected annotation files with Beam')


def test_beam_is_an_extra(root, monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.setitem(sys.modules, 'apache_beam.options.pipeline_options', None)
  with pytest.raises(ConfigError) as error:
    prepare(annotate(root), root / 'out', splits=['a', 'b'], media_roots=[root], beam=LOCAL)
  assert str(error.value) == "beam: expected the package apache-beam; pip install 'llava_mini_jax[beam]'"

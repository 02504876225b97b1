"""The prepared dataset gives back what was written, or says what is wrong with it; never something else."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from llava_mini_jax.data import records
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import open_split, staged, write


def make(count: int, seed: int = 0) -> list[dict]:
  rng = np.random.default_rng(seed)
  return [
    {
      'id': f'sample-{i}',
      'category': ['', 'größe'][i % 2],
      'media': [rng.bytes(int(rng.integers(0, 300))) for _ in range(i % 3)],
      'conversations': [
        turn
        for n in range(1 + i % 4)
        for turn in ({'from': 'human', 'value': f'{n}\0 ? 🙂 {i}'}, {'from': 'gpt', 'value': '' if n else 'no'})
      ],
    }
    for i in range(count)
  ]


@pytest.fixture(scope='module')
def samples():
  return make(40)


@pytest.fixture
def dataset(tmp_path, samples):
  write(tmp_path / 'data', {'train': samples, 'test': samples[:5]}, description='for tests', shard_size=16)
  return tmp_path / 'data'


def test_round_trip(dataset, samples):
  train, test = open_split(dataset, 'train'), open_split(str(dataset), 'test')
  assert len(train) == 40 and len(test) == 5
  assert [train[i] for i in range(40)] == samples
  assert [test[i] for i in range(5)] == samples[:5]
  assert list(train) == samples
  assert len(sorted(dataset.glob('*train.array_record*'))) == 3
  with pytest.raises(IndexError):
    train[40]


def test_bytes_with_nul_and_no_images_survive(tmp_path):
  turns = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]
  files = [[], [b''], [b'\0\xff\0'], [b'a\0', b'\0']]
  tricky = [{'id': str(i), 'category': '', 'media': f, 'conversations': turns} for i, f in enumerate(files)]
  write(tmp_path / 'data', {'train': iter(tricky)}, description='for tests')
  assert list(open_split(tmp_path / 'data', 'train')) == tricky


def test_split_pickles_as_its_path(dataset, samples):
  split = open_split(dataset, 'train')
  data = pickle.dumps(split)
  assert len(data) < 500
  assert pickle.loads(data)[17] == samples[17]


def test_fingerprint_is_of_the_content(tmp_path, samples):
  changed = [bytes([data[0] ^ 1]) + data[1:] for data in samples[38]['media']]
  other = [*samples[:38], {**samples[38], 'media': changed}, samples[39]]
  for name, content, shard_size in (('a', samples, 16), ('b', samples, 7), ('c', other, 16)):
    write(tmp_path / name, {'train': content}, description=name, shard_size=shard_size)
  a, b, c = (open_split(tmp_path / name, 'train').fingerprint for name in 'abc')
  assert a == b != c


def test_tensorflow_is_never_imported(tmp_path):
  program = (
    'import sys\n'
    'from llava_mini_jax.data.records import open_split, write\n'
    "turns = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]\n"
    "record = {'id': 'x', 'category': '', 'media': [b'i'], 'conversations': turns}\n"
    "write(sys.argv[1], {'train': [record]}, description='')\n"
    "assert open_split(sys.argv[1], 'train')[0] == record\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', program, tmp_path / 'data'], check=True)


def test_a_failed_write_leaves_nothing(tmp_path, samples):
  def broken():
    yield samples[0]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / 'data', {'train': broken()}, description='')
  with pytest.raises(DataError, match='^E_EMPTY: split train: expected at least one record; found none$'):
    write(tmp_path / 'data', {'train': []}, description='')
  assert os.listdir(tmp_path) == []


def test_existing_directories_are_kept(dataset, tmp_path, samples):
  with pytest.raises(DataError) as error:
    write(dataset, {'train': samples[:3]}, description='')
  assert str(error.value) == (
    f'E_OUT_EXISTS: {dataset}: expected a new or empty directory; to replace the dataset in it, use --force'
  )
  assert len(open_split(dataset, 'train')) == 40
  write(dataset, {'train': samples[:3]}, description='', force=True)
  assert len(open_split(dataset, 'train')) == 3

  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'thesis.tex').touch()
  with pytest.raises(DataError, match='it is not a prepared dataset, so it is never replaced$'):
    write(tmp_path / 'home', {'train': samples}, description='', force=True)
  (tmp_path / 'empty').mkdir()
  write(tmp_path / 'empty', {'train': samples[:3]}, description='')
  assert sorted(os.listdir(tmp_path)) == ['data', 'empty', 'home']


def test_replacing_fails_whole(dataset):
  with pytest.raises(ZeroDivisionError), staged(dataset, force=True):
    raise ZeroDivisionError
  assert len(open_split(dataset, 'train')) == 40


@pytest.mark.parametrize('name', ['', 'all', 'a b', '../x', 'train[:5]'])
def test_split_names(tmp_path, name):
  with pytest.raises(DataError, match='^E_SPLIT_NAME: '):
    write(tmp_path / 'data', {name: make(1)}, description='')


def test_nothing_to_open(dataset, tmp_path):
  cases = {
    (tmp_path / 'none', 'train'): (
      f'E_NO_DATASET: {tmp_path}/none: no such directory; prepare it with launch/prepare_data.py'
    ),
    (tmp_path, 'train'): (
      f'E_NO_DATASET: {tmp_path}: not a prepared dataset (no dataset_info.json); see launch/prepare_data.py'
    ),
    (dataset, 'val'): f"E_NO_SPLIT: {dataset}: expected one of test, train; found 'val'",
    (dataset, 'train[:5]'): f"E_NO_SPLIT: {dataset}: expected one of test, train; found 'train[:5]'",
  }
  for (directory, split), message in cases.items():
    with pytest.raises(DataError) as error:
      open_split(directory, split)
    assert str(error.value) == message


def test_damaged_metadata(dataset):
  info = json.loads((dataset / 'dataset_info.json').read_text())
  (dataset / 'metadata.json').unlink()
  with pytest.raises(DataError, match='^E_(NO_DATASET|DATASET_CORRUPT): '):
    open_split(dataset, 'train')
  for text in ('', '{', json.dumps({**info, 'splits': 3})):
    (dataset / 'dataset_info.json').write_text(text)
    with pytest.raises(DataError, match='^E_DATASET_CORRUPT: .*: the metadata cannot be read'):
      open_split(dataset, 'train')


def test_missing_file(dataset):
  lost = sorted(dataset.glob('*train*'))[1]
  lost.unlink()
  with pytest.raises(DataError) as error:
    open_split(dataset, 'train')
  assert str(error.value) == f'E_DATASET_CORRUPT: {lost}: the file is missing'


def test_truncation_names_file_and_record(dataset, samples):
  damaged = sorted(dataset.glob('*train*'))[1]
  whole = damaged.read_bytes()
  for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
    damaged.write_bytes(whole[:size])
    split = open_split(dataset, 'train')
    assert split[0] == samples[0]  # the first file is whole
    with pytest.raises(DataError) as error:
      split[20]
    assert str(error.value).startswith(f'E_DATASET_CORRUPT: {damaged}: record 20 of split train: cannot be read (')


def test_a_flipped_bit_never_gives_other_data(dataset, samples):
  damaged = sorted(dataset.glob('*train*'))[1]
  whole = damaged.read_bytes()
  rng = np.random.default_rng(0)
  used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest pads a short file to whole blocks
  noticed = 0
  for n in range(120):
    data = bytearray(whole)
    data[rng.choice(used) if n % 4 else rng.integers(len(data))] ^= 1 << rng.integers(8)
    damaged.write_bytes(data)
    split = open_split(dataset, 'train')
    try:
      for i in range(16, 32):
        assert split[i] == samples[i]
    except DataError as error:
      assert error.code == 'E_DATASET_CORRUPT'
      noticed += 1
  assert noticed > 60


def test_records_are_handed_on_a_few_at_a_time(monkeypatch, tmp_path):
  """By number, and by bytes: as if videos were large."""
  monkeypatch.setattr(records, '_CHUNK_BYTES', 100)
  turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'a'}]
  pulled = []

  def source():
    for i in range(10):
      pulled.append(i)
      yield {'id': str(i), 'category': '', 'media': [bytes(60)], 'conversations': turns}

  iterator = source()
  assert [record['id'] for record in records._chunk(iterator)] == ['0', '1'] and pulled == [0, 1]
  write(tmp_path / 'out', {'train': source()}, description='x')
  assert [open_split(tmp_path / 'out', 'train')[i]['id'] for i in range(10)] == [str(i) for i in range(10)]
  monkeypatch.setattr(records, 'MAX_MEDIA_BYTES', 59)
  with pytest.raises(
    DataError, match=r"^E_TOO_LARGE: sample '0': expected media of at most 59 bytes in all; found 60$"
  ):
    write(tmp_path / 'large', {'train': source()}, description='x')
  assert not (tmp_path / 'large').exists()

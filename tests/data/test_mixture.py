"""A mixture keeps and draws what its rules and weights say, by its own account; every order is a pure function."""

from __future__ import annotations

import collections
import math
import pickle
import shutil

import numpy as np
import pytest

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Mixture, Part, parse
from llava_mini_jax.data.records import write


def text_record(i: int) -> dict:
  turns = [{'from': 'human', 'value': f'what is {i}?'}, {'from': 'gpt', 'value': f'this is {i}'}]
  return {'id': str(i), 'category': '', 'media': [], 'conversations': turns}


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
  """a: train 0..99, test 0..2; b: train 100..116."""
  root = tmp_path_factory.mktemp('datasets')
  records = [text_record(i) for i in range(117)]
  write(root / 'a', {'train': records[:100], 'test': records[:3]}, description='for tests', shard_size=32)
  write(root / 'b', {'train': records[100:]}, description='for tests')
  return root


def mix(datasets, *rows, seed=0) -> Mixture:
  return Mixture(parse([(str(datasets / row[0]), *row[1:]) for row in rows]), seed=seed)


def ids(mixture) -> list[int]:
  return [int(mixture[i]['id'].rsplit(':')[-1]) for i in range(len(mixture))]


def test_parse():
  rows = (('data/a', 'train', 'first:1000', 1.0), ['data/b', 'test', 'random:2.5%', 2], ('data/c', 'train'))
  assert parse(rows) == (
    Part('data/a', 'train', 'first:1000', 1.0),
    Part('data/b', 'test', 'random:2.5%', 2.0),
    Part('data/c', 'train', 'all', 1.0),
  )


RULES = "'all', 'first:N', 'end:N' or 'random:N', N a positive count or, with '%', a percentage up to 100"


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('data/a', "[0]: expected (directory, split, rule, weight); found 'data/a'"),
    (('data/a',), "[0]: expected (directory, split, rule, weight); found ('data/a',)"),
    (('', 'train'), "[0]: directory: expected a string; found ''"),
    (('data/a', 3), '[0]: split: expected a string; found 3'),
    *(
      (('data/a', 'train', rule), f"[0] 'data/a:train': rule: expected {RULES}; found {rule!r}")
      for rule in ('', 'last:3', 'first', 'all:3', 'first:0', 'end:0%', 'first:-1', 'end:1.5', 'random:101%', 'first:٣')
    ),
    *(
      (('data/a', 'train', 'all', weight), f"[0] 'data/a:train': weight: expected a positive number; found {weight!r}")
      for weight in (0, -1.0, '2', True, math.inf, math.nan)
    ),
  ],
)
def test_what_parse_refuses(row, message):
  with pytest.raises(ConfigError) as error:
    parse([row])
  assert str(error.value) == f'DataConfig.mixture{message}'


def test_parse_nothing():
  with pytest.raises(ConfigError, match='^data.mix: expected at least one source; found none$'):
    parse((), 'data.mix')


@pytest.mark.parametrize(
  ('rule', 'expected'),
  [
    ('all', range(100, 117)),
    ('first:5', range(100, 105)),
    ('first:10%', range(100, 102)),  # 1.7 rounded up
    ('end:1', [116]),
    ('end:100%', range(100, 117)),
    ('end:0.1%', [116]),
  ],
)
def test_rules(datasets, rule, expected):
  assert ids(mix(datasets, ('b', 'train', rule))) == list(expected)


def test_random_rules(datasets):
  kept = {rule: ids(mix(datasets, ('a', 'train', rule))) for rule in ('random:20', 'random:20%', 'random:7')}
  assert len(kept['random:20']) == 20 and kept['random:20'] == kept['random:20%'] == sorted(set(kept['random:20']))
  assert set(kept['random:7']) < set(kept['random:20'])
  assert ids(mix(datasets, ('b', 'train'), ('a', 'train', 'random:7')))[17:] == kept['random:7']  # place is nothing
  others = [tuple(ids(mix(datasets, ('a', 'train', 'random:20'), seed=seed))) for seed in range(5)]
  assert len(set(others)) == 5
  assert len({i for other in others for i in other}) > 50  # of 100; five draws of 20 miss a record 33 times in 100


def test_the_records_of_a_mixture(datasets):
  mixture = mix(datasets, ('a', 'test'), ('b', 'train', 'end:2'), ('a', 'train', 'first:1'))
  names = [f'{datasets}/{name}' for name in ('a:test:0', 'a:test:1', 'a:test:2', 'b:train:115', 'b:train:116')]
  found = list(mixture)
  assert [record['id'] for record in found] == [*names, f'{datasets}/a:train:0']
  assert found[3] == {**text_record(115), 'id': names[3]}
  assert mixture.counts == [3, 2, 1] and len(mixture) == 6
  for index in (-1, 6):
    with pytest.raises(IndexError, match=f'^record {index} of 6$'):
      mixture[index]


def test_a_mixture_travels_without_files(datasets, tmp_path):
  for name in 'ab':
    shutil.copytree(datasets / name, tmp_path / name)
  mixture = mix(tmp_path, ('a', 'train', 'random:5'), ('b', 'train', 'first:2', 0.5))
  before = list(mixture)
  data = pickle.dumps(mixture)
  shutil.rmtree(tmp_path / 'b')
  copy = pickle.loads(data)
  assert [copy[i] for i in range(5)] == before[:5]  # b is not opened for it
  np.testing.assert_array_equal(copy.draw(3), mixture.draw(3))
  assert copy.fingerprint == mixture.fingerprint
  with pytest.raises(DataError, match='^E_NO_DATASET: '):
    copy[5]


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    (('b', 'train', 'end:18'), "rule: 'end:18' expects at least 18 records; found 17"),
    (('b', 'train', 'first:2', 0.2), 'weight: 0.2 of 2 record(s) is less than one sample an epoch'),
  ],
)
def test_too_few_records(datasets, row, message):
  with pytest.raises(ConfigError) as error:
    mix(datasets, ('a', 'train'), row)
  assert str(error.value) == f"DataConfig.mixture[1] '{datasets}/b:train': {message}"


@pytest.mark.parametrize('weight', [0.1, 0.5, 1, 1.5, 2, 3.3])
def test_what_epochs_draw(datasets, weight):
  """Of b: so many an epoch; no record once more than another; a of weight 1 all the same."""
  mixture = mix(datasets, ('a', 'train', 'first:10'), ('b', 'train', 'all', weight))
  total = collections.Counter()
  for epoch in range(12):
    drawn = mixture.draw(epoch)
    assert len(drawn) == mixture.per_epoch == 10 + math.floor(weight * 17 + 0.5)
    assert sorted(drawn[:10]) == list(range(10))
    total.update(drawn[10:].tolist())
    counts = [total[i] for i in range(10, 27)]
    assert sum(counts) == (epoch + 1) * math.floor(weight * 17 + 0.5) == sum(total.values())
    assert max(counts) - min(counts) <= 1
  assert (mixture.draw(0) != mixture.draw(1)).any()


def test_half_of_it_then_the_other_half(datasets):
  mixture = mix(datasets, ('a', 'train', 'all', 0.5))
  halves = [set(mixture.draw(epoch).tolist()) for epoch in range(4)]
  assert [len(half) for half in halves] == [50] * 4
  assert not halves[0] & halves[1] and not halves[2] & halves[3]
  assert halves[2] not in halves[:2]


def test_the_fingerprint(datasets, tmp_path):
  shutil.copytree(datasets / 'b', tmp_path / 'elsewhere')
  of = {
    name: mix(datasets, *rows, seed=seed).fingerprint
    for name, rows, seed in (
      ('b', [('b', 'train')], 0),
      ('seed', [('b', 'train')], 1),
      ('rule', [('b', 'train', 'first:17')], 0),
      ('fewer', [('b', 'train', 'first:16')], 0),
      ('weight', [('b', 'train', 'all', 2)], 0),
      ('random', [('b', 'train', 'random:9')], 0),
      ('random, seed', [('b', 'train', 'random:9')], 1),
      ('split', [('a', 'test')], 0),
      ('two', [('a', 'test'), ('b', 'train')], 0),
      ('two, swapped', [('b', 'train'), ('a', 'test')], 0),
    )
  }
  assert of.pop('seed') == of['b'] == mix(tmp_path, ('elsewhere', 'train')).fingerprint
  assert len(set(of.values())) == len(of)


def test_the_table(datasets, monkeypatch):
  monkeypatch.chdir(datasets)
  rows = [('a', 'train', 'random:10%', 4), ('a', 'test', 'all', 0.5), ('b', 'train')]
  assert Mixture(parse(rows), seed=0).describe().splitlines() == [
    'source   records  rule        kept  weight  drawn   share',
    'a:train      100  random:10%    10       4     40   67.8%',
    'a:test         3  all            3     0.5      2    3.4%',
    'b:train       17  all           17       1     17   28.8%',
    'total        120                30             59  100.0%',
  ]

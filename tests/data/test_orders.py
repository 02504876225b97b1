"""Orders of epochs: shuffled, by length, one epoch after the other; a mixture resumes from every state."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from test_mixture import mix
from test_pipeline import RECORDS, ROW, assert_equal, interleave, iterate, questions, take

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Epochs, Shuffled, length_grouped, permutation
from llava_mini_jax.data.packing import Grouped
from llava_mini_jax.data.records import write


def test_permutations_stay_what_they_are():
  """A change here would silently change every run that is resumed."""
  assert permutation(10, 'draw', 0, 1).tolist() == [7, 3, 9, 1, 4, 8, 5, 2, 0, 6]
  assert sorted(permutation(1000, 'x')) == list(range(1000))
  assert len({tuple(permutation(20, *key)) for key in ((0,), (0, 0), ('0',), (0, '0'), (1,), (-1,), ())}) == 7


KINDS = np.random.default_rng(0).random(1000) < 0.3
LENGTHS = np.random.default_rng(1).integers(10, 2000, 1000)


def test_grouped_batches_are_alike():
  order = length_grouped(LENGTHS, 8, 3, 0, apart=KINDS, window=16)
  batches = order.reshape(-1, 8)
  assert len(batches) == 125 and sorted(order) == list(range(1000))
  mixed = [batch for batch in batches if len(set(KINDS[batch])) > 1]
  assert len(mixed) <= 1
  spread = [np.ptp(LENGTHS[batch]) for batch in batches]
  assert np.median(spread) < 2 * 2000 / 16 < np.median(np.ptp(LENGTHS.reshape(-1, 8), axis=1)) / 4
  # neither lengths nor kinds come in order
  means = LENGTHS[batches].mean(axis=1)
  assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
  text = np.flatnonzero(KINDS[batches].all(axis=1))
  assert 40 < text.mean() < 85


def test_one_window_sorts_everything():
  batches = length_grouped(LENGTHS, 10, 0, window=100).reshape(-1, 10)
  assert sorted(map(sorted, LENGTHS[batches].tolist())) == np.sort(LENGTHS).reshape(-1, 10).tolist()


def test_what_does_not_fill_a_batch_is_left_out():
  kinds = np.arange(23) < 9  # batches of 4: 2 of one kind, 3 of the other, 1 and 2 left
  orders = [length_grouped(np.arange(23), 4, 0, epoch, apart=kinds) for epoch in range(40)]
  for order in orders:
    assert len(order) == len(set(order)) == 20
  assert set().union(*(set(range(23)) - set(order) for order in orders)) == set(range(23))
  kinds = np.arange(23) < 10  # 2 and 1 left
  assert {len(length_grouped(np.arange(23), 4, 0, epoch, apart=kinds)) for epoch in range(3)} == {20}
  kinds = np.arange(23) < 11  # 3 and 0 left
  assert len(length_grouped(np.arange(23), 4, 0, apart=kinds)) == 20
  kinds = np.arange(24) < 11  # 3 and 1 left: one mixed batch
  order = length_grouped(np.arange(24), 4, 0, apart=kinds).reshape(-1, 4)
  assert sorted(kinds[batch].sum() for batch in order) == [0, 0, 0, 3, 4, 4]
  assert not len(length_grouped(np.arange(3), 4, 0))


def test_a_grouped_order_is_that_of_its_key():
  orders = [tuple(length_grouped(LENGTHS, 8, *key, apart=KINDS)) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
  assert orders[0] == orders[1] and len(set(orders)) == 3


def test_a_shuffled_order():
  orders = [tuple(Shuffled(range(50), seed)(epoch)) for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0))]
  assert orders[0] == orders[1] and len(set(orders)) == 3
  assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))} == {tuple(Shuffled(range(50), None)(5))}


def letters(epoch: int) -> list[str]:
  """3, 4, 5, 3, ... items."""
  return [f'{epoch}.{i}' for i in range(3 + epoch % 3)]


def test_epochs_one_after_the_other():
  expected = [item for epoch in range(9) for item in letters(epoch)]
  forward, backward = Epochs(letters, None), Epochs(letters, 9)
  assert [forward[i] for i in range(36)] == expected
  assert [backward[i] for i in reversed(range(36))] == expected[::-1]
  copy = pickle.loads(pickle.dumps(backward))
  assert [copy[i] for i in (35, 0, 7)] == [expected[i] for i in (35, 0, 7)]
  assert len(backward) == len(copy) == 36 and len(forward) > 10**15
  assert [forward.items_in(epochs) for epochs in (0, 0.5, 1, 1.5, 2.99, 3)] == [0, 1, 3, 5, 11, 12]


def test_an_epoch_without_items():
  with pytest.raises(
    DataError, match='^E_EMPTY: epoch 1: expected samples that fill at least one batch; found too few$'
  ):
    Epochs(lambda epoch: [[0], []][epoch], None)[1]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  root = tmp_path_factory.mktemp('pictures')
  write(root / 'a', {'train': RECORDS[:13]}, description='for tests')
  write(root / 'b', {'train': RECORDS[13:]}, description='for tests')
  return mix(root, ('a', 'train', 'random:10', 1.5), ('b', 'train', 'all', 0.5), seed=3)


def sizes_of(source) -> np.ndarray:
  return np.array([(len(str(record['conversations'])) // 4, len(record['media'])) for record in source])


@pytest.mark.parametrize('grouped', [False, True])
def test_a_mixture_resumes_from_every_state(pictures, grouped):
  """15 + 4 samples an epoch, in batches of 4."""
  order = Grouped(pictures, sizes_of(pictures), 4, ROW, seed=3) if grouped else None
  whole = iterate(pictures, num_epochs=3, max_turns=2, order=order)
  states, batches = [whole.get_state()], []
  for batch in whole:
    batches.append(batch)
    states.append(whole.get_state())
  assert len(batches) == (3 * (19 // 4) if grouped else 3 * 19 // 4)
  assert states == [{'global_next_index': 4 * n} for n in range(len(batches) + 1)]
  for n, state in enumerate(states):
    halves = [iterate(pictures, max_turns=2, shard_index=i, shard_count=2, order=order) for i in range(2)]
    for half in halves:
      half.set_state(state)
    assert_equal(interleave(*(take(half, 2) for half in halves))[: len(batches) - n], batches[n : n + 2])


@pytest.mark.parametrize('grouped', [False, True])
def test_workers_change_nothing_of_a_mixture(pictures, grouped):
  order = Grouped(pictures, sizes_of(pictures), 4, ROW, seed=3) if grouped else None
  expected = take(iterate(pictures, max_turns=2, order=order), 8)
  iterator = iterate(pictures, max_turns=2, order=order, worker_count=2)
  iterator.set_state({'global_next_index': 8})
  found = take(iterator, 6)
  iterator.close()
  assert_equal(found, expected[2:])


def test_the_stream_is_what_the_mixture_draws(pictures):
  batches = take(iterate(pictures, batch_size=19), 2)
  for epoch, batch in enumerate(batches):
    drawn = [pictures[i]['conversations'][0]['value'].split('\n')[-1] for i in pictures.draw(epoch)]
    found = [text[text.index('what is') : text.index('?') + 1] for text in questions(batch)]
    assert sorted(found) == sorted(drawn) and found != drawn
  (batch,) = take(iterate(pictures, batch_size=19, shuffle=False), 1)
  drawn = [pictures[i]['conversations'][0]['value'].split('\n')[-1] for i in pictures.draw(0)]
  assert [text[text.index('what is') : text.index('?') + 1] for text in questions(batch)] == drawn


def test_an_error_names_the_source(tmp_path):
  write(tmp_path / 'c', {'train': [{**RECORDS[0], 'media': [b'no image']}]}, description='for tests')
  with pytest.raises(DataError) as error:
    next(iterate(mix(tmp_path, ('c', 'train')), batch_size=1))
  assert str(error.value).startswith(
    f"E_IMG_FORMAT: {tmp_path}/c: record 0 of split train: sample '{tmp_path}/c:train:0': image 0: "
  )


def test_an_order_that_does_not_fit(pictures):
  sizes = sizes_of(pictures)
  with pytest.raises(ConfigError, match='^order.batch_size: expected 4; found 8$'):
    iterate(pictures, order=Grouped(pictures, sizes, 8, ROW, seed=0))
  with pytest.raises(
    DataError, match='^E_EMPTY: epoch 0: expected samples that fill at least one batch; found too few$'
  ):
    iterate(pictures, order=Grouped(pictures, sizes, 32, ROW, seed=0), batch_size=32)

"""Batches of like samples: as long, and with room for as many visuals, as they need; and nothing else changes."""

from __future__ import annotations

import collections
import dataclasses

import jax
import numpy as np
import pytest
from small_model import quick_jit, random_params, with_params
from test_packing import NO_RANDOM_SIZES, RANDOM, SIZES, alone
from test_pipeline import MODEL, RECORDS, ROW, TOKENIZER, assert_equal, iterate, picture, record, take

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.mixture import Epochs, length_grouped
from llava_mini_jax.data.packing import Grouped, pack_rows
from llava_mini_jax.data.pipeline import device_batches
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.sizes import SampleSize, record_sizes
from llava_mini_jax.sharding import batch_sharding, make_mesh
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.types import Batch

# every seventh record is text alone; with all of them twice there are six such
TWICE = [*RECORDS, *RECORDS]
FITTED = Grouped(TWICE, np.tile(SIZES, (2, 1)), 3, ROW, seed=0, lengths=(8, int(np.median(SIZES[:, 0])), 96))


def test_batches_are_as_long_as_their_samples():
  epochs = Epochs(FITTED, None)
  batches = take(iterate(TWICE, order=FITTED, batch_size=3), 28)
  shapes = collections.Counter()
  for n, batch in enumerate(batches):
    indices = [epochs[3 * n + i][0] for i in range(3)]
    longest, most = FITTED.sizes[indices].max(axis=0)
    length, visuals = next(length for length in FITTED.lengths if length >= longest), 2 if most else 0
    shapes[length, visuals] += 1
    assert batch['tokens'].shape == (3, length) and batch['pixels'].shape == (3, visuals, 1, 16, 16, 3)
    assert batch['fuse_index'].shape == (3, visuals, length)
    for i, index in enumerate(indices):
      one = {name: array[i] for name, array in batch.items()}
      assert_equal([pack_rows([one], ROW)], [alone(index % 21)])
  assert len(shapes) == 3 and min(shapes.values()) >= 4 and sum(k for (_, m), k in shapes.items() if not m) == 4


def test_fitted_rows_resume_on_two_shards():
  options = dict(order=dataclasses.replace(FITTED, batch_size=4), batch_size=4, **RANDOM)
  expected = take(iterate(TWICE, **options), 14)  # 10 batches an epoch
  for n in (0, 3, 10, 12):
    for i in range(2):
      half = iterate(TWICE, shard_index=i, shard_count=2, **options)
      half.set_state({'global_next_index': 4 * n})
      assert_equal(take(half, 14 - n), [{name: array[i::2] for name, array in batch.items()} for batch in expected[n:]])


def test_fitted_batches_reach_the_devices():
  """Of no visual, too."""
  order = Grouped(RECORDS[6:7], SIZES[6:7], 1, ROW, seed=0, lengths=(96,))
  order = dataclasses.replace(order, source=RECORDS[6:7] * 8, sizes=SIZES[6:7].repeat(8, axis=0), batch_size=8)
  batches = device_batches(iterate(order.source, order=order, batch_size=8), batch_sharding(make_mesh()))
  assert next(batches).pixels.shape == (8, 0, 1, 16, 16, 3)
  batches.close()


@pytest.mark.parametrize('lengths', [(96, 40), (40, 40, 96), (40, 80), (40, 97)])
def test_lengths(lengths):
  with pytest.raises(ConfigError) as error:
    Grouped(RECORDS, SIZES, 4, ROW, seed=0, lengths=lengths)
  assert str(error.value) == f'lengths: expected ascending numbers up to 96; found {lengths}'


def test_rows_of_several_lengths_need_whole_conversations():
  with pytest.raises(ConfigError, match=f'^{NO_RANDOM_SIZES}$'):
    iterate(TWICE, order=FITTED, batch_size=3, max_turns=1)


def test_detached_text_needs_a_visual():
  """A model without any lets gradients into its text."""
  model = dataclasses.replace(MODEL, detach_text=True)
  message = 'order.text_visuals: expected 1 or more, for the model has detach_text; found 0'
  with pytest.raises(ConfigError, match=f'^{message}$'):
    iterate(TWICE, model=model, order=FITTED, batch_size=3)
  order = dataclasses.replace(FITTED, text_visuals=1)
  batches = take(iterate(TWICE, model=model, order=order, batch_size=3), 14)
  assert collections.Counter(batch['pixels'].shape[1] for batch in batches) == {1: 2, 2: 12}


def album(i: int, images: int) -> dict:
  """A record with so many images."""
  media = [picture(100 * i + n) for n in range(images)]
  turns = record(0)['conversations'][:2]
  turns = [{**turns[0], 'value': '<image>\n' * images + f'what is {i}?'}, turns[1]]
  return {'id': str(i), 'category': '', 'media': media, 'conversations': turns}


IMAGES = (0, 1, 1, 1, 2, 5)
ALBUMS = [album(i, IMAGES[i % 6]) for i in range(54)]
BROAD = RowShape.for_model(MODEL, length=96, visuals=6)
ALBUM_SIZES = record_sizes(ALBUMS, SampleSize(TOKENIZER, 'chatml', None, MODEL, BROAD))
COUNTED = Grouped(ALBUMS, ALBUM_SIZES, 4, BROAD, seed=0, visual_counts=(1, 3, 6))


def test_batches_have_room_for_the_visuals_of_their_samples():
  """9 records without an image, 27 with one, 9 with two, 9 with five; in batches of 4, of which one epoch has 13."""
  assert ALBUM_SIZES[:, 1].tolist() == [IMAGES[i % 6] for i in range(54)]
  epochs = Epochs(COUNTED, None)
  shapes = collections.Counter()
  for n, batch in enumerate(take(iterate(ALBUMS, order=COUNTED, batch_size=4, row=BROAD), 13)):
    visuals = [IMAGES[epochs[4 * n + i][0] % 6] for i in range(4)]
    count = next((count for count in (1, 3, 6) if count >= max(visuals)), 0) if max(visuals) else 0
    assert batch['pixels'].shape == (4, count, 1, 16, 16, 3) and batch['tokens'].shape == (4, 96)
    assert batch['fuse_index'].shape == (4, count, 96) and batch['slot_index'].shape == (4, count, 1)
    shapes[count] += 1
  # 2 + 6 + 2 + 2 batches of one kind, and one of what is left: 1, 3, 1 and 1
  assert sum(shapes.values()) == 13 and all(shapes[count] >= least for count, least in ((0, 2), (1, 6), (3, 2), (6, 2)))


def test_lengths_and_visuals_are_chosen_together():
  middle = int(np.median(ALBUM_SIZES[:, 0]))
  order = dataclasses.replace(COUNTED, lengths=(middle, 96))
  items = [item for epoch in range(4) for item in order(epoch)]
  assert all(ALBUM_SIZES[index, 0] <= length and ALBUM_SIZES[index, 1] <= count for index, length, count in items)
  assert {count for _, _, count in items} == {0, 1, 3, 6} and {length for _, length, _ in items} == {middle, 96}


def test_the_loss_of_a_sample_is_that_of_a_row_with_room_for_all():
  """And it depends on the pixels that were moved."""
  model = with_params(MODEL, random_params(MODEL))
  by_row = jax.vmap(lambda *row: next_token_loss(*(part[None] for part in row))[0])
  loss = quick_jit(lambda batch: by_row(model(batch), batch.targets, batch.loss_mask))
  epochs = Epochs(COUNTED, None)
  seen = set()
  for n, fields in enumerate(take(iterate(ALBUMS, order=COUNTED, batch_size=4, row=BROAD), 13)):
    count = fields['pixels'].shape[1]
    if count in seen:
      continue
    seen.add(count)
    records = [ALBUMS[epochs[4 * n + i][0]] for i in range(4)]
    (wide,) = take(iterate(records, batch_size=4, row=BROAD, shuffle=False), 1)
    with jax.default_matmul_precision('highest'):
      found, expected = (np.asarray(loss(Batch(**batch))) for batch in (fields, wide))
      np.testing.assert_allclose(found, expected, rtol=1e-5)
      if count:
        blank = Batch(**{**fields, 'pixels': np.zeros_like(fields['pixels'])})
        assert np.abs(np.asarray(loss(blank)) - expected).max() > 1e-3
  assert seen >= {1, 3, 6}


def test_batches_of_several_counts_resume_on_two_shards():
  options = dict(order=COUNTED, batch_size=4, row=BROAD, **RANDOM)
  expected = take(iterate(ALBUMS, **options), 30)  # 13 batches an epoch
  assert len({batch['pixels'].shape[1] for batch in expected}) >= 4
  for n in (0, 5, 13, 21):
    for i in range(2):
      half = iterate(ALBUMS, shard_index=i, shard_count=2, **options)
      half.set_state({'global_next_index': 4 * n})
      assert_equal(take(half, 30 - n), [{k: array[i::2] for k, array in batch.items()} for batch in expected[n:]])


def test_kinds_share_no_batch_but_the_last():
  kinds = np.repeat(np.arange(4), (30, 17, 9, 3))
  dropped = collections.Counter()
  for epoch in range(40):
    batches = length_grouped(np.arange(59), 4, 0, epoch, apart=kinds).reshape(-1, 4)
    assert len(batches) == 14 and len(set(batches.ravel().tolist())) == 56
    assert sum(len(set(kinds[batch])) > 1 for batch in batches) <= 3
    dropped.update(set(range(59)) - set(batches.ravel().tolist()))
  by_kind = [sum(count for i, count in dropped.items() if kinds[i] == kind) for kind in range(4)]
  assert all(by_kind) and max(by_kind) < 80  # of 120: no kind pays for all the others


@pytest.mark.parametrize('counts', [(6, 3), (1, 1, 6), (1, 5), (1, 7)])
def test_visual_counts(counts):
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(COUNTED, visual_counts=counts)
  assert str(error.value) == f'visual_counts: expected ascending numbers up to 6; found {counts}'

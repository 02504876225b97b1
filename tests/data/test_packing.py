"""A packed row is its samples as they would be alone, moved; rows are nearly full, and every sample is in one, once."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, with_params
from test_pipeline import MODEL, RECORDS, ROW, TOKENIZER, assert_equal, interleave, iterate, take

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Epochs, Mixture, parse
from llava_mini_jax.data.packing import Fill, Packed, fill, pack_rows, plan
from llava_mini_jax.data.records import write
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.data.sizes import SampleSize, record_sizes
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.types import IMAGE_TOKEN_ID as IMG
from llava_mini_jax.types import Batch

NO, YES = False, True
BY_TOKEN = ('tokens', 'targets', 'loss_mask', 'positions')
SHAPE = RowShape(length=20, visuals=5, fused_text=6, tokens_per_visual=2)


def row(ids, learn, shape=SHAPE, **options):
  built = build_row(np.array(ids, np.int32), np.array(learn, bool), shape, where='sample', **options)
  pixels = np.random.default_rng(len(ids)).integers(0, 255, (shape.visuals, 1, 4, 4, 3)).astype(np.uint8)
  return {**built, 'pixels': pixels}


def test_two_samples_by_hand():
  small = RowShape(length=6, visuals=1, fused_text=3, tokens_per_visual=2)
  first, second = row([5, IMG, 6, 7], [NO, NO, NO, YES], small), row([8, IMG, 9], [NO, NO, YES])
  out = pack_rows([first, second], dataclasses.replace(SHAPE, length=11, visuals=3, fused_text=2))
  expected = {
    'tokens': [5, 0, 0, 6, 7, 8, 0, 0, 9, 0, 0],
    'targets': [0, 0, 6, 7, 0, 0, 0, 9, 0, 0, 0],
    'loss_mask': [NO, NO, NO, YES, NO, NO, NO, YES, NO, NO, NO],
    'segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    'positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
    'fuse_index': [[0, 3], [5, 11], [11, 11]],
    'fuse_mask': [[YES, YES], [YES, NO], [NO, NO]],
    'slot_index': [[1, 2], [6, 7], [11, 11]],
    'pixels': [first['pixels'][0], second['pixels'][0], np.zeros((1, 4, 4, 3))],
  }
  assert out.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(out[name], value, err_msg=name)
    assert out[name].dtype == first[name].dtype, name


ROWS = [
  row([3, IMG, 4, 5], [NO, NO, NO, YES]),
  row([6, 7, 8], [NO, YES, YES]),  # text alone
  row([IMG, 9, IMG, 4], [NO, NO, NO, YES], visuals_per_tag=[1, 2]),
  row([2, 3], [NO, YES], untagged=1),  # a visual without slots
  row([IMG, 1, 2], [YES] * 3),  # a visual that is fused with nothing
]
BRANCHED = row([IMG, 3, 4, 5, 6, 7], [NO, NO, NO, YES, NO, YES], branch=np.array([0, 0, 1, 1, 2, 2]))
BIG = dataclasses.replace(SHAPE, length=40, visuals=9)


def test_every_field_is_that_of_the_sample_moved():
  rows = [*ROWS, BRANCHED]
  out = pack_rows(rows, BIG)
  start = first = 0
  for number, (one, visuals) in enumerate(zip(rows, (1, 0, 3, 1, 1, 1), strict=True), start=1):
    length = one['segment_ids'].sum()
    at, of = slice(start, start + length), slice(first, first + visuals)
    for name in BY_TOKEN:
      np.testing.assert_array_equal(out[name][at], one[name][:length], err_msg=f'{number} {name}')
    assert (out['segment_ids'][at] == number).all()
    np.testing.assert_array_equal(out['branch_ids'][at], one.get('branch_ids', np.zeros(20))[:length])
    np.testing.assert_array_equal(out['pixels'][of], one['pixels'][:visuals])
    np.testing.assert_array_equal(out['fuse_mask'][of], one['fuse_mask'][:visuals])
    for name in ('fuse_index', 'slot_index'):
      index = one[name][:visuals].astype(int)
      np.testing.assert_array_equal(out[name][of], np.where(index < 20, index + start, 40), err_msg=f'{number} {name}')
    start, first = start + length, first + visuals
  assert not out['segment_ids'][start:].any() and not out['tokens'][start:].any() and not out['loss_mask'][start:].any()
  assert (out['fuse_index'][first:] == 40).all() and (out['slot_index'][first:] == 40).all()
  assert 'branch_ids' not in pack_rows(ROWS, BIG)


def test_a_row_alone_stays_as_it_is():
  for one in [*ROWS, BRANCHED]:
    present = (one['fuse_mask'].any(1) | (one['slot_index'] < 20).any(1)).sum()
    out = pack_rows([one], SHAPE)
    assert_equal([{**out, 'pixels': out['pixels'][:present]}], [{**one, 'pixels': one['pixels'][:present]}])


def test_packed_rows_are_packed_again():
  nested = pack_rows([pack_rows(ROWS[:2], SHAPE), ROWS[2], pack_rows(ROWS[3:], SHAPE)], BIG)
  assert_equal([nested], [pack_rows(ROWS, BIG)])


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    (dataclasses.replace(BIG, length=21), 'expected at most 21 tokens; found 22'),
    (dataclasses.replace(BIG, visuals=5), 'expected at most 5 visuals; found 6'),
    (dataclasses.replace(BIG, fused_text=1), 'expected at most 1 instruction tokens to fuse; found 2'),
  ],
)
def test_rows_that_do_not_fit(shape, message):
  with pytest.raises(DataError) as error:
    pack_rows(ROWS, shape)
  assert str(error.value) == f'E_TOO_LONG: a row of 5 samples: {message}'


def test_the_model_sees_no_difference():
  """Logits and loss; and it would, without segments or with the visuals of another."""
  config = small_config()
  samples = [
    random_sample(config, 1, text=(3, 4), visuals=(1,)),
    random_sample(config, 2, text=(5,), visuals=()),
    random_sample(config, 3, text=(2, 3, 1), visuals=(1, 2)),
    random_sample(config, 4, text=(0, 6), visuals=(1,), answer=5),
  ]
  apart = lay_out(config, samples, length=20, visuals=3, fused_text=10)
  fields = [field.name for field in dataclasses.fields(Batch) if getattr(apart, field.name) is not None]
  rows = [{name: getattr(apart, name)[i] for name in fields} for i in range(4)]
  shape = RowShape.for_model(config, length=50, visuals=6, fused_text=10)
  packed = Batch(**{name: array[None] for name, array in pack_rows(rows, shape).items()})
  model = with_params(config, random_params(config))
  forward = quick_jit(lambda batch: model(batch))
  with jax.default_matmul_precision('highest'):
    together, separate = np.asarray(forward(packed))[0], np.asarray(forward(apart))
    unsegmented = dataclasses.replace(packed, segment_ids=np.minimum(packed.segment_ids, 1))
    exchanged = dataclasses.replace(packed, pixels=packed.pixels[:, [1, 0, 2, 3, 4, 5]])
    merged, wrong = (np.asarray(forward(batch))[0] for batch in (unsegmented, exchanged))
  for number in range(4):
    own, there = packed.segment_ids[0] == number + 1, apart.segment_ids[number] > 0
    np.testing.assert_allclose(together[own], separate[number][there], rtol=0, atol=1e-5, err_msg=f'sample {number}')
    assert np.ptp(together[own]) > 1
    if number:
      assert np.abs(merged[own] - together[own]).max() > 1e-2
  assert np.abs(wrong - together)[packed.segment_ids[0] == 1].max() > 1e-2
  losses = [
    float(next_token_loss(logits, batch.targets, batch.loss_mask)[0])
    for logits, batch in ((together[None], packed), (separate, apart))
  ]
  np.testing.assert_allclose(*losses, rtol=1e-6)
  assert packed.loss_mask.sum() == apart.loss_mask.sum() == 3 * 3 + 5


def test_the_gradient_of_each_sample_is_its_own():
  """Of each sample's loss, packed and apart, of every parameter that a visual or a text reaches."""
  config = small_config(detach_text=False)
  samples = [
    random_sample(config, 1, text=(3, 4), visuals=(1,)),
    random_sample(config, 2, text=(5,), visuals=()),
    random_sample(config, 3, text=(2, 3, 1), visuals=(1, 2)),
  ]
  apart = lay_out(config, samples, length=16, visuals=3, fused_text=10)
  fields = [field.name for field in dataclasses.fields(Batch) if getattr(apart, field.name) is not None]
  rows = [{name: getattr(apart, name)[i] for name in fields} for i in range(3)]
  shape = RowShape.for_model(config, length=40, visuals=5, fused_text=10)
  packed = Batch(**{name: array[None] for name, array in pack_rows(rows, shape).items()})
  params = random_params(config)

  @quick_jit
  def gradient(batch, mask):
    def loss(params):
      return next_token_loss(with_params(config, params)(batch), batch.targets, mask)[0]

    return jax.value_and_grad(loss)(params)

  for number in range(3):
    of_one = (np.arange(3) == number)[:, None]
    with jax.default_matmul_precision('highest'):
      expected_loss, expected = jax.device_get(gradient(apart, apart.loss_mask & of_one))
      loss, found = jax.device_get(gradient(packed, packed.loss_mask & (packed.segment_ids == number + 1)))
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=1e-5)
    assert max(np.abs(value).max() for value in expected.values()) > 1e-2
    for path, value in expected.items():
      scale = max(1.0, np.abs(value).max())
      np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5 * scale, err_msg=f'sample {number}: {path}')


def mix_of_lengths(count: int, seed: int = 0) -> np.ndarray:
  """60 to 400 tokens, 9 in 10 with an image."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(60, 401, count), rng.random(count) < 0.9], axis=1)


@pytest.mark.parametrize('count', [300, 5000])
def test_rows_are_nearly_full(count):
  sizes = mix_of_lengths(count)
  groups = plan(sizes, (2048, 16), 0, 0)
  used = np.array([sizes[list(group)].sum(axis=0) for group in groups])
  assert (used <= (2048, 16)).all()
  assert used[:, 0].sum() / (2048 * len(groups)) >= (0.95 if count > 1000 else 0.9)
  assert sorted(itertools.chain(*groups)) == list(range(count))


def test_visuals_fill_rows_as_tokens_do():
  sizes = mix_of_lengths(2000)
  sizes[:, 1] *= 2
  groups = plan(sizes, (4096, 8), 0)
  used = np.array([sizes[list(group)].sum(axis=0) for group in groups])
  assert (used <= (4096, 8)).all() and used[:, 1].sum() / (8 * len(groups)) > 0.95
  assert sorted(itertools.chain(*groups)) == list(range(2000))
  assert plan(np.array([[5, 0], [5, 0]]), (10, 0), 0) in ([(0, 1)], [(1, 0)])


def test_a_larger_window_fills_rows_better():
  sizes = mix_of_lengths(2000)
  found = [fill(plan(sizes, (1024, 8), 0, window=window), sizes, (1024, 8)) for window in (1, 16, 512)]
  assert found[0].samples == 1 and found[0].tokens < found[1].tokens < found[2].tokens
  by_hand = fill([(0, 2), (1,)], np.array([[2, 0], [7, 3], [3, 1]]), (10, 4))
  assert by_hand == Fill(samples=1.5, tokens=12 / 20, visuals=4 / 8)
  assert str(by_hand) == '1.50 samples a row, 60.0% of its tokens and 50.0% of its visuals in use'
  order = Packed(RECORDS, SIZES, WIDE, seed=3, window=1)
  assert order.fill(0).samples == 1 and len(order(0)) == 21


def test_first_fit_decreasing_by_hand():
  """7 opens a row, 6 another, 4 fits the second, 3 the first, 2 neither."""
  sizes = np.array([[2, 0], [7, 0], [3, 0], [6, 0], [4, 0]])
  assert sorted(plan(sizes, (10, 1), 0)) == [(0,), (1, 2), (3, 4)]


def test_a_plan_is_that_of_its_key():
  sizes = mix_of_lengths(800)
  plans = [plan(sizes, (2048, 16), *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
  assert plans[0] == plans[1]
  company = [{frozenset(group) for group in groups} for groups in plans[1:]]
  assert all(len(a & b) < 10 for a, b in itertools.combinations(company, 2))  # of about 90


def test_rows_come_in_random_order():
  """First-fit decreasing fills the first with few long samples, the last with many short ones."""
  groups = plan(mix_of_lengths(5000), (2048, 16), 0, window=5000)
  count = np.array([len(group) for group in groups])
  assert abs(np.corrcoef(count, np.arange(len(count)))[0, 1]) < 0.15


def test_a_sample_that_fits_no_row():
  with pytest.raises(DataError) as error:
    plan(np.array([[5, 1], [11, 1], [5, 3]]), (10, 2), 0)
  assert str(error.value) == 'E_TOO_LONG: sample 1: expected at most 10 tokens and 2 visual(s); found 11 and 1'


SIZE_OF = SampleSize(TOKENIZER, 'chatml', None, MODEL, ROW)
SIZES = record_sizes(RECORDS, SIZE_OF)
WIDE = RowShape.for_model(MODEL, length=240, visuals=4, fused_text=96)
ORDER = Packed(RECORDS, SIZES, WIDE, seed=3)
RANDOM = dict(augment=Augment(flip=0.5, shift=4))


def alone(index: int, **options) -> dict[str, np.ndarray]:
  (batch,) = take(iterate([RECORDS[index]], batch_size=1, **options), 1)
  return {name: array[0] for name, array in batch.items()}


def test_the_stream_is_the_plan():
  """Rows of the samples that `Packed` lists; every sample once in each epoch."""
  rows = Epochs(ORDER, None)
  count = rows.items_in(2)
  seen = [collections.Counter(itertools.chain(*ORDER(epoch))) for epoch in range(2)]
  assert seen == [collections.Counter(range(21))] * 2 and rows.items_in(1) < 12
  batches = take(iterate(row=WIDE, order=ORDER, batch_size=1), count)
  for n, batch in enumerate(batches):
    expected = pack_rows([alone(i) for i in rows[n]], WIDE)
    assert_equal([{name: array[0] for name, array in batch.items()}], [expected])


def test_packed_rows_resume_from_every_state():
  options = dict(row=WIDE, order=ORDER, batch_size=2, **RANDOM)
  whole = iterate(num_epochs=4, **options)
  states, batches = [whole.get_state()], []
  for batch in whole:
    batches.append(batch)
    states.append(whole.get_state())
  assert len(batches) == Epochs(ORDER, 4).items_in(4) // 2 >= 9
  assert states == [{'global_next_index': 2 * n} for n in range(len(batches) + 1)]
  for n, state in enumerate(states):
    halves = [iterate(shard_index=i, shard_count=2, **options) for i in range(2)]
    for half in halves:
      half.set_state(state)
    assert_equal(interleave(*(take(half, 3) for half in halves))[: len(batches) - n], batches[n : n + 3])


def test_workers_change_nothing_of_packed_rows():
  options = dict(row=WIDE, order=ORDER, batch_size=2, **RANDOM)
  expected = take(iterate(**options), 9)
  iterator = iterate(worker_count=2, **options)
  iterator.set_state({'global_next_index': 6})
  found = take(iterator, 6)
  iterator.close()
  assert_equal(found, expected[3:])


def test_a_mixture_is_packed(tmp_path):
  write(tmp_path / 'a', {'train': RECORDS[:12]}, description='for tests')
  write(tmp_path / 'b', {'train': RECORDS[12:]}, description='for tests')
  mixture = Mixture(
    parse([(str(tmp_path / 'a'), 'train', 'all', 2), (str(tmp_path / 'b'), 'train', 'first:3')]), seed=0
  )
  order = Packed(mixture, record_sizes(mixture, SIZE_OF), WIDE, seed=0)
  for epoch in range(2):
    seen = collections.Counter(itertools.chain(*order(epoch)))
    assert seen == {**dict.fromkeys(range(12), 2), **dict.fromkeys(range(12, 15), 1)}
  first = order(0)[0]
  (batch,) = take(iterate(mixture, row=WIDE, order=order, batch_size=1), 1)
  expected = pack_rows([alone(i) for i in first], WIDE)  # record i of the mixture is record i of the two
  assert_equal([{name: array[0] for name, array in batch.items()}], [expected])


NO_RANDOM_SIZES = 'packing, or rows of several shapes: expected no max_turns and no side_by_side; found one'


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, f'order.row: expected {ROW}; found {WIDE}'),
    ({'row': WIDE, 'max_turns': 2}, NO_RANDOM_SIZES),
    ({'row': WIDE, 'side_by_side': True}, NO_RANDOM_SIZES),
  ],
)
def test_what_packing_does_not_go_with(options, message):
  with pytest.raises(ConfigError) as error:
    iterate(order=ORDER, **options)
  assert str(error.value) == message


def test_packing_does_not_stop_gradients():
  model = dataclasses.replace(MODEL, video_stop_grad=True)
  with pytest.raises(ConfigError) as error:
    iterate(model=model, row=WIDE, order=ORDER)
  expected = 'model.video_stop_grad: expected False when packing, which puts several visuals in every row'
  assert str(error.value) == expected


def test_a_sample_that_fits_no_row_is_named():
  with pytest.raises(DataError) as error:
    Packed(RECORDS, SIZES, dataclasses.replace(WIDE, visuals=1), seed=0)
  message = f'expected at most 240 tokens and 1 visual(s); found {SIZES[7, 0]} and 2'
  assert str(error.value) == f"E_TOO_LONG: sample '7': {message}"

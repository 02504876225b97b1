"""A row by hand, and each of the ways in which a sample can fail to fit one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.rows import RowShape, build_row, cut
from llava_mini_jax.types import IMAGE_TOKEN_ID as IMG

NO, YES = False, True
SHAPE = RowShape(length=10, visuals=2, fused_text=4, tokens_per_visual=2)


def row(ids, learn, shape=SHAPE, **options):
  return build_row(np.array(ids, np.int32), np.array(learn, bool), shape, where='sample', **options)


def test_one_image_by_hand():
  out = row([5, IMG, 6, 7, 8], [NO, NO, NO, YES, YES])
  expected = {
    'tokens': [5, 0, 0, 6, 7, 8, 0, 0, 0, 0],
    'targets': [0, 0, 6, 7, 8, 0, 0, 0, 0, 0],
    'loss_mask': [NO, NO, NO, YES, YES, NO, NO, NO, NO, NO],
    'segment_ids': [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    'positions': [0, 1, 2, 3, 4, 5, 0, 0, 0, 0],
    'fuse_index': [[0, 3, 10, 10], [10, 10, 10, 10]],
    'fuse_mask': [[YES, YES, NO, NO], [NO, NO, NO, NO]],
    'slot_index': [[1, 2], [10, 10]],
  }
  assert out.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(out[name], value, err_msg=name)
    assert out[name].dtype == (np.bool_ if name.endswith('mask') else np.int32), name


def test_learnt_tokens_are_the_targets_one_place_earlier():
  ids = np.arange(1, 9)
  learn = np.array([NO, YES, NO, NO, YES, YES, NO, YES])
  out = row(ids, learn)
  np.testing.assert_array_equal(out['targets'][out['loss_mask']], ids[learn])
  np.testing.assert_array_equal(np.flatnonzero(out['loss_mask']), np.flatnonzero(learn) - 1)


def test_a_full_row_learns_nothing_past_its_end():
  out = row(range(1, 11), [YES] * 10)
  assert out['targets'][-1] == 0
  assert not out['loss_mask'][-1]
  np.testing.assert_array_equal(out['targets'][:-1], np.arange(2, 11))


def test_fused_tokens_are_those_not_learnt():
  out = row([IMG, 4, 5, 6, 7], [NO, NO, YES, NO, YES])
  np.testing.assert_array_equal(out['tokens'][out['fuse_index'][0][out['fuse_mask'][0]]], [4, 6])


def test_fuse_overrides_what_is_fused():
  out = row([IMG, 4, 5, 6], [NO, NO, YES, NO], fuse=np.array([YES, NO, YES, YES]))
  np.testing.assert_array_equal(out['tokens'][out['fuse_index'][0][out['fuse_mask'][0]]], [5, 6])


@pytest.mark.parametrize(('fuse_token_zero', 'fused'), [(False, [4]), (True, [0, 4])])
def test_token_zero_is_fused_only_on_request(fuse_token_zero, fused):
  out = row([IMG, 0, 4], [NO] * 3, fuse_token_zero=fuse_token_zero)
  np.testing.assert_array_equal(out['tokens'][out['fuse_index'][0][out['fuse_mask'][0]]], fused)


def test_two_images_get_their_own_slots_and_the_same_text():
  out = row([IMG, 3, IMG, 4], [NO, NO, NO, YES])
  np.testing.assert_array_equal(out['slot_index'], [[0, 1], [3, 4]])
  np.testing.assert_array_equal(out['fuse_index'], [[2, 10, 10, 10]] * 2)


def test_a_video_is_one_tag_of_several_visuals():
  shape = dataclasses.replace(SHAPE, visuals=4)
  out = row([3, IMG, 4, IMG], [NO] * 4, shape, visuals_per_tag=[3, 1])
  np.testing.assert_array_equal(out['slot_index'], [[1, 2], [3, 4], [5, 6], [8, 9]])
  np.testing.assert_array_equal(out['positions'], range(10))
  np.testing.assert_array_equal(out['tokens'], [3, 0, 0, 0, 0, 0, 0, 4, 0, 0])


def test_text_without_an_image_lists_nothing():
  out = row([3, 4, 5, 6, 7, 8], [NO] * 6)  # more text than T: nothing fuses it
  assert (out['fuse_index'] == 10).all() and (out['slot_index'] == 10).all() and not out['fuse_mask'].any()


def test_an_untagged_visual_fuses_text_without_slots():
  out = row([3, 4], [NO, YES], untagged=1)
  np.testing.assert_array_equal(out['fuse_index'], [[0, 10, 10, 10], [10] * 4])
  assert (out['slot_index'] == 10).all()


def test_branches_by_hand():
  """A slot and a word that all see, then questions of two tokens and an answer of one, and a question alone."""
  out = row(
    [IMG, 3, 4, 5, 6, 4, 7, 8],
    [NO, NO, NO, NO, YES, NO, NO, YES],
    dataclasses.replace(SHAPE, fused_text=5),
    branch=np.array([0, 0, 1, 1, 1, 2, 2, 2]),
  )
  expected = {
    'tokens': [0, 0, 3, 4, 5, 6, 4, 7, 8, 0],
    'branch_ids': [0, 0, 0, 1, 1, 1, 2, 2, 2, 0],
    'positions': [0, 1, 2, 3, 4, 5, 3, 4, 5, 0],
    'targets': [0, 3, 0, 5, 6, 0, 7, 8, 0, 0],
    'loss_mask': [NO, NO, NO, NO, YES, NO, NO, YES, NO, NO],
    'segment_ids': [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    'fuse_index': [[2, 3, 4, 6, 7], [10] * 5],
    'slot_index': [[0, 1], [10, 10]],
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(out[name], value, err_msg=name)


@pytest.mark.parametrize(
  ('ids', 'options', 'message'),
  [
    ([1] * 9 + [IMG], {}, 'E_TOO_LONG: sample: expected at most 10 tokens with vision slots; found 11'),
    ([IMG] * 3, {}, 'E_TOO_LONG: sample: expected at most 2 visual(s) per row; found 3'),
    ([IMG], {'untagged': 2}, 'E_TOO_LONG: sample: expected at most 2 visual(s) per row; found 3'),
    ([IMG], {'visuals_per_tag': [3]}, 'E_TOO_LONG: sample: expected at most 2 visual(s) per row; found 3'),
    ([IMG, 1, 2, 3, 4, 5], {}, 'E_TOO_LONG: sample: expected at most 4 instruction tokens to fuse; found 5'),
    ([1], {'visuals_per_tag': [1]}, 'E_IMAGE_TAGS: sample: expected 1 <image> tag(s) for its media; found 0'),
    ([IMG, IMG], {'visuals_per_tag': [1]}, 'E_IMAGE_TAGS: sample: expected 1 <image> tag(s) for its media; found 2'),
    ([IMG], {'visuals_per_tag': []}, 'E_IMAGE_TAGS: sample: expected 0 <image> tag(s) for its media; found 1'),
  ],
)
def test_what_does_not_fit_is_refused(ids, options, message):
  with pytest.raises(DataError) as error:
    row(ids, [NO] * len(ids), **options)
  assert str(error.value) == message


def test_shape_for_a_model():
  model = LlavaMiniConfig.preset('tiny')
  assert RowShape.for_model(model, length=64) == RowShape(64, 1, 64, 1)
  assert RowShape.for_model(model, length=64, visuals=3, fused_text=16) == RowShape(64, 3, 16, 1)


def cut_row(ids, learn, length, per_tag):
  shape = dataclasses.replace(SHAPE, length=length)
  return cut(np.array(ids, np.int32), np.array(learn, bool), shape, where='sample', visuals_per_tag=per_tag)


def test_cut_at_the_length_of_a_row():
  """What is left is laid out as the beginning of what it was cut from."""
  ids, learn = [1, IMG, 2, 3, 4, 5], [NO, NO, NO, YES, YES, YES]
  kept, learnt = cut_row(ids, learn, 5, [1])
  np.testing.assert_array_equal(kept, [1, IMG, 2, 3])  # the slots of the image are two
  np.testing.assert_array_equal(learnt, [NO, NO, NO, YES])
  short, whole = row(kept, learnt, dataclasses.replace(SHAPE, length=5)), row(ids, learn)
  np.testing.assert_array_equal(short['tokens'], whole['tokens'][:5])
  np.testing.assert_array_equal(short['loss_mask'][:4], whole['loss_mask'][:4])
  same, _ = cut_row(ids, learn, 7, [1])
  np.testing.assert_array_equal(same, ids)


def test_cut_at_the_text_that_can_be_fused():
  """Beside an image; text alone fuses nothing."""
  shape = dataclasses.replace(SHAPE, length=20, fused_text=2)
  ids, learn = np.array([IMG, 1, 2, 3, 4, 5], np.int32), np.array([NO, NO, YES, NO, NO, YES])
  kept, learnt = cut(ids, learn, shape, where='sample', visuals_per_tag=[1])
  np.testing.assert_array_equal(kept, [IMG, 1, 2, 3])
  assert row(kept, learnt, shape)['fuse_mask'][0].all()
  text, _ = cut(ids[1:], learn[1:], shape, where='sample', visuals_per_tag=[])
  assert len(text) == 5


@pytest.mark.parametrize(
  ('ids', 'learn', 'per_tag', 'message'),
  [
    (
      [1, 2, 3, IMG],
      [NO, YES, YES, NO],
      [1],
      'E_TOO_LONG: sample: expected every <image> to fit; found 5 tokens with vision slots, cut at 3, which loses one',
    ),
    (
      [IMG, 1, 2],
      [NO, NO, YES],
      [2],
      'E_TOO_LONG: sample: expected a token to learn to fit; '
      'found 6 tokens with vision slots, cut at 4, which loses all',
    ),
  ],
)
def test_a_cut_that_loses_too_much(ids, learn, per_tag, message):
  with pytest.raises(DataError) as error:
    cut_row(ids, learn, 4, per_tag)
  assert str(error.value) == message

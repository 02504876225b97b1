"""Questions about one image side by side: what they share, what each keeps, and what a row holds of them."""

from __future__ import annotations

import numpy as np
import pytest
from test_pipeline import MODEL, RECORDS, TOKENIZER, iterate, take

from llava_mini_jax.data.branches import one_question_each, share_prefix
from llava_mini_jax.data.conversation import Encoded, encode, load_template
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.types import IMAGE_TOKEN_ID as IMG

NO, YES = False, True


def turns(*texts: str) -> list[dict[str, str]]:
  return [{'role': ('user', 'assistant')[n % 2], 'content': text} for n, text in enumerate(texts)]


def test_every_question_gets_the_tag_and_the_system_turn():
  system = {'role': 'system', 'content': 's'}
  found = one_question_each([system, *turns('a\n<image>', '1', 'b', '2', 'c')])
  assert found == [[system, *turns('<image>\na', '1')], [system, *turns('<image>\nb', '2')]]


@pytest.mark.parametrize('whole', [turns('<image>\na', '1', '<image>\nb', '2'), turns('<image>\na')])
def test_what_cannot_be_taken_apart_stays_whole(whole):
  assert one_question_each(whole) == [whole]


def test_questions_of_text_have_no_tag():
  assert one_question_each(turns('a', '1', 'b', '2')) == [turns('a', '1'), turns('b', '2')]


def encoded(ids, learn) -> Encoded:
  return Encoded(np.array(ids, np.int32), np.array(learn, bool))


def test_the_shared_prefix_by_hand():
  both, branch = share_prefix([encoded([1, IMG, 2, 3, 4], [0, 0, 0, 0, 1]), encoded([1, IMG, 2, 5], [0, 0, 0, 1])], 's')
  np.testing.assert_array_equal(both.ids, [1, IMG, 3 - 1, 3, 4, 2, 5])
  np.testing.assert_array_equal(both.assistant, [NO, NO, NO, NO, YES, NO, YES])  # 2 predicts 5: it is not shared
  np.testing.assert_array_equal(branch, [0, 0, 1, 1, 1, 2, 2])


def test_equal_questions_keep_what_is_learnt_apart():
  one = encoded([1, IMG, 2, 3, 4], [0, 0, 0, 1, 1])
  both, branch = share_prefix([one, one], 's')
  np.testing.assert_array_equal(branch, [0, 0, 1, 1, 1, 2, 2, 2])
  np.testing.assert_array_equal(both.ids, [1, IMG, 2, 3, 4, 2, 3, 4])


@pytest.mark.parametrize('late', [[1, 2, IMG, 3], [1, IMG, 4, 3]])
def test_an_image_where_the_questions_differ(late):
  others = {2: [1, 3, 2, 3], 4: [1, IMG, 3, IMG]}
  other = others[late[1] if late[1] in others else late[2]]
  with pytest.raises(DataError, match=r'^E_IMAGE_TAGS: sample 7: side by side: expected <image> in what'):
    share_prefix([encoded(late, [0, 0, 0, 1]), encoded(other, [0, 0, 0, 1])], 'sample 7')


def test_an_image_right_before_what_is_learnt():
  """`plain`: the caption follows from the image itself, which two captions cannot share."""
  one = encoded([IMG, 5], [0, 1])
  with pytest.raises(DataError, match='E_IMAGE_TAGS'):
    share_prefix([one, one], 's')


def alone(record) -> list[np.ndarray]:
  conversation = turns(*(turn['value'] for turn in record['conversations']))
  return [np.maximum(encode(TOKENIZER, load_template('chatml'), one).ids, 0) for one in one_question_each(conversation)]


def questions(batch, i) -> list[tuple[int, ...]]:
  """What each branch of row i sees, as tokens in the order of their positions."""
  row = {name: batch[name][i] for name in ('tokens', 'branch_ids', 'segment_ids', 'positions')}
  branches = range(1, row['branch_ids'].max() + 1) or [0]
  seen = [np.isin(row['branch_ids'], (0, k)) & (row['segment_ids'] > 0) for k in branches]
  assert all((row['positions'][s] == np.arange(s.sum())).all() for s in seen)
  return [tuple(row['tokens'][s].tolist()) for s in seen]


def test_rows_hold_every_question_of_their_record():
  rows, orders = 0, set()
  for batch in take(
    iterate(shuffle=False, num_epochs=3, side_by_side=True, row=RowShape.for_model(MODEL, length=256, visuals=2))
  ):
    for i in range(4):
      expected = [tuple(ids.tolist()) for ids in alone(RECORDS[rows % len(RECORDS)])]
      found = questions(batch, i)
      assert sorted(found) == sorted(expected)
      orders.add(tuple(expected.index(one) for one in found))
      rows += 1
  assert rows == 60 and len(orders) == 1 + 6  # whole, or three questions in any order


@pytest.mark.parametrize('limit', ['max_turns', 'length', 'fused_text'])
def test_a_row_holds_as_many_questions_as_fit(limit):
  """Two of three where there is one place too few for all."""

  def rows(most=None, **sizes):
    row = RowShape.for_model(MODEL, **dict(length=256, visuals=2, fused_text=256) | sizes)
    return take(iterate(RECORDS[:1], num_epochs=32, side_by_side=True, row=row, max_turns=most), 8)

  whole = rows()[0]
  needed = dict(length=int((whole['segment_ids'][0] > 0).sum()), fused_text=int(whole['fuse_mask'][0, 0].sum()))
  limited = rows(most=2) if limit == 'max_turns' else rows(**{limit: needed[limit] - 1})
  found = [questions(batch, i) for batch in limited for i in range(4)]
  assert {len(row) for row in found} == {2}
  assert {question for row in found for question in row} == {tuple(ids.tolist()) for ids in alone(RECORDS[0])}


def with_a_long_question(words: int) -> dict:
  """Short, long, short."""
  values = ['<image>\na', '1', 'long ' * words, '2', 'b', '3']
  sides = [{'from': ('human', 'gpt')[n % 2], 'value': value} for n, value in enumerate(values)]
  return {**RECORDS[0], 'conversations': sides}


@pytest.mark.parametrize('seed', range(6))
def test_a_question_that_does_not_fit_is_refused(seed):
  """Whichever question comes first."""
  row = RowShape.for_model(MODEL, length=96, visuals=2)
  with pytest.raises(DataError, match=r"^E_TOO_LONG: sample '0': expected at most 96 tokens with vision slots; found"):
    take(iterate([with_a_long_question(200)] * 4, side_by_side=True, row=row, seed=seed), 1)


def test_a_question_that_finds_no_room_leaves_it_to_the_next():
  """The long one and a short one, or both short ones: never a short one alone."""
  record = with_a_long_question(20)
  sizes = sorted(len(ids) for ids in alone(record))
  row = RowShape.for_model(MODEL, length=sizes[2] + sizes[0], visuals=2)
  batches = take(iterate([record], num_epochs=64, side_by_side=True, row=row), 16)
  found = {tuple(sorted(map(len, questions(batch, i)))) for batch in batches for i in range(4)}
  assert found == {(sizes[0], sizes[1]), (sizes[0], sizes[2]), (sizes[1], sizes[2])}


def test_a_conversation_about_several_images_is_a_row_as_it_is():
  values = ['<image>\na', '1', '<image>\nb', '2']
  sides = [{'from': ('human', 'gpt')[n % 2], 'value': value} for n, value in enumerate(values)]
  record = {**RECORDS[0], 'media': RECORDS[7]['media'], 'conversations': sides}
  (beside,), (plain,) = (take(iterate([record] * 4, **options), 1) for options in ({'side_by_side': True}, {}))
  assert not beside.pop('branch_ids').any()
  assert beside.keys() == plain.keys() and all((beside[name] == plain[name]).all() for name in plain)

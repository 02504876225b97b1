"""Many questions about one image in one row: what they begin with once, then each question by itself.

A question is answered from the image alone, not from the answers to other questions, as if each had a row of its own;
but the image is encoded once. It is exact: no vision token depends on the text, and `types.Batch.branch_ids` keeps the
questions from seeing each other, in pre-fusion as in the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_mini_jax.data.conversation import MEDIA_TAG, Encoded, Turn, media_tags
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.types import IMAGE_TOKEN_ID


def one_question_each(turns: Sequence[Turn]) -> list[list[Turn]]:
  """A conversation -> one for every question in it, each with the `<image>` or `<video>` tag and a leading system turn.

  A last question without an answer is left out. A conversation with several tags, whose questions are about different
  images, stays whole.
  """
  lead, pairs, tags = taken_apart(turns)
  if not pairs or len(tags) > 1:
    return [list(turns)]
  return [[*lead, tagged(question, *tags), answer] for question, answer in pairs]


def taken_apart(turns: Sequence[Turn]) -> tuple[list[Turn], list[tuple[Turn, Turn]], list[str]]:
  """A conversation -> its leading system turn, if any; questions with their answers; all of its tags.

  A last question without an answer is left out.
  """
  lead = [turn for turn in turns[:1] if turn['role'] == 'system']
  body = turns[len(lead) :]
  return lead, list(zip(body[0::2], body[1::2], strict=False)), media_tags(body)


def tagged(question: Turn, tag: str | None = None) -> Turn:
  """The question with its tag, if any, replaced by `tag` in front."""
  if tag is None:
    return question
  return {**question, 'content': f'{tag}\n{without_tags(question)["content"]}'}


def without_tags(question: Turn) -> Turn:
  return {**question, 'content': MEDIA_TAG.sub('', question['content']).strip()}


def share_prefix(conversations: Sequence[Encoded], where: str) -> tuple[Encoded, np.ndarray]:
  """What the conversations begin with alike, then the rest of each.

  What is learnt is not shared, nor what it is predicted from.

  Args:
    conversations: at least one. where: names the sample in errors.
  Returns:
    The tokens of all, and branch ids int32[n] as `types.Batch.branch_ids`; a single conversation is shared as a whole.
  Raises:
    DataError: E_IMAGE_TAGS if an `<image>` stands where they differ: it would need slots of its own in every branch.
  """
  if len(conversations) == 1:
    return conversations[0], np.zeros(len(conversations[0].ids), np.int32)
  most = min(len(c.ids) for c in conversations) - 1  # every branch keeps a token
  ids, learn = (np.stack([getattr(c, name)[: most + 1] for c in conversations]) for name in ('ids', 'assistant'))
  differs = (ids != ids[0]).any(axis=0) | learn.any(axis=0)
  shared = min(most, int(np.argmax(differs)) if differs.any() else most)
  if learn[:, shared].any() and shared:
    shared -= 1
  if any((c.ids[shared:] == IMAGE_TOKEN_ID).any() for c in conversations):
    raise DataError(
      'E_IMAGE_TAGS', where, 'side by side: expected <image> in what the questions begin with alike; found it later'
    )
  parts = [(conversations[0].ids[:shared], conversations[0].assistant[:shared])]
  parts += [(c.ids[shared:], c.assistant[shared:]) for c in conversations]
  branch = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[0]) for part in parts])
  return Encoded(*(np.concatenate(column) for column in zip(*parts, strict=True))), branch

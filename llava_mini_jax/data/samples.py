"""One record and its random numbers -> one row.

Enters: a random-access source of `records.Record`. Leaves: the fields of `types.Batch` without B, as numpy arrays.
All that is random comes from the generator handed in; the rest is pure, so a process may remember it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import transformers
from PIL import Image

from llava_mini_jax.config import IMAGE_MEAN, LlavaMiniConfig
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.branches import one_question_each, share_prefix
from llava_mini_jax.data.conversation import (
  IMAGE_TAG,
  Encoded,
  Turn,
  check_targets,
  encode,
  load_template,
  turns_from_llava,
)
from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.data.records import Record
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.types import IMAGE_TOKEN_ID

CACHE_BYTES = 256 * 2**20  # of checked conversations and decoded images that a process keeps; the rest is read anew
_TURN_BYTES = 400  # what a turn's Python objects weigh, roughly
_MEAN_COLOR = np.rint(255 * np.asarray(IMAGE_MEAN)).astype(np.uint8)  # what the vision tower reads as zero


class Source(Protocol):
  """What `records.open_split` returns; a list of records will do too."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class _Sample:
  """A record, checked and decoded: what does not depend on random numbers."""

  where: str
  turns: list[Turn]
  images: list[np.ndarray]  # uint8[h w 3] each if they are to be augmented, else their views uint8[V H W 3]
  alone: list[Encoded]  # each question by itself, if they are to be laid side by side


@dataclasses.dataclass
class RowTransform:
  """Index of a record, and random numbers -> a row. Travels to worker processes without what it remembers.

  Attributes: as the arguments of `pipeline.make_iterator`.
  """

  source: Source
  tokenizer: transformers.PreTrainedTokenizerFast
  template: str | os.PathLike
  system: str | None
  model: LlavaMiniConfig
  row: RowShape
  processor: ImageProcessor
  augment: Augment | None = None
  max_turns: int | None = None
  side_by_side: bool = False

  def __post_init__(self):
    self._kept: dict[int, _Sample] = {}
    self._room = CACHE_BYTES

  def __reduce__(self):
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """-> {tokens, targets, loss_mask, segment_ids, positions: [L], pixels: uint8[M V H W 3], fuse_index, fuse_mask:
    [M T], slot_index: [M C]} and, side by side, branch_ids: [L].

    Raises DataError naming the sample, whatever is wrong with it.
    """
    sample = self._kept.get(index) or self._keep(index)
    encoded, branch = self._beside(sample, rng) if self.side_by_side else (self._in_turn(sample, rng), None)
    untagged = int(not sample.images and self.model.text_only == 'zero_image')
    fields = build_row(
      encoded.ids,
      encoded.assistant,
      self.row,
      where=sample.where,
      visuals_per_tag=[1] * len(sample.images),
      untagged=untagged,
      fuse_token_zero=self.model.prefusion.fuse_token_zero,
      branch=branch,
    )
    size = self.processor.size
    pixels = np.zeros((self.row.visuals, self.processor.views, size, size, 3), np.uint8)
    for i, image in enumerate(sample.images):
      pixels[i] = image if self.augment is None else self._augmented(image, rng)
    pixels[:untagged] = _MEAN_COLOR
    return {**fields, 'pixels': pixels}

  def _in_turn(self, sample: _Sample, rng: np.random.Generator) -> Encoded:
    turns = sample.turns
    if self.max_turns is not None:
      turns = choose_turns(turns, rng, self.max_turns)
    return self._encode(turns, sample.where)

  def _beside(self, sample: _Sample, rng: np.random.Generator) -> tuple[Encoded, np.ndarray]:
    """Questions in random order, as many as `max_turns` and the row hold; the first must fit."""
    order = rng.permutation(len(sample.alone))[: self.max_turns]
    encoded, branch = share_prefix([sample.alone[i] for i in order], sample.where)
    slots = self.row.tokens_per_visual - 1
    length = np.cumsum(np.where(encoded.ids == IMAGE_TOKEN_ID, 1 + slots, 1))
    fused = np.cumsum(~encoded.assistant & (encoded.ids != IMAGE_TOKEN_ID))
    fits = (length <= self.row.length) & (fused <= self.row.fused_text)
    last = branch[-1] if fits.all() else max(1, branch[np.argmin(fits)] - 1)
    kept = branch <= last
    return Encoded(encoded.ids[kept], encoded.assistant[kept]), branch[kept]

  def _encode(self, turns: list[Turn], where: str) -> Encoded:
    encoded = encode(self.tokenizer, load_template(self.template), turns, system=self.system, where=where)
    check_targets(encoded, where)
    return encoded

  def _augmented(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # uint8[V H W 3]
    return self.processor(Image.fromarray(self.augment(image, rng)))

  def _keep(self, index: int) -> _Sample:
    sample = self._read(index)
    size = sum(image.nbytes for image in sample.images)
    size += sum(_TURN_BYTES + len(turn['content']) for turn in sample.turns)
    size += sum(_TURN_BYTES + one.ids.nbytes + one.assistant.nbytes for one in sample.alone)
    if size <= self._room:
      self._room -= size
      self._kept[index] = sample
    return sample

  def _read(self, index: int) -> _Sample:
    record = self.source[index]
    where = f'sample {record["id"]!r}'
    images = [load_image(data, f'{where}: image {i}') for i, data in enumerate(record['images'])]
    convert = np.asarray if self.augment else self.processor
    turns = turns_from_llava(record['conversations'], where)
    alone = [self._encode(one, where) for one in one_question_each(turns)] if self.side_by_side else []
    return _Sample(where, turns, [convert(image) for image in images], alone)


def choose_turns(turns: Sequence[Turn], rng: np.random.Generator, most: int) -> list[Turn]:
  """Some of a conversation's questions, with their answers, in random order.

  For records that hold many independent questions about one image. The `<image>` tag moves to the front of the first
  question kept, and a leading system turn stays. A conversation with several tags is returned as it is: what its
  questions mean depends on their order.

  Args:
    most: how many question-answer pairs to keep: a number drawn from 1..most, or as many as there are.
  """
  lead = [turn for turn in turns[:1] if turn['role'] == 'system']
  body = turns[len(lead) :]
  pairs = list(zip(body[0::2], body[1::2], strict=False))  # a last question without an answer is left out
  tags = sum(turn['content'].count(IMAGE_TAG) for turn in body)
  if not pairs or tags > 1:
    return list(turns)
  most = min(most, len(pairs))
  count = int(rng.integers(1, most + 1))
  chosen = [dict(turn) for i in rng.permutation(len(pairs))[:count] for turn in pairs[i]]
  if tags:
    for question in chosen[0::2]:
      question['content'] = question['content'].replace(IMAGE_TAG, '').strip()
    chosen[0]['content'] = f'{IMAGE_TAG}\n{chosen[0]["content"]}'
  return lead + chosen

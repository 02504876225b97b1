"""One record and its random numbers -> one row.

Enters: a random-access source of `records.Record`. Leaves: the fields of `types.Batch` without B, as numpy arrays.
All that is random comes from the generator handed in; the rest is pure, so a process may remember it.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import transformers
from absl import logging

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.branches import one_question_each, share_prefix, tagged, taken_apart, without_tags
from llava_mini_jax.data.conversation import Encoded, Turn, check_targets, encode, load_template, turns_from_llava
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.features import Features, MixedFeatures
from llava_mini_jax.data.images import MEAN_COLOR
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.records import Record, place_of
from llava_mini_jax.data.rows import RowShape, build_row, cut, places
from llava_mini_jax.types import IMAGE_TOKEN_ID

CACHE_BYTES = 256 * 2**20  # of checked conversations and decoded images that a process keeps; the rest is read anew
_TURN_BYTES = 400  # what a turn's Python objects weigh, roughly


class Source(Protocol):
  """What `records.open_split` returns; a list of records, which cannot name a `place`, will do too."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class _Sample:
  """A record, checked and decoded: what does not depend on random numbers."""

  where: str
  turns: list[Turn]
  media: list[list[np.ndarray]]  # visuals of each tag: uint8[h w 3] to augment, uint8[V H W 3] or [V P W]
  alone: list[Encoded]  # each question by itself, if they are to be laid side by side


def _in_a_worker(transform: type[RowTransform], *fields) -> RowTransform:
  """A scheduler that ends a run sends SIGTERM to its workers too, whose batches it needs to come to a checkpoint: the
  first one is left alone. The second ends a worker, for that is what Python sends to those that are left over.
  """
  if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
  return transform(*fields)


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
  processor: MediaProcessor
  augment: Augment | None = None
  max_turns: int | None = None
  side_by_side: bool = False
  truncate: bool = False
  features: Features | MixedFeatures | None = None
  bad_sample: str = 'raise'

  def __post_init__(self):
    self._kept: dict[int, _Sample] = {}
    self._room = CACHE_BYTES

  def __reduce__(self):
    return _in_a_worker, (type(self), *(getattr(self, field.name) for field in dataclasses.fields(self)))

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """-> {tokens, targets, loss_mask, segment_ids, positions: [L], pixels: uint8[M V H W 3], fuse_index, fuse_mask:
    [M T], slot_index: [M C]} and, side by side, branch_ids: [L]. With features, features: [M V P W], and no pixels.

    Raises DataError naming the sample, whatever is wrong with it; unless bad samples are masked: then all of the row is
    padding, and bad_samples: int32[] says so.
    """
    if self.bad_sample == 'raise':
      return self._row(index, rng)
    try:
      return {**self._row(index, rng), 'bad_samples': np.int32(0)}
    except DataError as error:
      logging.warning('masked: %s', error)
      return {**self._padding(), 'bad_samples': np.int32(1)}

  def _row(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    sample = self._kept.get(index) or self._keep(index)
    encoded, branch = self._beside(sample, rng) if self.side_by_side else (self._in_turn(sample, rng), None)
    fields = self._lay_out(encoded, branch, sample.media, sample.where)
    visuals = self._no_visuals()
    shown = visuals['pixels' if self.features is None else 'features']
    for i, visual in enumerate(itertools.chain.from_iterable(self._views(visuals, rng) for visuals in sample.media)):
      shown[i] = visual
    if untagged := self._untagged(sample.media):
      shown[:untagged] = MEAN_COLOR if self.features is None else self.features.blank
    return fields | visuals

  def _no_visuals(self) -> dict[str, np.ndarray]:
    """The fields of visuals, empty."""
    views = (self.row.visuals, self.processor.images.views)
    if self.features is None:
      size = self.processor.images.size
      return {'pixels': np.zeros((*views, size, size, 3), np.uint8)}
    layout = self.features.layout
    shown = np.zeros((*views, *layout.shape[1:]), layout.dtype)
    return {'pixels': np.zeros((*views, 0, 0, 3), np.uint8), 'features': shown}

  def _padding(self) -> dict[str, np.ndarray]:
    """A row without a sample."""
    none = np.zeros(0, np.int64)
    fields = build_row(none, none.astype(bool), self.row, where='', branch=none if self.side_by_side else None)
    return fields | self._no_visuals()

  def _lay_out(
    self, encoded: Encoded, branch: np.ndarray | None, media: list[list[np.ndarray]], where: str
  ) -> dict[str, np.ndarray]:
    if branch is None:
      encoded = self._cut(encoded, media, where)
    fields = build_row(encoded.ids, encoded.assistant, self.row, branch=branch, **self._layout(media, where))
    if not fields['loss_mask'].any():
      raise _nothing_to_predict(where)
    return fields

  def _check_alone(self, encoded: Encoded, media: list[list[np.ndarray]], where: str) -> None:
    """Raises DataError if `_lay_out` of it, in a row of its own, would."""
    encoded = self._cut(encoded, media, where)
    at = places(encoded.ids, encoded.assistant, self.row, **self._layout(media, where))
    if not (encoded.assistant & ~at.is_tag & (at.start > 0)).any():
      raise _nothing_to_predict(where)

  def _cut(self, encoded: Encoded, media: list[list[np.ndarray]], where: str) -> Encoded:
    if not self.truncate or len(media) != (encoded.ids == IMAGE_TOKEN_ID).sum():
      return encoded
    return Encoded(*cut(encoded.ids, encoded.assistant, self.row, where=where, visuals_per_tag=list(map(len, media))))

  def _layout(self, media: list[list[np.ndarray]], where: str) -> dict[str, Any]:
    """What `build_row` and `places` are to know of a sample."""
    return dict(
      where=where,
      visuals_per_tag=list(map(len, media)),
      untagged=self._untagged(media),
      fuse_token_zero=self.model.prefusion.fuse_token_zero,
    )

  def _untagged(self, media: list[list[np.ndarray]]) -> int:
    """Visuals without slots that text alone is fused with."""
    return int(not media and self.model.text_only == 'zero_image')

  def _in_turn(self, sample: _Sample, rng: np.random.Generator) -> Encoded:
    turns = sample.turns
    if self.max_turns is not None:
      turns = choose_turns(turns, rng, self.max_turns)
    return self._encode(turns, sample.where)

  def _beside(self, sample: _Sample, rng: np.random.Generator) -> tuple[Encoded, np.ndarray]:
    """Questions in random order, at most `max_turns`; one that finds no room any more waits for another epoch."""
    order = rng.permutation(len(sample.alone))[: self.max_turns]
    encoded, branch = share_prefix([sample.alone[i] for i in order], sample.where)
    is_tag = encoded.ids == IMAGE_TOKEN_ID
    tokens = np.bincount(branch, ~is_tag)
    tokens[0] += self.row.tokens_per_visual * sum(map(len, sample.media))
    fused = np.bincount(branch, ~is_tag & ~encoded.assistant)
    kept, used = [0], np.array([tokens[0], fused[0]])
    for number in range(1, len(tokens)):
      needed = used + (tokens[number], fused[number])
      if len(kept) == 1 or (needed <= (self.row.length, self.row.fused_text)).all():
        kept.append(number)
        used = needed
    chosen = np.isin(branch, kept)
    return Encoded(encoded.ids[chosen], encoded.assistant[chosen]), np.searchsorted(kept, branch[chosen])

  def _encode(self, turns: list[Turn], where: str) -> Encoded:
    encoded = encode(self.tokenizer, load_template(self.template), turns, system=self.system, where=where)
    check_targets(encoded, where)
    return encoded

  def _views(self, visuals: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """uint8[V H W 3] each; the frames of a video are augmented alike."""
    if self.augment is None:
      return visuals
    seed = rng.integers(2**63)
    return [self.processor.views(self.augment(visual, np.random.default_rng(seed))) for visual in visuals]

  def _keep(self, index: int) -> _Sample:
    sample = self._read(index)
    size = sum(visual.nbytes for visuals in sample.media for visual in visuals)
    size += sum(_TURN_BYTES + len(turn['content']) for turn in sample.turns)
    size += sum(_TURN_BYTES + one.ids.nbytes + one.assistant.nbytes for one in sample.alone)
    if size <= self._room:
      self._room -= size
      self._kept[index] = sample
    return sample

  def _read(self, index: int) -> _Sample:
    record = self.source[index]
    where = f'sample {record["id"]!r}'
    if place := place_of(self.source, index):
      where = f'{place}: {where}'
    turns = turns_from_llava(record['conversations'], where)
    media = self.features[index] if self.features is not None else self._media(turns, record, where)
    alone = [self._encode(one, where) for one in one_question_each(turns)] if self.side_by_side else []
    for one in alone:  # else one too long would be refused in the epochs that begin with it, and left out in others
      self._check_alone(one, media, where)
    return _Sample(where, turns, media, alone)

  def _media(self, turns: list[Turn], record: Record, where: str) -> list[list[np.ndarray]]:
    media = self.processor.read_record(turns, record['media'], where)
    if self.augment is None:
      media = [[self.processor.views(visual) for visual in visuals] for visuals in media]
    return media


def _nothing_to_predict(where: str) -> DataError:
  """An assistant that says nothing but the first token."""
  return DataError('E_NO_TARGET', where, 'expected a token to learn that another precedes; found none')


def choose_turns(turns: Sequence[Turn], rng: np.random.Generator, most: int) -> list[Turn]:
  """Some of a conversation's questions, with their answers, in random order.

  For records that hold many independent questions about one image. The `<image>` tag moves to the front of the first
  question kept, and a leading system turn stays. A conversation with several tags is returned as it is: what its
  questions mean depends on their order.

  Args:
    most: how many question-answer pairs to keep: a number drawn from 1..most, or as many as there are.
  """
  lead, pairs, tags = taken_apart(turns)
  if not pairs or len(tags) > 1:
    return list(turns)
  most = min(most, len(pairs))
  count = int(rng.integers(1, most + 1))
  chosen = [dict(turn) for i in rng.permutation(len(pairs))[:count] for turn in pairs[i]]
  if tags:
    chosen[0::2] = map(without_tags, chosen[0::2])
    chosen[0] = tagged(chosen[0], *tags)
  return lead + chosen

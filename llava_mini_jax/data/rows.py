"""Lays samples out as Batch rows: expands image tags into slots and lists what each visual touches.

Enters: token ids with IMAGE_TOKEN_ID at every `<image>`, the mask of tokens to
learn, and how many visuals each tag stands for (1 for an image, one per frame
for a video). Leaves: one row of `types.Batch` as numpy arrays, pixels apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.types import IMAGE_TOKEN_ID


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The static sizes of a row: L tokens, M visuals, T fused text tokens per visual, C slots per visual."""

  length: int
  visuals: int
  fused_text: int
  tokens_per_visual: int

  @classmethod
  def for_model(
    cls, config: LlavaMiniConfig, *, length: int, visuals: int = 1, fused_text: int | None = None, views: int = 1
  ) -> RowShape:
    """T defaults to L: every text token may be an instruction. views: of each visual."""
    return cls(length, visuals, fused_text or length, config.slots_per_visual(views))


def build_row(
  ids: np.ndarray, learn: np.ndarray, shape: RowShape, *, branch: np.ndarray | None = None, **layout: Any
) -> dict[str, np.ndarray]:
  """One sample -> the non-pixel fields of one Batch row.

  Args:
    ids, learn, shape, layout: as `places`, which says what else there is to give.
    branch: int[n], as `Batch.branch_ids`, each branch in one piece after what is 0 (from `branches.share_prefix`).
  Returns:
    {tokens, targets, loss_mask, segment_ids, positions: [L], fuse_index, fuse_mask: [M T], slot_index: [M C]}
    and, with `branch`, branch_ids: [L].
  Raises:
    DataError: as `places`.
  """
  at = places(ids, learn, shape, **layout)
  is_tag, start, width = at.is_tag, at.start, at.width
  slots = [start[i] + np.arange(width[i]) for i in np.flatnonzero(is_tag)]
  expanded = None if branch is None else np.repeat(branch, width)
  return {
    **_text_fields(ids[~is_tag], learn[~is_tag], start[~is_tag], at.length, shape, expanded),
    **_visual_fields(np.concatenate(slots) if slots else np.zeros(0, np.int64), at.fused, at.visuals, shape),
  }


@dataclasses.dataclass(frozen=True)
class Places:
  """Where the parts of a sample come to lie in a row that holds them."""

  is_tag: np.ndarray  # bool[n]
  start: np.ndarray  # int64[n], the first place of each
  width: np.ndarray  # int64[n], the places of each: all slots of a tag, one of a token
  fused: np.ndarray  # int64[T at most], the places of the text that is fused
  length: int
  visuals: int


def places(
  ids: np.ndarray,
  learn: np.ndarray,
  shape: RowShape,
  *,
  where: str,
  visuals_per_tag: Sequence[int] | None = None,
  untagged: int = 0,
  fuse: np.ndarray | None = None,
  fuse_token_zero: bool = False,
) -> Places:
  """Whether a sample fits a row, and how it lies there.

  Args:
    ids: int[n], IMAGE_TOKEN_ID where an image or a video stands.
    learn: bool[n], True for tokens the model learns to produce; they are never fused.
    shape: the row's static sizes.
    where: names the sample in errors.
    visuals_per_tag: visuals of each tag in order (frames of a video); default 1 each.
    untagged: further visuals that the text is fused with but that have no slots (released training fuses text-only
      samples with pixels of zero; `LlavaMiniConfig.text_only`).
    fuse: bool[n], overrides which text tokens are fused (default: all that are not learnt).
    fuse_token_zero: whether a text token with id 0 may be fused (the released code masks it out).
  Raises:
    DataError: E_TOO_LONG if the tokens, visuals or fused tokens do not fit the row; E_IMAGE_TAGS if the number
      of tags is not that of `visuals_per_tag`.
  """
  is_tag = ids == IMAGE_TOKEN_ID
  tags = int(is_tag.sum())
  per_tag = np.ones(tags, np.int64) if visuals_per_tag is None else np.asarray(visuals_per_tag, np.int64)
  if len(per_tag) != tags:
    raise DataError('E_IMAGE_TAGS', where, f'expected {len(per_tag)} <image> tag(s) for its media; found {tags}')
  visuals = int(per_tag.sum()) + untagged
  if visuals > shape.visuals:
    raise DataError('E_TOO_LONG', where, f'expected at most {shape.visuals} visual(s) per row; found {visuals}')

  width = np.ones(len(ids), np.int64)
  width[is_tag] = per_tag * shape.tokens_per_visual
  start, length = np.cumsum(width) - width, int(width.sum())
  if length > shape.length:
    raise DataError('E_TOO_LONG', where, f'expected at most {shape.length} tokens with vision slots; found {length}')

  fusable = ~learn if fuse is None else fuse
  if not fuse_token_zero:
    fusable = fusable & (ids != 0)
  fused = start[fusable & ~is_tag]
  if visuals and len(fused) > shape.fused_text:
    raise DataError(
      'E_TOO_LONG', where, f'expected at most {shape.fused_text} instruction tokens to fuse; found {len(fused)}'
    )
  return Places(is_tag, start, width, fused, length, visuals)


def _text_fields(
  ids: np.ndarray, learn: np.ndarray, at: np.ndarray, length: int, shape: RowShape, branch: np.ndarray | None
) -> dict[str, np.ndarray]:
  """What lies along the row. ids, learn, at: of the text. branch: of every position in use, slots included."""
  tokens, learnt = np.zeros(shape.length, np.int32), np.zeros(shape.length, bool)
  tokens[at], learnt[at] = ids, learn
  position = np.arange(shape.length)
  inside = position < length

  branch_ids = np.zeros(shape.length, np.int32)
  branch_ids[:length] = 0 if branch is None else branch
  first = np.searchsorted(branch_ids[:length], branch_ids)  # where a position's branch begins
  position = position - np.where(branch_ids > 0, first - np.searchsorted(branch_ids[:length], 1), 0)

  goes_on = np.append(inside[1:] & (branch_ids[1:] == branch_ids[:-1]), False)
  fields = dict(
    tokens=tokens,
    targets=np.where(goes_on, np.roll(tokens, -1), 0).astype(np.int32),
    loss_mask=goes_on & np.roll(learnt, -1),
    segment_ids=inside.astype(np.int32),
    positions=np.where(inside, position, 0).astype(np.int32),
  )
  return fields if branch is None else fields | dict(branch_ids=branch_ids)


def _visual_fields(slots: np.ndarray, fused_at: np.ndarray, visuals: int, shape: RowShape) -> dict[str, np.ndarray]:
  """What joins visuals and row. slots: of the visuals that have some, in order. fused_at: the text of every visual."""
  fuse_index = np.full((shape.visuals, shape.fused_text), shape.length, np.int32)
  if visuals:
    fuse_index[:visuals, : len(fused_at)] = fused_at
  slot_index = np.full((shape.visuals, shape.tokens_per_visual), shape.length, np.int32)
  slot_index.reshape(-1)[: len(slots)] = slots
  return dict(fuse_index=fuse_index, fuse_mask=fuse_index < shape.length, slot_index=slot_index)


def cut(
  ids: np.ndarray, learn: np.ndarray, shape: RowShape, *, where: str, visuals_per_tag: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Leaves off what does not fit at the end of a sample (as `build_row` takes it), in L or in T, if that is text.

  Raises:
    DataError: E_TOO_LONG if an image or a video, or every token to learn, would be lost.
  """
  is_tag = ids == IMAGE_TOKEN_ID
  width = np.ones(len(ids), np.int64)
  width[is_tag] = shape.tokens_per_visual * np.asarray(visuals_per_tag, np.int64)
  fits = np.cumsum(width) <= shape.length
  if is_tag.any():
    fits &= np.cumsum(~is_tag & ~learn) <= shape.fused_text
  if fits.all():
    return ids, learn
  length = f'{int(width.sum())} tokens with vision slots, cut at {int(width[fits].sum())}'
  if is_tag[~fits].any():
    raise DataError('E_TOO_LONG', where, f'expected every <image> to fit; found {length}, which loses one')
  if not learn[fits].any():
    raise DataError('E_TOO_LONG', where, f'expected a token to learn to fit; found {length}, which loses all')
  return ids[fits], learn[fits]

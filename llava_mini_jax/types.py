"""What travels between the stations: the Batch, what was seen of visuals, and the key/value cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any

IMAGE_TOKEN_ID = -200  # stands for one `<image>` in token ids before the row layout expands it (as in LLaVA)

_pytree = functools.partial(jax.tree_util.register_dataclass)


@_pytree
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows of tokens, and the visuals they mention, joined by row-local indices.

  An index that lists nothing holds L (one past the row): gathers clip it,
  scatters drop it. Text-only rows have such indices throughout.
  """

  tokens: Array  # int32[B L]; each `<image>` already expanded to its C slots per visual (slots hold 0)
  targets: Array  # int32[B L]; the next token of the same sample
  loss_mask: Array  # bool[B L]; True where `targets` is learnt (assistant tokens)
  segment_ids: Array  # int32[B L]; which sample of the row, from 1; 0 = padding
  positions: Array  # int32[B L]; position within that sample
  pixels: Array  # uint8 or normalised float32 [B M V H W 3]; HD: crops in raster order, the whole image last
  fuse_index: Array  # int32[B M T]; where in its row the text tokens fused with visual m lie
  fuse_mask: Array  # bool[B M T]; False = no token
  slot_index: Array  # int32[B M C]; where in its row visual m's compressed tokens go
  # int32[B L]; 0 = seen by all that follows in its segment; k > 0 = the segment's k-th continuation, which sees what is
  # 0 and itself (positions continue from there). None = no row has continuations, known when compiling.
  branch_ids: Array | None = None
  # [B M V P W]; what the vision tower makes of the pixels, computed before. The tower is skipped, and `pixels` are
  # [B M V 0 0 3].
  features: Array | None = None
  # int32[B]; how many of each visual's C tokens count, the last ones of its slots; the others are seen by nobody and
  # count no position. None = all, known when compiling.
  kept: Array | None = None
  # int32[B]; samples of the row that were bad and left nothing but padding. None = a bad sample is an error.
  bad_samples: Array | None = None


@_pytree
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Static decoder cache. Slot s of row b holds the token s of those that row's only sample may see."""

  keys: Array  # [layer B S K H], rotary embedding applied
  values: Array  # [layer B S K H]
  length: Array  # int32[B]; valid slots of each row
  position: Array | None = None  # int32[B]; of the next token; None = length, which has seen all before it


@_pytree
@dataclasses.dataclass(frozen=True)
class Seen:
  """Visuals as text finds them: nothing of it depends on the text, so it serves every question about them."""

  compressed: Array  # [n C D]; what goes into their slots
  keys: Array  # [layer n S K H]; of the S = P' + C vision tokens in every pre-fusion layer, rotary embedding applied
  values: Array  # [layer n S K H]

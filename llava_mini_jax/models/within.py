"""Compression inside the decoder (paper Table 12): L layers see every patch, the others C tokens per visual.

Enters: the row of a batch, which has C slots per visual, with text embeddings; the projected patches of its visuals.
The first L layers run on [patches of all visuals; row] with positions and causality as if each visual's patches stood
where its slots are, which are left out. There the compressor reads the patches' hidden states, its tokens go into the
slots, and the other layers run on the row alone, with the row's own positions. All layers are the decoder's: the first
L take the place of pre-fusion, and may have pre-fusion before them. The paper says neither which L it used nor which
positions the later layers have, so these are choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.attention import AttentionMask
from llava_mini_jax.models.compressors import Compressor
from llava_mini_jax.models.decoder import Decoder, cache_of
from llava_mini_jax.types import Batch, KVCache


@dataclasses.dataclass(frozen=True)
class LongRows:
  """Rows of all patches, then the batch's rows: [B M·P + L]."""

  positions: jax.Array  # int32
  segment_ids: jax.Array  # int32; 0 = padding, the patches of visuals that are not there, slots
  branch_ids: jax.Array | None  # int32

  @property
  def mask(self) -> AttentionMask:
    return AttentionMask(self.segment_ids, self.segment_ids, self.branch_ids, order=self.positions)


def long_rows(batch: Batch, patches: int) -> LongRows:
  """Where patches of each visual and the tokens of a row stand; slot_index of `batch` has at least one slot."""
  (rows, length), c = batch.tokens.shape, batch.slot_index.shape[2]
  first = batch.slot_index[:, :, 0]  # int32[B M]
  there, at = first < length, jnp.minimum(first, length - 1)

  def take(of_row):
    return jnp.take_along_axis(of_row, at, axis=1)

  def earlier(places, segments):  # visuals of the same segment that stand before: [B n] -> int32[B n]
    same = (segments[:, :, None] == take(batch.segment_ids)[:, None]) & there[:, None]
    return (same & (first[:, None] < places[:, :, None])).sum(2)

  more = patches - c
  starts = take(batch.positions) + more * earlier(first, take(batch.segment_ids))
  of_patches = (starts[..., None] + jnp.arange(patches)).reshape(rows, -1)
  places = jnp.broadcast_to(jnp.arange(length), (rows, length))
  of_row = batch.positions + more * earlier(places, batch.segment_ids)

  is_slot = jax.vmap(lambda index: jnp.zeros(length, bool).at[index].set(True, mode='drop'))
  is_slot = is_slot(batch.slot_index.reshape(rows, -1))
  segments = jnp.repeat(jnp.where(there, take(batch.segment_ids), 0), patches, axis=1)
  segments = jnp.concatenate([segments, jnp.where(is_slot, 0, batch.segment_ids)], axis=1)
  branches = None if batch.branch_ids is None else jnp.pad(batch.branch_ids, ((0, 0), (of_patches.shape[1], 0)))
  return LongRows(jnp.concatenate([of_patches, of_row], axis=1), segments, branches)


def run_within(
  decoder: Decoder,
  compressor: Compressor | None,
  x: jax.Array,
  patches: jax.Array,
  batch: Batch,
  config: LlavaMiniConfig,
  keep: Callable,
) -> tuple[jax.Array, tuple[Any, Any]]:
  """All layers.

  Args:
    x: [B L D], with anything in the slots. patches: [B M P D]. compressor: None if M is 0.
    keep: as `Decoder.run`.
  Returns:
    [B L D] before the final norm, and what is kept of the layers before the compressor and of those behind it.
  """
  (rows, visuals, count, width), layer = patches.shape, config.compressor.within
  where = long_rows(batch, count)
  x = jnp.concatenate([patches.reshape(rows, -1, width), x], axis=1)
  x, early = decoder.run(x, where.positions, where.mask, layers=slice(layer), keep=keep)
  patches, x = x[:, : visuals * count], x[:, visuals * count :]
  if compressor is not None:
    crops = config.vision.num_patches * (batch.pixels.shape[2] - 1 or 1)
    compressed = compressor(patches.reshape(rows * visuals, count, width)[:, :crops]).reshape(rows, -1, width)
    put = jax.vmap(lambda row, at, new: row.at[at].set(new.astype(row.dtype), mode='drop'))
    x = put(x, batch.slot_index.reshape(rows, -1), compressed)
  mask = AttentionMask(batch.segment_ids, batch.segment_ids, batch.branch_ids)
  x, late = decoder.run(x, batch.positions, mask, layers=slice(layer, None), keep=keep)
  return x, (early, late)


def prefill_within(model: Any, batch: Batch, more: int) -> tuple[jax.Array, tuple[KVCache, KVCache]]:
  """A `LlavaMini` reads one prompt per row: normed hidden states [B L D], and the caches of both parts of the decoder.

  The first holds all patches, and positions in which they count; the other has C slots per visual.
  """
  x, (early, late) = model.run_within(batch, keep=lambda _, kv: kv)
  where = long_rows(batch, model.config.vision.num_patches * batch.pixels.shape[2])
  seen = where.segment_ids > 0
  first = cache_of(*early, seen, seen.shape[1], more)
  second = cache_of(*late, batch.segment_ids > 0, batch.tokens.shape[1], more)
  position = jnp.where(seen, where.positions, -1).max(1) + 1
  return model.decoder.norm(x), (dataclasses.replace(first, position=position), second)

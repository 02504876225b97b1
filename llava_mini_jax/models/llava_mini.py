"""LLaVA-Mini, the whole flow: encode_views → compress → project → prefuse → splice → decode.

Enters a `types.Batch`, leaves float32 logits. Source: paper Sec. 4 and the
released package; where they differ a config field decides (docs/fidelity.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.models.attention import AttentionMask
from llava_mini_jax.models.decoder import Decoder
from llava_mini_jax.models.prefusion import Prefusion
from llava_mini_jax.models.projector import Projector
from llava_mini_jax.models.vision import VisionTower
from llava_mini_jax.models.within import run_within
from llava_mini_jax.sharding import constrain
from llava_mini_jax.types import Batch, Seen


def to_raster(crops: jax.Array) -> jax.Array:
  """Features of r² crops in raster order [B r² P W] -> one raster of the whole image [B r²·P W]."""
  batch, views, patches, width = crops.shape
  r, n = math.isqrt(views), math.isqrt(patches)
  x = crops.reshape(batch, r, r, n, n, width).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, views * patches, width)


class LlavaMini(nnx.Module):
  def __init__(self, config: LlavaMiniConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.vision = VisionTower(
      config.vision,
      scan=config.scan.of('vision'),
      layers=config.compressor.layers if config.compressor_reads('layers') else (),
      class_attention=config.compressor_reads('class_attention'),
      rngs=rngs,
    )
    self.projector = Projector(config.vision.hidden_size, config.decoder.hidden_size, rngs=rngs)
    if config.new_tokens(1):
      self.compressor = config.compressor_class(config, rngs=rngs)
    scan, attention = config.scan, config.attention
    self.decoder = Decoder(config.decoder, scan=scan, attention=attention, rngs=rngs)
    if config.prefusion.num_layers:
      self.prefusion = Prefusion(
        config.prefusion, config.decoder, scan=scan.of('prefusion'), attention=attention, rngs=rngs
      )
      if config.prefusion.init == 'decoder':
        first = jax.tree.map(lambda leaf: leaf[: config.prefusion.num_layers], nnx.state(self.decoder.layers))
        nnx.update(self.prefusion.layers, first)

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(self.config.dtype)

  def __call__(self, batch: Batch) -> jax.Array:
    """Batch -> float32 logits [B L vocab]."""
    return self.decoder.logits(self.hidden(batch))

  def hidden(self, batch: Batch) -> jax.Array:
    """Batch -> the decoder's normed hidden states [B L D]."""
    if self.config.compressor.within:
      return self.decoder.norm(self.run_within(batch, keep=lambda *_: None)[0])
    x, batch = self.rows(batch)
    return self.decoder(x, batch.positions, batch.segment_ids, batch.branch_ids, self.roles(batch))

  def roles(self, batch: Batch) -> jax.Array | None:
    """What tokens of a row are to each other, int32[B L], where the decoder itself compresses; else None."""
    kind = self.config.compressor_class
    return kind.roles(self.config.compressor, batch) if kind and kind.in_decoder and batch.pixels.shape[1] else None

  def run_within(self, batch: Batch, keep: Callable) -> tuple[jax.Array, tuple]:
    """Every layer of a decoder that compresses inside: [B L D], and what is kept; see `within.run`."""
    text = self.decoder.embed(batch.tokens, self.dtype)
    visuals, views = batch.pixels.shape[1:3]
    if not visuals:
      patches = jnp.zeros((len(text), 0, self.config.vision.num_patches * views, text.shape[2]), text.dtype)
      return run_within(self.decoder, None, text, patches, batch, self.config, keep)
    without_slots = dataclasses.replace(batch, slot_index=batch.slot_index[:, :, :0])
    x, patches, _ = self._spliced(text, without_slots)
    return run_within(self.decoder, self.compressor, x, patches, batch, self.config, keep)

  def embed(self, batch: Batch) -> jax.Array:
    """Batch -> decoder input [B L D]: raw text, fused instructions, compressed tokens in their slots."""
    return self.rows(batch)[0]

  def rows(self, batch: Batch) -> tuple[jax.Array, Batch]:
    """`embed`, and the batch with the positions and segments that hold once unused slots are left out.

    Raises ConfigError where the decoder compresses inside: its first layers read more than one row.
    """
    if self.config.compressor.within:
      raise ConfigError(f'rows of the decoder: expected compressor.within=0; found {self.config.compressor.within}')
    text = self.decoder.embed(batch.tokens, self.dtype)
    if not batch.pixels.shape[1]:
      return text, batch
    x, _, kept = self._spliced(text, batch)
    return x, batch if kept is None else without_unused_slots(batch, kept)

  def _spliced(self, text: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    if self.config.detach_text:
      text = jax.lax.stop_gradient(text)
    if batch.branch_ids is not None and self.config.compressor_reads('text'):
      kind = self.config.compressor.kind
      raise ConfigError(f'compressor.kind={kind}: expected a question per row; found several side by side')
    compressed, fused, kept = self.see(text, batch)
    if self.config.video_stop_grad and batch.pixels.shape[1] > 1:
      compressed, fused = jax.lax.stop_gradient((compressed, fused))
    return splice(text, compressed[:, :, : batch.slot_index.shape[2]], fused, batch), compressed, kept

  def see(self, text: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Every visual of a batch with its text.

    Returns:
      Compressed tokens [B M C D], the sum of fused text float32[B L D], and int32[B M] how many of the C tokens count,
      the last ones; None = all.

    At most `visual_chunk` visuals of each row are in memory at a time; in the backward pass they are seen again.
    """
    views = batch.pixels if batch.features is None else batch.features
    visuals, chunk = views.shape[1], self.config.visual_chunk

    def see_from(start, count):
      some, index, mask = (
        jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) for x in (views, batch.fuse_index, batch.fuse_mask)
      )
      return self._see_some(text, some, index, mask, batch)

    if not 0 < chunk < visuals:
      compressed, fused, kept = see_from(0, visuals)
      return compressed, sum_at(fused, batch.fuse_index, text.shape[1]), kept

    total = jnp.zeros(text.shape, jnp.float32)

    def body(total, start):
      compressed, fused, kept = jax.checkpoint(see_from, static_argnums=1)(start, chunk)
      index = jax.lax.dynamic_slice_in_dim(batch.fuse_index, start, chunk, axis=1)
      return total + sum_at(fused, index, text.shape[1]), (compressed, kept)

    def joined(x):  # [chunks B m ...] -> [B chunks·m ...]
      return jnp.moveaxis(x, 0, 1).reshape(text.shape[0], -1, *x.shape[3:])

    whole = visuals // chunk
    total, found = jax.lax.scan(body, total, chunk * jnp.arange(whole))
    found = jax.tree.map(joined, found)
    if rest := visuals - whole * chunk:
      last, fused, kept = see_from(whole * chunk, rest)
      total += sum_at(fused, batch.fuse_index[:, whole * chunk :], text.shape[1])
      found = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), found, (last, kept))
    return found[0], total, found[1]

  def _see_some(self, text, views, fuse_index, fuse_mask, batch: Batch):
    """Some visuals of every row, as pixels or as features: compressed [B m C D], fused text [B m T D], kept [B m]."""
    rows, visuals = views.shape[:2]

    def fused_with_visual(of_tokens):  # [B L ...] -> [B·m T ...]
      index = fuse_index.reshape(rows, -1, *(1,) * (of_tokens.ndim - 2))
      found = jnp.take_along_axis(of_tokens, index, axis=1, mode='clip')
      return found.reshape(rows * visuals, -1, *of_tokens.shape[2:])

    views = views.reshape(rows * visuals, *views.shape[2:])
    features = views.astype(self.dtype) if views.ndim == 4 else self.encode_views(views)
    branch_ids = None if batch.branch_ids is None else fused_with_visual(batch.branch_ids)
    text_mask = fuse_mask.reshape(rows * visuals, -1)
    kept = None if batch.kept is None else jnp.repeat(batch.kept, visuals, total_repeat_length=rows * visuals)
    found = self._fuse(features, fused_with_visual(text), text_mask, branch_ids, kept)
    return jax.tree.map(lambda x: x.reshape(rows, visuals, *x.shape[1:]), found)

  def encode_views(self, pixels: jax.Array) -> jax.Array:
    """pixels [B V height width 3] -> CLIP patch features [B V P W]."""
    batch, views = pixels.shape[:2]
    features = self.vision(pixels.reshape(batch * views, *pixels.shape[2:]), self.dtype)
    return features.reshape(batch, views, *features.shape[1:])

  def compress(
    self,
    features: jax.Array,
    text: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    return_attention: bool = False,
  ):
    """features [B V P W'] -> patches [B P' D] for pre-fusion and the compressor's tokens [B C D], both projected.

    With several views P' = [all crops as one raster; the whole image], and the crops' raster alone is compressed.
    Without a compressor there are no tokens of its own. `return_attention` adds its head-mean attention
    float32[B C keys]. text [B T D], text_mask bool[B T]: what a compressor that reads the text is given.

    Raises ConfigError for `return_attention` unless `config.compressor_attends`.
    """
    if return_attention and not self.config.compressor_attends:
      found = f'kind={self.config.compressor.kind!r}, within={self.config.compressor.within}'
      raise ConfigError(f'attention of the compressor: expected one that attends to patches; found {found}')
    patches, compressed, more = self._compress(features, text, text_mask, return_attention=return_attention)
    return patches, compressed, *(more if return_attention else ())

  def _compress(self, features, text, text_mask, *, return_attention: bool = False):
    width, several = self.config.vision.hidden_size, features.shape[1] > 1
    whole = features[:, -1]
    keys = to_raster(features[:, :-1]) if several else whole
    patches = self.projector(whole[..., :width])
    if several:
      detail = self.projector(keys[..., :width])
      patches = jnp.concatenate([detail, patches], axis=1)
    if self.config.compressor.within or not self.config.new_tokens(features.shape[1]):
      return patches, patches[:, :0], ()
    extras = keys[..., width:]
    options = dict(text=(text, text_mask), project=self.projector, layers=extras, class_attention=extras)
    options = {name: options[name] for name in self.compressor.reads}
    if return_attention:
      options['return_attention'] = True
    keys = keys[..., :width]
    if self.config.compressor.space == 'llm':
      keys = detail if several else patches
    compressed = self.compressor(keys, **options)
    compressed, *more = compressed if isinstance(compressed, tuple) else (compressed,)
    if self.config.compressor.space == 'vision' and not self.compressor.projects:
      compressed = self.projector(compressed)
    return patches, compressed, tuple(more)

  def fuse(
    self, features: jax.Array, text: jax.Array, text_mask: jax.Array, branch_ids: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """One visual with the instruction tokens that belong to it.

    Args:
      features: [B V P W']. text: [B T D] raw embeddings. text_mask: bool[B T].
      branch_ids: int[B T], as `types.Batch`; vision is seen by every branch.
    Returns:
      compressed tokens [B C D], fused text [B T D] (what stands at masked tokens means nothing).
    """
    return self._fuse(features, text, text_mask, branch_ids, None)[:2]

  def _fuse(self, features, text, text_mask, branch_ids, kept):
    """`fuse`, and kept int32[B], how many of the compressed tokens count: the last ones, as it leaves them."""
    patches, compressed, more = self._compress(features, text, text_mask)
    kept = more[0] if more else kept
    if kept is not None:  # the compressor gives those that count first
      last = jnp.arange(compressed.shape[1]) + kept[:, None]
      compressed = jnp.take_along_axis(compressed, (last % compressed.shape[1])[..., None], axis=1)
    vision = jnp.concatenate([patches, compressed], axis=1)
    within = self.config.compressor.within  # then all patches go to the decoder
    first = 0 if within else vision.shape[1] - self.config.slots_per_visual(features.shape[1])
    if not self.config.prefusion.num_layers:
      return vision[:, first:], text, kept
    fuse_compressed = self.config.prefusion.fuse_compressed
    seen = vision if fuse_compressed else patches
    valid = jnp.ones(seen.shape[:2], bool)
    if kept is not None and fuse_compressed:
      valid = jnp.arange(seen.shape[1])[::-1] < kept[:, None]
      valid |= jnp.arange(seen.shape[1]) < patches.shape[1]
    if branch_ids is not None:
      branch_ids = jnp.pad(branch_ids, ((0, 0), (seen.shape[1], 0)))
    x = jnp.concatenate([seen, text], axis=1)
    valid = jnp.concatenate([valid, text_mask], axis=1)
    slots = seen.shape[1] - first if fuse_compressed else 0
    x = self.prefusion(constrain(x, 'batch', 'length', 'act_embed'), valid, branch_ids, last=slots + text.shape[1])
    return x[:, :slots] if fuse_compressed else vision[:, first:], x[:, slots:], kept

  def see_once(self, features: jax.Array) -> Seen:
    """Features [n V P W] -> what any text finds of these visuals: the part of `fuse` before the text."""
    patches, compressed, _ = self._compress(features, None, None)
    vision = jnp.concatenate([patches, compressed], axis=1)
    first = vision.shape[1] - self.config.slots_per_visual(features.shape[1])
    if not self.config.prefusion.num_layers:
      nothing = jnp.zeros((0, len(features), 0, self.config.decoder.num_key_value_heads, 1), self.dtype)
      return Seen(vision[:, first:], nothing, nothing)
    fuse_compressed = self.config.prefusion.fuse_compressed
    seen = vision if fuse_compressed else patches
    slots = seen.shape[1] - first if fuse_compressed else 0
    x, keys, values = self.prefusion.see(constrain(seen, 'batch', 'length', 'act_embed'), slots)
    return Seen(x if fuse_compressed else vision[:, first:], keys, values)

  def read(self, text: jax.Array, seen: Seen) -> jax.Array:
    """Raw embeddings [n T D], each with its visual -> fused text [n T D], as `fuse` gives it. Padding comes last."""
    return self.prefusion.read(text, seen.keys, seen.values) if self.config.prefusion.num_layers else text


def without_unused_slots(batch: Batch, kept: jax.Array) -> Batch:
  """Of C slots of each visual the last kept, int32[B M], count: the others become padding, and take no position."""
  c = batch.slot_index.shape[2]
  unused = jnp.arange(c) < c - kept[..., None]  # bool[B M C]

  def one_row(index, unused):
    return jnp.zeros(batch.tokens.shape[1], bool).at[index.reshape(-1)].set(unused.reshape(-1), mode='drop')

  unused = jax.vmap(one_row)(batch.slot_index, unused)
  before = AttentionMask(batch.segment_ids, batch.segment_ids).allowed() & unused[:, None, :]  # bool[B L L]
  segments = jnp.where(unused, 0, batch.segment_ids)
  return dataclasses.replace(batch, positions=batch.positions - before.sum(2), segment_ids=segments)


def sum_at(fused: jax.Array, fuse_index: jax.Array, length: int) -> jax.Array:
  """fused [B m T D] added up where in their row the tokens lie, int[B m T]: float32[B L D]."""

  def one_row(fused, index):
    total = jnp.zeros((length, fused.shape[-1]), jnp.float32)
    return total.at[index.reshape(-1)].add(fused.reshape(-1, fused.shape[-1]).astype(jnp.float32), mode='drop')

  return jax.vmap(one_row)(fused, fuse_index)


def splice(text: jax.Array, compressed: jax.Array, fused: jax.Array, batch: Batch) -> jax.Array:
  """Puts fused text and compressed tokens where the batch's indices say.

  A token listed by k visuals gets the float32 mean of its k fused states (k = frames
  for a video, paper Sec. 4.2); one listed by none keeps its raw embedding.

  Args:
    text: raw embeddings [B L D]. compressed: [B M C D]. fused: their sum float32[B L D].
  Returns:
    [B L D] in the dtype of `text`.
  """

  def one_row(text, compressed, fused, fuse_index, slot_index):
    count = jnp.zeros(text.shape[:1], jnp.float32).at[fuse_index.reshape(-1)].add(1.0, mode='drop')[:, None]
    row = jnp.where(count > 0, fused / jnp.maximum(count, 1.0), text.astype(jnp.float32)).astype(text.dtype)
    return row.at[slot_index].set(compressed.astype(text.dtype), mode='drop')

  x = jax.vmap(one_row)(text, compressed, fused, batch.fuse_index, batch.slot_index)
  return constrain(x, 'batch', 'length', 'act_embed')


def build(config: LlavaMiniConfig, key: jax.Array) -> LlavaMini:
  """A randomly initialised model; under `nnx.eval_shape` it costs nothing at any size."""
  return LlavaMini(config, rngs=nnx.Rngs(key))

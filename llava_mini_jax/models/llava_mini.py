"""LLaVA-Mini, the whole flow: encode_views → compress → project → prefuse → splice → decode.

Enters a `types.Batch`, leaves float32 logits. Source: paper Sec. 4 and the
released package; where they differ a config field decides (docs/fidelity.md).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.compressor import QueryCompressor
from llava_mini_jax.models.decoder import Decoder
from llava_mini_jax.models.prefusion import Prefusion
from llava_mini_jax.models.projector import Projector
from llava_mini_jax.models.vision import VisionTower
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
    self.vision = VisionTower(config.vision, scan=config.scan.of('vision'), rngs=rngs)
    self.projector = Projector(config.vision.hidden_size, config.decoder.hidden_size, rngs=rngs)
    if config.compressor.kind == 'query':
      self.compressor = QueryCompressor(config.compressor, config.compressor_width, rngs=rngs)
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
    return self.decoder(self.embed(batch), batch.positions, batch.segment_ids, batch.branch_ids)

  def embed(self, batch: Batch) -> jax.Array:
    """Batch -> decoder input [B L D]: raw text, fused instructions, compressed tokens in their slots."""
    text = self.decoder.embed(batch.tokens, self.dtype)
    rows, visuals = batch.pixels.shape[:2]
    if not visuals:
      return text
    if self.config.detach_text:
      text = jax.lax.stop_gradient(text)
    compressed, fused = self.see(text, batch)
    if self.config.video_stop_grad and visuals > 1:
      compressed, fused = jax.lax.stop_gradient((compressed, fused))
    return splice(text, compressed, fused, batch)

  def see(self, text: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Every visual of a batch with its text: compressed tokens [B M C D], and the sum of fused text float32[B L D].

    At most `visual_chunk` visuals of each row are in memory at a time; in the backward pass they are seen again.
    """
    views = batch.pixels if batch.features is None else batch.features
    visuals, chunk = views.shape[1], self.config.visual_chunk

    def see_from(start, count):
      some, index, mask = (
        jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) for x in (views, batch.fuse_index, batch.fuse_mask)
      )
      return self._see_some(text, some, index, mask, batch.branch_ids)

    if not 0 < chunk < visuals:
      compressed, fused = see_from(0, visuals)
      return compressed, sum_at(fused, batch.fuse_index, text.shape[1])

    total = jnp.zeros(text.shape, jnp.float32)

    def body(total, start):
      compressed, fused = jax.checkpoint(see_from, static_argnums=1)(start, chunk)
      index = jax.lax.dynamic_slice_in_dim(batch.fuse_index, start, chunk, axis=1)
      return total + sum_at(fused, index, text.shape[1]), compressed

    whole = visuals // chunk
    total, compressed = jax.lax.scan(body, total, chunk * jnp.arange(whole))
    compressed = jnp.moveaxis(compressed, 0, 1).reshape(text.shape[0], whole * chunk, *compressed.shape[3:])
    if rest := visuals - whole * chunk:
      last, fused = see_from(whole * chunk, rest)
      total += sum_at(fused, batch.fuse_index[:, whole * chunk :], text.shape[1])
      compressed = jnp.concatenate([compressed, last], axis=1)
    return compressed, total

  def _see_some(self, text, views, fuse_index, fuse_mask, branch_ids) -> tuple[jax.Array, jax.Array]:
    """Some visuals of every row, as pixels or as features: compressed [B m C D], fused text [B m T D]."""
    rows, visuals = views.shape[:2]

    def fused_with_visual(of_tokens):  # [B L ...] -> [B·m T ...]
      index = fuse_index.reshape(rows, -1, *(1,) * (of_tokens.ndim - 2))
      found = jnp.take_along_axis(of_tokens, index, axis=1, mode='clip')
      return found.reshape(rows * visuals, -1, *of_tokens.shape[2:])

    views = views.reshape(rows * visuals, *views.shape[2:])
    features = views.astype(self.dtype) if views.ndim == 4 else self.encode_views(views)
    branch_ids = None if branch_ids is None else fused_with_visual(branch_ids)
    text_mask = fuse_mask.reshape(rows * visuals, -1)
    compressed, fused = self.fuse(features, fused_with_visual(text), text_mask, branch_ids)
    return compressed.reshape(rows, visuals, *compressed.shape[1:]), fused.reshape(rows, visuals, *fused.shape[1:])

  def encode_views(self, pixels: jax.Array) -> jax.Array:
    """pixels [B V height width 3] -> CLIP patch features [B V P W]."""
    batch, views = pixels.shape[:2]
    features = self.vision(pixels.reshape(batch * views, *pixels.shape[2:]), self.dtype)
    return features.reshape(batch, views, *features.shape[1:])

  def compress(self, features: jax.Array, *, return_attention: bool = False):
    """features [B V P W] -> patches [B P' D] for pre-fusion and compressed tokens [B C D], both projected.

    With several views P' = [all crops as one raster; the whole image], and the crops' raster alone is compressed.
    `return_attention` adds the compressor's head-mean attention float32[B C keys].
    """
    whole = features[:, -1]
    keys = to_raster(features[:, :-1]) if features.shape[1] > 1 else whole
    patches = self.projector(whole)
    if features.shape[1] > 1:
      detail = self.projector(keys)
      patches = jnp.concatenate([detail, patches], axis=1)
    if self.config.compressor.kind == 'none':
      return patches, patches
    if self.config.compressor.space == 'llm':
      keys = detail if features.shape[1] > 1 else patches
    compressed, attention = self.compressor(keys, return_attention=True)
    if self.config.compressor.space == 'vision':
      compressed = self.projector(compressed)
    return (patches, compressed, attention) if return_attention else (patches, compressed)

  def fuse(
    self, features: jax.Array, text: jax.Array, text_mask: jax.Array, branch_ids: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """One visual with the instruction tokens that belong to it.

    Args:
      features: [B V P W]. text: [B T D] raw embeddings. text_mask: bool[B T].
      branch_ids: int[B T], as `types.Batch`; vision is seen by every branch.
    Returns:
      compressed tokens [B C D], fused text [B T D] (what stands at masked tokens means nothing).
    """
    patches, compressed = self.compress(features)
    if not self.config.prefusion.num_layers:
      return compressed, text
    fuse_compressed = self.config.prefusion.fuse_compressed
    separate = fuse_compressed and self.config.compressor.kind != 'none'
    x = jnp.concatenate([patches, compressed, text] if separate else [patches, text], axis=1)
    seen = x.shape[1] - text.shape[1]
    valid = jnp.concatenate([jnp.ones((x.shape[0], seen), bool), text_mask], axis=1)
    if branch_ids is not None:
      branch_ids = jnp.pad(branch_ids, ((0, 0), (seen, 0)))
    x = self.prefusion(constrain(x, 'batch', 'length', 'act_embed'), valid, branch_ids)
    return x[:, seen - compressed.shape[1] : seen] if fuse_compressed else compressed, x[:, seen:]

  def see_once(self, features: jax.Array) -> Seen:
    """Features [n V P W] -> what any text finds of these visuals: the part of `fuse` before the text."""
    patches, compressed = self.compress(features)
    if not self.config.prefusion.num_layers:
      nothing = jnp.zeros((0, len(features), 0, self.config.decoder.num_key_value_heads, 1), self.dtype)
      return Seen(compressed, nothing, nothing)
    fuse_compressed = self.config.prefusion.fuse_compressed
    separate = fuse_compressed and self.config.compressor.kind != 'none'
    x = jnp.concatenate([patches, compressed], axis=1) if separate else patches
    x, keys, values = self.prefusion.see(constrain(x, 'batch', 'length', 'act_embed'))
    return Seen(x[:, -compressed.shape[1] :] if fuse_compressed else compressed, keys, values)

  def read(self, text: jax.Array, seen: Seen) -> jax.Array:
    """Raw embeddings [n T D], each with its visual -> fused text [n T D], as `fuse` gives it. Padding comes last."""
    return self.prefusion.read(text, seen.keys, seen.values) if self.config.prefusion.num_layers else text


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

"""Llama decoder: embeddings in, hidden states out, and the two ends that know the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import DecoderConfig, ScanConfig
from llava_mini_jax.models.attention import AttentionMask
from llava_mini_jax.models.layers import LlamaLayer, RMSNorm, param, rope_tables, scan_layers, stack_layers
from llava_mini_jax.sharding import constrain
from llava_mini_jax.types import KVCache


class Decoder(nnx.Module):
  def __init__(self, config: DecoderConfig, *, scan: ScanConfig, attention: str = 'auto', rngs: nnx.Rngs):
    self.config = config
    self.scan = scan
    self.attention = attention
    init = nnx.initializers.normal(config.initializer_range)
    self.embed_tokens = param(rngs, init, (config.vocab_size, config.hidden_size), ('vocab', 'embed'))
    self.layers = stack_layers(lambda rngs: LlamaLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
    self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
    if not config.tie_word_embeddings:
      self.lm_head = param(rngs, init, (config.hidden_size, config.vocab_size), ('embed', 'vocab'))

  def embed(self, tokens: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """int[B L] -> [B L D]."""
    # A gather from a table sharded on both axes would rematerialise it whole; gather its width first.
    table = constrain(self.embed_tokens[...].astype(dtype), 'vocab', None)
    return constrain(jnp.take(table, tokens, axis=0), 'batch', 'length', 'act_embed')

  def head(self) -> jax.Array:
    """float32[D vocab]: what normed hidden states are multiplied with."""
    return self.embed_tokens[...].T if self.config.tie_word_embeddings else self.lm_head[...]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Normed hidden states [B L D] -> float32[B L vocab]."""
    head = self.head().astype(hidden.dtype)
    logits = jnp.einsum('BLD,DV->BLV', hidden, head, preferred_element_type=jnp.float32)
    return constrain(logits, 'batch', 'length', 'act_vocab')

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    branch_ids: jax.Array | None = None,
    roles: jax.Array | None = None,
    *,
    return_hidden: bool = False,
  ):
    """Teacher-forced pass over packed rows: a token sees earlier tokens of its own segment, other branches apart.

    Args:
      x: embeddings [B L D]. positions, segment_ids, branch_ids: int[B L], see `types.Batch`; segment 0 = padding.
      roles: int32[B L], see `AttentionMask`.
      return_hidden: also give each layer's output.
    Returns:
      Normed hidden states [B L D]; with `return_hidden`, also [layer B L D] before the final norm.
    """
    # Padding is a segment too, which sees itself alone: no query is without a key.
    mask = AttentionMask(segment_ids, segment_ids, branch_ids, roles)
    x, hidden = self.run(x, positions, mask, keep=lambda x, _: x if return_hidden else None)
    return (self.norm(x), hidden) if return_hidden else self.norm(x)

  def run(
    self, x: jax.Array, positions: jax.Array, mask: AttentionMask, *, layers: slice | None = None, keep: Callable
  ) -> tuple[jax.Array, Any]:
    """Layers, all or some, without the final norm.

    Args:
      x: [B L D]. positions: int[B L].
      keep: (output of a layer [B L D], its keys and values [B L K H]) -> what is wanted of it.
    Returns:
      [B L D], and what is kept of all layers, [layer ...].
    """
    mask = mask.resolve(self.attention, self.config.head_dim)
    rope = rope_tables(positions, self.config)

    def body(x, layer):
      x, kv = layer(x, rope, mask)
      return x, keep(x, kv)

    some = self.layers if layers is None else jax.tree.map(lambda leaf: leaf[layers], self.layers)
    return scan_layers(body, x, some, self.scan)

  def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros: keys and values [layer rows slots K H]."""
    c = self.config
    shape = (c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))

  def extend(
    self, x: jax.Array, count: jax.Array, cache: KVCache | tuple[KVCache, ...]
  ) -> tuple[jax.Array, KVCache | tuple[KVCache, ...]]:
    """Appends the first `count` of x's tokens to every row's cache: the prompt, or one new token.

    Args:
      x: embeddings [B L D], right-padded. count: int[B], how many of L are real.
      cache: slots for what came before; S must hold what is appended. Several: of layers one after the other.
    Returns:
      Normed hidden states [B L D] (those past `count` mean nothing) and the longer cache.
    """
    if isinstance(cache, KVCache):
      x, cache = self._extend(x, count, cache, self.layers)
      return self.norm(x), cache
    longer, first = [], 0
    for part in cache:
      of_part = slice(first, first := first + part.keys.shape[0])
      x, part = self._extend(x, count, part, jax.tree.map(lambda leaf, of_part=of_part: leaf[of_part], self.layers))
      longer.append(part)
    return self.norm(x), tuple(longer)

  def _extend(self, x, count, cache: KVCache, layers) -> tuple[jax.Array, KVCache]:
    slots = cache.keys.shape[2]
    step = jnp.arange(x.shape[1])
    places = cache.length[:, None] + step
    mask = (jnp.arange(slots) <= places[:, :, None])[:, None]
    write_at = jnp.where(step < count[:, None], places, slots)
    rope = rope_tables(places if cache.position is None else cache.position[:, None] + step, self.config)

    def body(x, layer_and_cache):
      layer, keys, values = layer_and_cache
      return layer(x, rope, mask, (keys, values, write_at))

    x, (keys, values) = scan_layers(body, x, (layers, cache.keys, cache.values), self.scan)
    position = None if cache.position is None else cache.position + count
    return x, dataclasses.replace(cache, keys=keys, values=values, length=cache.length + count, position=position)


def cache_of(keys: jax.Array, values: jax.Array, seen: jax.Array, room: int, more: int) -> KVCache:
  """A cache of what new tokens see, in its order, and `more` free slots behind it.

  Args:
    keys, values: [layer B S K H], rotary embedding applied. seen: bool[B S], at most `room` of each row.
  """
  order = jnp.argsort(~seen, axis=1, stable=True)[:, :room]

  def take(x):
    x = jnp.take_along_axis(x, order[None, :, :, None, None], axis=2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))

  return KVCache(take(keys), take(values), seen.sum(1).astype(jnp.int32))

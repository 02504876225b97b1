"""Llama decoder: embeddings in, hidden states out, and the two ends that know the vocabulary."""

from __future__ import annotations

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
    *,
    return_hidden: bool = False,
  ):
    """Teacher-forced pass over packed rows: a token sees earlier tokens of its own segment, other branches apart.

    Args:
      x: embeddings [B L D]. positions, segment_ids, branch_ids: int[B L], see `types.Batch`; segment 0 = padding.
      return_hidden: also give each layer's output.
    Returns:
      Normed hidden states [B L D]; with `return_hidden`, also [layer B L D] before the final norm.
    """
    # Padding is a segment too, which sees itself alone: no query is without a key.
    mask = AttentionMask(segment_ids, segment_ids, branch_ids).resolve(self.attention, self.config.head_dim)
    rope = rope_tables(positions, self.config)

    def body(x, layer):
      x, _ = layer(x, rope, mask)
      return x, x if return_hidden else None

    x, hidden = scan_layers(body, x, self.layers, self.scan)
    return (self.norm(x), hidden) if return_hidden else self.norm(x)

  def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros: keys and values [layer rows slots K H]."""
    c = self.config
    shape = (c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))

  def extend(self, x: jax.Array, count: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Appends the first `count` of x's tokens to every row's cache: the prompt, or one new token.

    Args:
      x: embeddings [B L D], right-padded. count: int[B], how many of L are real.
      cache: slots for what came before; S must hold what is appended.
    Returns:
      Normed hidden states [B L D] (those past `count` mean nothing) and the longer cache.
    """
    slots = cache.keys.shape[2]
    step = jnp.arange(x.shape[1])
    positions = cache.length[:, None] + step
    mask = (jnp.arange(slots) <= positions[:, :, None])[:, None]
    write_at = jnp.where(step < count[:, None], positions, slots)
    rope = rope_tables(positions, self.config)

    def body(x, layer_and_cache):
      layer, keys, values = layer_and_cache
      return layer(x, rope, mask, (keys, values, write_at))

    x, (keys, values) = scan_layers(body, x, (self.layers, cache.keys, cache.values), self.scan)
    return self.norm(x), KVCache(keys, values, cache.length + count)

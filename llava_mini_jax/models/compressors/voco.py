"""VoCo-LLaMA (arXiv 2406.12275): the decoder itself compresses, into tokens that stand behind the patches.

All patches and `keep` learnt tokens enter the decoder. In every layer, up to the last of these tokens everything sees
what came before it; what comes later sees these tokens and what follows them, and not the patches, nor the text in
front of them. So once a prompt is read, the keys and values of the learnt tokens are all that is kept of an image
(`types.KVCache`). With several visuals in a sample, all learnt tokens are seen and nothing else before the last one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.attention import BEHIND, CARRIES
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.layers import param
from llava_mini_jax.types import Batch


class VoCo(Compressor):
  fields = ('keep',)
  projects = True
  keeps_patches = True
  in_decoder = True

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    init = nnx.initializers.normal(model.decoder.initializer_range)
    self.tokens_in = param(rngs, init, (model.compressor.keep, model.decoder.hidden_size), ('position', 'embed'))

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    if not model.compressor.keep:
      raise ConfigError('CompressorConfig.keep: expected 1 or more with voco; found 0')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.keep

  @staticmethod
  def roles(config: CompressorConfig, batch: Batch) -> jax.Array:
    rows, length = batch.tokens.shape
    slots = batch.slot_index[:, :, -config.keep :].reshape(rows, -1)
    carries = jax.vmap(lambda at: jnp.zeros(length, bool).at[at].set(True, mode='drop'))(slots)
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    later = jnp.triu(jnp.ones((length, length), bool))
    behind = (same & later & carries[:, None, :]).any(2)
    return jnp.where(carries, CARRIES, jnp.where(behind, BEHIND, 0))

  def __call__(self, x: jax.Array) -> jax.Array:  # [B P W] -> [B C D]
    tokens = self.tokens_in[...].astype(x.dtype)
    return jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))

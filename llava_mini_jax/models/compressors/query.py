"""Learnable-query compression: P patch tokens -> C = grid² tokens (paper Sec. 4.1, Eq. 2).

The released module differs from Eq. 2: LayerNorms, an 8-head attention with
projections and biases, positions on queries and keys but not on values.
`CompressorConfig.attention` chooses between the two.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.layers import LayerNorm, fan_in, linear, param, zeros
from llava_mini_jax.models.positions import resize_table, sincos_table


class QueryCompressor(Compressor):
  fields = ('grid', 'num_heads', 'space', 'attention', 'key_position', 'init_std')
  inside = True
  gives_attention = True

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    config, width = model.compressor, model.compressor_width
    self.config = config
    c, n = config.grid**2, config.num_heads
    self.query = param(rngs, nnx.initializers.truncated_normal(config.init_std), (c, width), ('position', 'norm'))
    # A parameter, not a constant: released training updates the table.
    self.pos_embed = param(
      rngs,
      lambda key, shape, dtype: jnp.asarray(sincos_table(config.grid, width), dtype),
      (c, width),
      ('position', 'norm'),
    )
    if config.attention == 'mha':
      heads, axes = (n, width // n), ('vision_heads', 'head_dim')
      self.ln_q = LayerNorm(width, 1e-5, rngs=rngs)
      self.ln_kv = LayerNorm(width, 1e-5, rngs=rngs)
      for name in ('q_proj', 'k_proj', 'v_proj'):
        setattr(self, name, param(rngs, fan_in(0), (width, *heads), ('vision_embed', *axes)))
        setattr(self, f'{name}_bias', param(rngs, zeros, heads, axes))
      self.out_proj = param(rngs, fan_in(0, 1), (*heads, width), (*axes, 'vision_embed'))
      self.out_proj_bias = param(rngs, zeros, (width,), ('norm',))

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    width, heads = model.compressor_width, model.compressor.num_heads
    if model.compressor.attention == 'mha' and width % heads:
      raise ConfigError(f'compressor width {width} is not a multiple of num_heads={heads}')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.grid**2

  @staticmethod
  def flops(model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    """The queries are projected once for all images; the resize of the position table is left out."""
    config, width, c = model.compressor, model.compressor_width, model.compressor.grid**2
    linears = 2.0 * width**2 * (images * (2 * patches + c) + c) if config.attention == 'mha' else 0.0
    return linears, 4.0 * images * patches * c * width

  def key_positions(self, num_keys: int) -> jax.Array:
    """float32[P W]: the position added to each key. Raises ValueError unless num_keys is a square."""
    grid = math.isqrt(num_keys)
    if grid * grid != num_keys:
      raise ValueError(f'compressor keys: expected a square number; found {num_keys}')
    if self.config.key_position == 'query_table':
      return resize_table(self.pos_embed[...], self.config.grid, grid)
    width = self.query.shape[-1]
    return (
      jnp.zeros((num_keys, width)) if self.config.key_position == 'none' else jnp.asarray(sincos_table(grid, width))
    )

  def __call__(self, x: jax.Array, *, return_attention: bool = False):
    """x [B P W] -> [B C W], and with `return_attention` the head-mean weights float32[B C P].

    Raises ValueError unless P is a square number.
    """
    key_pos, query_pos = self.key_positions(x.shape[1]).astype(x.dtype), self.pos_embed[...].astype(x.dtype)
    if self.config.attention == 'plain':
      q = self.query[...].astype(x.dtype) + query_pos
      scores = jnp.einsum('CW,BPW->BCP', q, x + key_pos, preferred_element_type=jnp.float32)
      weights = jax.nn.softmax(scores, axis=-1)
      out = jnp.einsum('BCP,BPW->BCW', weights.astype(x.dtype), x)
      return (out, weights) if return_attention else out

    kv = self.ln_kv(x)
    q = self.ln_q(self.query[...].astype(x.dtype)) + query_pos
    q = linear(q, self.q_proj[...]) + self.q_proj_bias[...].astype(x.dtype)
    k = linear(kv + key_pos, self.k_proj[...]) + self.k_proj_bias[...].astype(x.dtype)  # [B P N H]
    v = linear(kv, self.v_proj[...]) + self.v_proj_bias[...].astype(x.dtype)
    scores = jnp.einsum('CNH,BPNH->BNCP', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum('BNCP,BPNH->BCNH', weights.astype(x.dtype), v)
    out = linear(out, self.out_proj[...], inputs=2) + self.out_proj_bias[...].astype(x.dtype)
    return (out, weights.mean(1)) if return_attention else out

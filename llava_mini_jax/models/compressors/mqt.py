"""Matryoshka query transformer: the first m of grid² learnt queries, m chosen when asking (MQT-LLaVA, 2405.19315).

What differs from `query`: keys are positions alone (a fixed sin-cos table, resized), so that the weights do not depend
on the image; values are features; LayerNorms have eps 1e-6; an output matrix leads to the decoder's width, so that no
projector follows. Training draws m anew each step (`draw_kept`), one for all rows, as the original draws one for each
forward pass. Shapes stay static: all C tokens are computed, and those past m are seen by nobody and count no position
(`types.Batch.kept`), so that logits and gradients are those of a row laid out for m tokens.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.layers import LayerNorm, fan_in, linear, param, zeros
from llava_mini_jax.models.positions import bicubic_weights, sincos_table
from llava_mini_jax.types import Batch


def draw_kept(config: CompressorConfig, batch: Batch, step: jax.Array) -> Batch:
  """The batch with m of 2, 4, … C for all its rows, drawn from the number of the step alone; C is that of its slots."""
  counts = jnp.arange(2, batch.slot_index.shape[2] + 1, 2)
  if not (config.kind == 'mqt' and config.elastic and counts.size):
    return batch
  m = jax.random.choice(jax.random.fold_in(jax.random.key(0), step), counts)
  return dataclasses.replace(batch, kept=jnp.full(batch.tokens.shape[:1], m, jnp.int32))


class MatryoshkaCompressor(Compressor):
  fields = ('grid', 'keep', 'elastic', 'num_heads', 'space', 'init_std')
  inside = True
  projects = True
  gives_attention = True

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    config, width, out = model.compressor, model.compressor_width, model.decoder.hidden_size
    self.config = config
    init = nnx.initializers.truncated_normal(config.init_std)
    self.query = param(rngs, init, (config.grid**2, width), ('position', 'norm'))
    heads, axes = (config.num_heads, width // config.num_heads), ('vision_heads', 'head_dim')
    for name in ('ln_q', 'ln_k', 'ln_v'):
      setattr(self, name, LayerNorm(width, 1e-6, rngs=rngs))
    for name in ('q_proj', 'k_proj', 'v_proj'):
      setattr(self, name, param(rngs, fan_in(0), (width, *heads), ('vision_embed', *axes)))
      setattr(self, f'{name}_bias', param(rngs, zeros, heads, axes))
    self.out_proj = param(rngs, fan_in(0, 1), (*heads, width), (*axes, 'vision_embed'))
    self.out_proj_bias = param(rngs, zeros, (width,), ('norm',))
    init = nnx.initializers.normal(out**-0.5)
    self.projection = param(rngs, init, (width, out), ('vision_embed', 'mlp'))

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    config, width = model.compressor, model.compressor_width
    if width % config.num_heads:
      raise ConfigError(f'compressor width {width} is not a multiple of num_heads={config.num_heads}')
    if config.keep > config.grid**2:
      raise ConfigError(f'CompressorConfig.keep: expected at most grid² = {config.grid**2}; found {config.keep}')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.keep or config.grid**2

  @staticmethod
  def flops(model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    """Queries and keys are projected once for all images, and so are the attention's scores."""
    width, c = model.compressor_width, MatryoshkaCompressor.tokens(model.compressor, patches)
    once = 2.0 * width**2 * (c + patches)
    each = 2.0 * width**2 * (patches + c) + 2.0 * c * width * model.decoder.hidden_size
    return once + images * each, 2.0 * patches * c * width * (1 + images)

  def __call__(self, x: jax.Array, *, return_attention: bool = False):
    """x [B P W] -> [B C D], and with `return_attention` the head-mean weights float32[B C P]."""
    c, side = self.tokens(self.config, x.shape[1]), math.isqrt(x.shape[1])
    table = sincos_table(self.config.grid, x.shape[2])
    resize = bicubic_weights(self.config.grid, side)
    square = table.reshape(self.config.grid, self.config.grid, -1)
    where = np.einsum('yr,xc,rcW->yxW', resize, resize, square).reshape(side**2, -1)
    q = self.ln_q(self.query[...][:c].astype(x.dtype) + jnp.asarray(table[:c], x.dtype))
    k, v = self.ln_k(jnp.asarray(where, x.dtype)), self.ln_v(x)
    q, k, v = (
      linear(y, getattr(self, name)[...]) + getattr(self, f'{name}_bias')[...].astype(x.dtype)
      for name, y in (('q_proj', q), ('k_proj', k), ('v_proj', v))
    )
    scores = jnp.einsum('CNH,PNH->NCP', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum('NCP,BPNH->BCNH', weights.astype(x.dtype), v)
    out = linear(out, self.out_proj[...], inputs=2) + self.out_proj_bias[...].astype(x.dtype)
    out = linear(out, self.projection[...])
    return (out, jnp.broadcast_to(weights.mean(0), (x.shape[0], c, x.shape[1]))) if return_attention else out

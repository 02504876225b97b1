"""TokenPacker (arXiv 2407.02392): coarse tokens that look into their own square of finer, multi-layer features.

q = LN(Linear(x resized to grid × grid)); k, v = LN(MLP(features of several layers, joined)), each with an MLP of its
own; every q attends, with 8 heads, to the P / grid² patches of its own square alone. There is no residual. The
projector that follows is the original's last MLP. The bilinear resize is without antialiasing, as torch's: of a square
of s × s patches the middle one (s odd), or the mean of the middle four.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.compressors.average import cells, check_cells
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.layers import LayerNorm, Linear, fan_in, linear, param, zeros


class TokenPacker(Compressor):
  fields = ('grid', 'layers', 'num_heads')
  reads = ('layers',)

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    self.config = config = model.compressor
    width = model.vision.hidden_size
    self.query = param(rngs, fan_in(0), (width, width), ('vision_embed', 'vision_mlp'))
    for name in ('key', 'value'):
      setattr(self, f'{name}_1', Linear(len(config.layers) * width, width, ('vision_embed', 'vision_mlp'), rngs=rngs))
      setattr(self, f'{name}_2', Linear(width, width, ('vision_mlp', 'vision_embed'), rngs=rngs))
    heads, axes = (config.num_heads, width // config.num_heads), ('vision_heads', 'head_dim')
    for name in ('q', 'k', 'v'):
      setattr(self, f'ln_{name}', LayerNorm(width, 1e-6, rngs=rngs))
      setattr(self, f'{name}_proj', param(rngs, fan_in(0), (width, *heads), ('vision_embed', *axes)))
      setattr(self, f'{name}_proj_bias', param(rngs, zeros, heads, axes))
    self.out_proj = param(rngs, fan_in(0, 1), (*heads, width), (*axes, 'vision_embed'))
    self.out_proj_bias = param(rngs, zeros, (width,), ('norm',))

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    config, width, last = model.compressor, model.vision.hidden_size, model.vision.run_layers
    check_cells(model)
    if width % config.num_heads:
      raise ConfigError(f'compressor width {width} is not a multiple of num_heads={config.num_heads}')
    if config.space != 'vision':
      raise ConfigError(f"CompressorConfig.space: expected 'vision' with {config.kind}; found {config.space!r}")
    if not config.layers or not all(type(i) is int and 0 <= i <= last for i in config.layers):
      raise ConfigError(f'CompressorConfig.layers: expected hidden states 0 to {last}; found {config.layers!r}')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.grid**2

  @staticmethod
  def flops(model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    w, c, layers = model.vision.hidden_size, model.compressor.grid**2, len(model.compressor.layers)
    weights = 2.0 * w**2 * (3 * c + patches * 2 * (layers + 2))
    return images * weights, images * 4.0 * patches * w

  def __call__(self, x: jax.Array, *, layers: jax.Array) -> jax.Array:
    """x [B P W], layers [B P k·W] -> [B C W]."""
    q = self.ln_q(linear(self._coarse(x), self.query[...]))  # [B C W]
    near = cells(layers, self.config.grid)  # [B C s² k·W]

    def finer(first, second):
      return second(jax.nn.gelu(first(near), approximate=False))

    k, v = self.ln_k(finer(self.key_1, self.key_2)), self.ln_v(finer(self.value_1, self.value_2))
    q, k, v = (
      linear(y, getattr(self, f'{name}_proj')[...]) + getattr(self, f'{name}_proj_bias')[...].astype(x.dtype)
      for name, y in (('q', q), ('k', k), ('v', v))
    )
    scores = jnp.einsum('BCNH,BCPNH->BNCP', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    out = jnp.einsum('BNCP,BCPNH->BCNH', jax.nn.softmax(scores, axis=-1).astype(x.dtype), v)
    return linear(out, self.out_proj[...], inputs=2) + self.out_proj_bias[...].astype(x.dtype)

  def _coarse(self, x: jax.Array) -> jax.Array:
    """[B P W] -> [B C W]: the middle of each square."""
    square = cells(x, self.config.grid)
    side = math.isqrt(square.shape[2])
    middle = slice((side - 1) // 2, side // 2 + 1)
    square = square.reshape(*square.shape[:2], side, side, square.shape[3])
    return square[:, :, middle, middle].astype(jnp.float32).mean((2, 3)).astype(x.dtype)

"""CLIP vision tower: pixels -> patch features (the hidden state that LLaVA selects, class token dropped)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_mini_jax.config import IMAGE_MEAN, IMAGE_STD, ScanConfig, VisionConfig
from llava_mini_jax.models.attention import attend
from llava_mini_jax.models.layers import (
  PROJECTION,
  WIDENED,
  LayerNorm,
  Linear,
  fan_in,
  linear,
  param,
  scan_layers,
  stack_layers,
  zeros,
)
from llava_mini_jax.models.positions import sincos_table
from llava_mini_jax.sharding import constrain


def normalize_pixels(pixels: jax.Array) -> jax.Array:
  """uint8 pixels [... 3] -> CLIP-normalised float32; floats are taken as already normalised."""
  if not jnp.issubdtype(pixels.dtype, jnp.integer):
    return pixels
  scaled = pixels.astype(jnp.float32) * jnp.float32(1 / 255)
  return (scaled - jnp.asarray(IMAGE_MEAN, jnp.float32)) / jnp.asarray(IMAGE_STD, jnp.float32)


def _initial_positions(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
  """Zero for the class token, the 2-D sin-cos table for the patches: a tower trained from scratch knows the grid."""
  del key
  grid = math.isqrt(shape[0] - 1)
  return jnp.zeros(shape, dtype).at[1:].set(sincos_table(grid, shape[1]))


class VisionAttention(nnx.Module):
  """Multi-head self-attention with biases."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    w, n = config.hidden_size, config.num_attention_heads
    heads = (n, w // n)
    axes = ('vision_heads', 'head_dim')
    for name in ('q_proj', 'k_proj', 'v_proj'):
      setattr(self, name, param(rngs, fan_in(0), (w, *heads), ('vision_embed', *axes)))
      setattr(self, f'{name}_bias', param(rngs, zeros, heads, axes))
    self.out_proj = param(rngs, fan_in(0, 1), (*heads, w), (*axes, 'vision_embed'))
    self.out_proj_bias = param(rngs, zeros, (w,), ('norm',))

  def __call__(self, x: jax.Array) -> jax.Array:  # [B P W] -> [B P W]
    def heads(kernel, bias):
      return linear(x, kernel[...]) + bias[...].astype(x.dtype)  # [B P N H]

    q, k, v = (
      checkpoint_name(heads(getattr(self, name), getattr(self, f'{name}_bias')), PROJECTION)
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    y = attend(q, k, v, None)
    return linear(y, self.out_proj[...], inputs=2) + self.out_proj_bias[...].astype(x.dtype)


class VisionLayer(nnx.Module):
  """Pre-norm block with quick-GELU."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    w, f = config.hidden_size, config.intermediate_size
    self.layer_norm1 = LayerNorm(w, config.layer_norm_eps, rngs=rngs)
    self.self_attn = VisionAttention(config, rngs=rngs)
    self.layer_norm2 = LayerNorm(w, config.layer_norm_eps, rngs=rngs)
    self.fc1 = Linear(w, f, ('vision_embed', 'vision_mlp'), rngs=rngs)
    self.fc2 = Linear(f, w, ('vision_mlp', 'vision_embed'), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:  # [B P W] -> [B P W]
    x = x + self.self_attn(self.layer_norm1(x))
    y = checkpoint_name(self.fc1(self.layer_norm2(x)), WIDENED)
    return constrain(x + self.fc2(y * jax.nn.sigmoid(1.702 * y)), 'batch', 'length', 'act_embed')


class VisionTower(nnx.Module):
  """layers: further hidden states that it gives. class_attention: also what `_class_attention` says."""

  def __init__(
    self,
    config: VisionConfig,
    *,
    scan: ScanConfig,
    layers: tuple[int, ...] = (),
    class_attention: bool = False,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.scan = scan
    self.also, self.class_attention = layers, class_attention
    w, p = config.hidden_size, config.patch_size
    self.patch_embedding = param(rngs, fan_in(0, 1, 2), (p, p, 3, w), (None, None, None, 'vision_embed'))
    self.class_embedding = param(rngs, nnx.initializers.normal(0.02), (w,), ('norm',))
    self.position_embedding = param(rngs, _initial_positions, (config.num_patches + 1, w), ('position', 'vision_embed'))
    self.pre_layernorm = LayerNorm(w, config.layer_norm_eps, rngs=rngs)
    count = config.num_hidden_layers if config.keep_unused_layers else config.run_layers + class_attention
    self.layers = stack_layers(lambda rngs: VisionLayer(config, rngs=rngs), count, rngs) if count else None
    if config.keep_unused_layers:
      self.post_layernorm = LayerNorm(w, config.layer_norm_eps, rngs=rngs)

  def embed(self, pixels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """uint8 or normalised float [B height width 3] -> hidden state 0, [B P+1 W]."""
    grid, patch = self.config.grid, self.config.patch_size
    x = normalize_pixels(pixels).astype(dtype)
    x = x.reshape(-1, grid, patch, grid, patch, 3)
    x = linear(x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid**2, patch, patch, 3), self.patch_embedding[...], inputs=3)
    first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)
    return self.pre_layernorm(constrain(x, 'batch', 'length', 'act_embed'))

  def __call__(self, pixels: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 or normalised float [B height width 3] -> patch features of the selected layer, [B P W].

    What else the tower is asked for is joined to them: [B P W'].
    """
    x, at, states = self.embed(pixels, dtype), 0, {}
    for stop in sorted({*self.also, self.config.run_layers}):
      if stop > at:
        layers = jax.tree.map(lambda leaf, at=at, stop=stop: leaf[at:stop], self.layers)
        x, _ = scan_layers(lambda x, layer: (layer(x), None), x, layers, self.scan)
      at, states[stop] = stop, x
    found = [x[:, 1:], *(states[i][:, 1:] for i in self.also)]
    if self.class_attention:
      found += self._class_attention(x)
    return jnp.concatenate(found, axis=2) if len(found) > 1 else found[0]

  def _class_attention(self, x: jax.Array) -> list[jax.Array]:
    """Keys of the layer after the selected one [B P W], heads joined, and the class token's attention to them [B P 1].

    One softmax over all W channels, scaled by 1/sqrt(W), the class token included (PruMerge).
    """
    layer = jax.tree.map(lambda leaf: leaf[self.config.run_layers], self.layers)
    attention, y = layer.self_attn, layer.layer_norm1(x)

    def heads(y, name):
      out = linear(y, getattr(attention, name)[...]) + getattr(attention, f'{name}_bias')[...].astype(y.dtype)
      return out.reshape(*y.shape[:2], -1)

    q, k = heads(y[:, :1], 'q_proj'), heads(y, 'k_proj')
    scores = jnp.einsum('BCW,BPW->BCP', q, k, preferred_element_type=jnp.float32) / math.sqrt(x.shape[-1])
    return [k[:, 1:], jax.nn.softmax(scores, axis=-1).swapaxes(1, 2)[:, 1:].astype(x.dtype)]

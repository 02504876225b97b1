"""Projector `mlp2x_gelu`: vision width -> decoder width, Linear, exact GELU, Linear."""

from __future__ import annotations

import jax
from flax import nnx

from llava_mini_jax.models.layers import Linear


class Projector(nnx.Module):
  def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs):
    self.linear_1 = Linear(width_in, width_out, ('vision_embed', 'mlp'), rngs=rngs)
    self.linear_2 = Linear(width_out, width_out, ('mlp', 'embed'), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:  # [... W] -> [... D]
    return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))

"""Average pooling of equal squares of patches to grid² tokens: no parameters (paper Table 8).

Before the projector (`space=vision`, as LLaVA-NeXT's spatial pool) or after it (`space=llm`, as its 2-D pool).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.compressors.base import Compressor


def check_cells(model: LlavaMiniConfig) -> None:
  """Raises ConfigError unless the grid of tokens divides that of the patches."""
  grid, patches = model.compressor.grid, model.vision.grid
  if grid and patches % grid:
    raise ConfigError(f'CompressorConfig.grid: expected a divisor of {patches} patches per side; found {grid}')


def cells(x: jax.Array, grid: int) -> jax.Array:
  """Patches [B P W] in raster order -> the squares of an even grid, in raster order, [B grid² P/grid² W]."""
  side = math.isqrt(x.shape[1])
  size = side // grid
  squares = x.reshape(-1, grid, size, grid, size, x.shape[2]).transpose(0, 1, 3, 2, 4, 5)
  return squares.reshape(-1, grid**2, size**2, x.shape[2])


class AverageCompressor(Compressor):
  fields = ('grid', 'space')
  inside = True

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    check_cells(model)

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.grid**2

  def __call__(self, x: jax.Array) -> jax.Array:  # [B P W] -> [B C W]
    return cells(x, self.config.grid).astype(jnp.float32).mean(2).astype(x.dtype)

"""2-D sin-cos position tables and their bicubic resize, as constants.

No JAX op resizes with a = -0.75 (torch's bicubic); `jax.image.resize` uses
-0.5 and differs by up to 0.05 from 8 to 24, so the weights are written out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sincos_table(grid: int, width: int) -> np.ndarray:
  """float32[grid² width]: first half of the channels encodes the column, second half the row; each is [sin, cos]."""
  omega = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
  row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing='ij')

  def encode(position):
    angle = position.reshape(-1, 1) * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def bicubic_weights(size_in: int, size_out: int) -> np.ndarray:
  """float32[size_out size_in]: cubic convolution, a = -0.75, half-pixel centres, edge clamp, no antialiasing."""
  a = -0.75
  source = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  first = np.floor(source).astype(int)
  weights = np.zeros((size_out, size_in))
  for tap in range(-1, 3):
    distance = np.abs(source - (first + tap))
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    np.add.at(weights, (np.arange(size_out), np.clip(first + tap, 0, size_in - 1)), np.where(distance <= 1, near, far))
  return weights.astype(np.float32)


def resize_table(table: jax.Array, grid_in: int, grid_out: int) -> jax.Array:
  """[grid_in² W] -> [grid_out² W], row-major; unchanged when the sizes match."""
  if grid_in == grid_out:
    return table
  weights = bicubic_weights(grid_in, grid_out)
  square = table.reshape(grid_in, grid_in, -1)
  return jnp.einsum('yr,xc,rcW->yxW', weights, weights, square, precision='highest').reshape(grid_out**2, -1)

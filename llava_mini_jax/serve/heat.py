"""Where the compressor looked: its attention over the patches (paper Sec. 4.1, Eq. 2), laid over the image.

Enters: an encoded image. Leaves: float[C][rows x columns] over the image itself, whatever was padded, cropped or cut
into views for the tower: each point of the image gets the weight of the patch that it lies in.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.refusal import Refused
from llava_mini_jax.sharding import replicated, use_mesh
from llava_mini_jax.train.tree import merge

POINTS = 48  # a side of the map


class Heat:
  def __init__(self, engine: Engine):
    self._engine = engine
    graphdef, self._mesh = engine.run.graphdef, engine.run.mesh

    def attention(params, pixels):
      model = merge(graphdef, params)
      return model.compress(model.encode_views(pixels), return_attention=True)[2]

    self._attention = jax.jit(attention, out_shardings=replicated(self._mesh))

  def over(self, data: bytes, where: str) -> dict[str, Any]:
    """`{"rows", "columns", "weights": C lists in raster order}`; each list's largest weight is 1.

    Raises DataError for an image that cannot be read, Refused 422 for a model whose compressor does not attend.
    """
    if not self._engine.run.experiment.model.compressor_attends:
      raise Refused(422, 'model: expected one that compresses by queries; found one that does not')
    image, images = load_image(data, where), self._engine.encoder.media.images
    pixels = np.stack([images(image)] * self._engine.core.visual_places(1))
    with use_mesh(self._mesh):
      weights = np.asarray(self._attention(self._engine.core.params, pixels))[0]
    maps = [over_image(one, image.size, images) for one in weights]
    scaled = [np.round(one / max(one.max(), 1e-30), 4).reshape(-1).tolist() for one in maps]
    return dict(rows=POINTS, columns=POINTS, weights=scaled)


def over_image(weights: np.ndarray, size: tuple[int, int], images: ImageProcessor) -> np.ndarray:
  """Weights [keys] of one query -> float[POINTS POINTS] over an image of (width, height); 0 where nothing was seen."""
  grid = math.isqrt(len(weights))
  points = (np.arange(POINTS) + 0.5) / POINTS
  x, y = (_places(points, size[axis], size[1 - axis], images) for axis in (0, 1))
  rows, columns = (np.clip((at * grid).astype(int), 0, grid - 1) for at in (y, x))
  seen = ((y >= 0) & (y < 1))[:, None] & ((x >= 0) & (x < 1))
  return np.where(seen, weights.reshape(grid, grid)[rows[:, None], columns], 0.0)


def _places(points: np.ndarray, side: int, other: int, images: ImageProcessor) -> np.ndarray:
  """Points of the image along one side -> of the raster of all keys; outside [0, 1) = cut off."""
  if images.grid > 1 and images.grid_order == 'resize' and images.aspect == 'crop':
    return points
  apart = images.grid > 1 and (images.grid_order == 'split_then_pad' or images.aspect == 'crop')
  blocks = images.grid if apart else 1  # each is made square by itself
  block = np.minimum((points * blocks).astype(int), blocks - 1)
  square = max(side, other) if images.aspect == 'pad' else min(side, other)
  inside = 0.5 + (points * blocks - block - 0.5) * side / square
  return np.where((inside >= 0) & (inside < 1), (block + inside) / blocks, -1.0)

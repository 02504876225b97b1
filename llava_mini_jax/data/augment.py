"""Image augmentations under which an answer that does not speak of left, right or place stays true."""

from __future__ import annotations

import dataclasses

import numpy as np

from llava_mini_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Augment:
  """Mirrors an image, and moves its content inside its plain border.

  Attributes:
    flip: probability of a horizontal flip.
    shift: most pixels by which the content moves along each axis. It moves only within the margin whose pixels all
      equal the top left one, so nothing leaves the image and nothing has to be invented. A photograph has no such
      margin and stays where it is; nor does one with a noisy border (JPEG).
  """

  flip: float = 0.5
  shift: int = 8

  def __post_init__(self):
    if not 0 <= self.flip <= 1:
      raise ConfigError(f'Augment.flip: expected a probability; found {self.flip!r}')
    if isinstance(self.shift, bool) or not isinstance(self.shift, int) or self.shift < 0:
      raise ConfigError(f'Augment.shift: expected 0 or more pixels; found {self.shift!r}')

  def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8[h w 3] -> uint8[h w 3], the input untouched; draws three numbers whatever the image."""
    flip, *moves = rng.random(3)
    if self.shift:
      content = image != image[0, 0]
      occupied = content.reshape(len(content), -1).any(axis=1), content.any(axis=0).any(axis=1)  # rows, columns
      shifts = [self._shift(lines, move) for lines, move in zip(occupied, moves, strict=True)]
      image = np.roll(image, shifts, axis=(0, 1))  # what wraps around is margin
    return image[:, ::-1] if flip < self.flip else image

  def _shift(self, occupied: np.ndarray, move: float) -> int:
    """bool[n], and a number in [0, 1) -> a shift, uniform over those that keep every occupied line inside."""
    lines = np.flatnonzero(occupied)
    if not len(lines):
      return 0
    before = min(self.shift, int(lines[0]))
    after = min(self.shift, len(occupied) - 1 - int(lines[-1]))
    return int(move * (before + after + 1)) - before

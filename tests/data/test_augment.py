"""Augmentation moves things; it neither loses nor invents any."""

from __future__ import annotations

import numpy as np
import pytest

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.augment import Augment


def scene(height: int = 12, width: int = 20, box=(4, 7, 3, 9)) -> np.ndarray:
  """A noisy box (top, bottom, left, right) on a plain ground."""
  image = np.full((height, width, 3), (250, 240, 230), np.uint8)
  top, bottom, left, right = box
  image[top:bottom, left:right] = np.random.default_rng(0).integers(0, 200, (bottom - top, right - left, 3))
  return image


def box_of(image: np.ndarray) -> np.ndarray:
  content = (image != (250, 240, 230)).any(-1)
  rows, columns = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
  return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_content_is_kept_whole_wherever_it_goes():
  image = scene()
  before, offsets = image.copy(), set()
  for seed in range(400):
    moved = Augment(flip=0.5, shift=50)(image, np.random.default_rng(seed))
    assert moved.shape == image.shape and moved.dtype == np.uint8
    box = box_of(moved)
    assert np.array_equal(box, box_of(image)) or np.array_equal(box, box_of(image)[:, ::-1])
    offsets.add(tuple(np.argwhere((moved != (250, 240, 230)).any(-1)).min(0)))
  np.testing.assert_array_equal(image, before)
  assert len(offsets) > 50


@pytest.mark.parametrize('shift', [0, 1, 3])
def test_shift_is_bounded_and_uniform(shift):
  image, seen = scene(20, 20, (8, 11, 8, 11)), {}
  for seed in range(3000):
    moved = Augment(flip=0.0, shift=shift)(image, np.random.default_rng(seed))
    offset = tuple(np.argwhere((moved != (250, 240, 230)).any(-1)).min(0) - 8)
    seen[offset] = seen.get(offset, 0) + 1
  reach = range(-shift, shift + 1)
  assert seen.keys() == {(y, x) for y in reach for x in reach}
  expected = 3000 / len(seen)
  assert all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())


def test_flip_probability():
  image = scene()
  flipped = sum(
    not np.array_equal(Augment(flip=0.25, shift=0)(image, np.random.default_rng(seed)), image) for seed in range(2000)
  )
  assert 400 < flipped < 600


@pytest.mark.parametrize(
  'image',
  [
    np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8),  # no plain border
    np.full((9, 9, 3), 7, np.uint8),  # nothing to move
    scene(9, 9, (0, 9, 0, 9)),  # content up to the edges
    np.zeros((1, 1, 3), np.uint8),
  ],
  ids=['noise', 'plain', 'full', 'pixel'],
)
def test_without_a_margin_nothing_moves(image):
  for seed in range(20):
    np.testing.assert_array_equal(Augment(flip=0.0, shift=8)(image, np.random.default_rng(seed)), image)


def test_an_odd_corner_pins_the_image():
  image = scene()
  image[0, 0] = (249, 240, 230)
  for seed in range(20):
    np.testing.assert_array_equal(Augment(flip=0.0, shift=8)(image, np.random.default_rng(seed)), image)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'flip': 1.5}, 'Augment.flip: expected a probability; found 1.5'),
    ({'shift': -1}, 'Augment.shift: expected 0 or more pixels; found -1'),
    ({'shift': 1.0}, 'Augment.shift: expected 0 or more pixels; found 1.0'),
  ],
)
def test_settings(arguments, message):
  with pytest.raises(ConfigError) as error:
    Augment(**arguments)
  assert str(error.value) == message

"""Pixels against the released package's (golden `crop56.npz`) and transformers'; views, grids and padding."""

from __future__ import annotations

import io

import numpy as np
import pytest
from golden_cases import GOLDEN
from PIL import Image
from transformers import CLIPImageProcessorPil  # the one of transformers' CLIP processors that runs without torch

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import images
from llava_mini_jax.data.images import ImageProcessor, load_image, normalize

INPUTS = np.load(GOLDEN / 'preprocess' / 'inputs.npz')
EXPECTED = np.load(GOLDEN / 'preprocess' / 'crop56.npz')
PROCESSORS = {
  'pad': ImageProcessor(56),
  'pad_rawmode': ImageProcessor(56),
  'nopad': ImageProcessor(56, aspect='crop'),
  'split2_eval': ImageProcessor(56, grid=2),
  'split2_train': ImageProcessor(56, grid=2, grid_order='pad_then_split'),
  'split3_eval': ImageProcessor(56, grid=3),
}
PAD = (122, 116, 104)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def file_of(image: Image.Image, format: str = 'PNG', **options) -> bytes:
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def pixels(source: bytes) -> np.ndarray:
  image = load_image(source, 'here')
  assert image.mode == 'RGB'
  return np.asarray(image)


def padded_square(image: Image.Image) -> Image.Image:
  """LLaVA's expand2square, on arrays."""
  side = max(image.size)
  canvas = np.full((side, side, 3), PAD, np.uint8)
  top, left = (side - image.height) // 2, (side - image.width) // 2
  canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
  return Image.fromarray(canvas)


def transformers_pixels(image: Image.Image, size: int) -> np.ndarray:  # float32[size size 3]
  processor = CLIPImageProcessorPil(size={'shortest_edge': size}, crop_size={'height': size, 'width': size})
  return processor(images=image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)


# --- parity with the released package and with transformers ---


@pytest.mark.parametrize('key', [k for k in EXPECTED if not k.endswith('square_u8')])
def test_released_pixels(key):
  name, kind = key.split('__')
  views = PROCESSORS[kind](load_image(file_of(Image.fromarray(INPUTS[name])), name))
  assert views.dtype == np.uint8
  got = normalize(views)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, EXPECTED[key].transpose(0, 2, 3, 1))


@pytest.mark.parametrize('key', [k for k in EXPECTED if k.endswith('square_u8')])
def test_released_padding(key):
  """With a view as large as the padded image nothing is resized."""
  image = load_image(file_of(Image.fromarray(INPUTS[key.split('__')[0]])), key)
  np.testing.assert_array_equal(ImageProcessor(max(image.size))(image), EXPECTED[key][None])


SIZES = [(1, 1), (57, 91), (91, 57), (224, 225), (13, 17), (640, 481), (333, 47), (5, 600), (56, 56), (336, 335)]


@pytest.mark.parametrize('size', [56, 63])
@pytest.mark.parametrize('shape', SIZES, ids=str)
def test_transformers_pixels(shape, size):
  image = random_image(*shape)
  got = normalize(ImageProcessor(size, aspect='crop')(image))
  np.testing.assert_array_equal(got[0], transformers_pixels(image, size))
  got = normalize(ImageProcessor(size)(image))
  np.testing.assert_array_equal(got[0], transformers_pixels(padded_square(image), size))


def test_normalize_covers_every_value():
  values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
  mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  expected = ((values * (1 / 255)).astype(np.float32) - np.float32(mean)) / np.float32(std)
  got = normalize(values)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, expected)
  assert normalize(np.zeros((2, 5, 4, 4, 3), np.uint8)).shape == (2, 5, 4, 4, 3)


# --- the padded canvas is never made whole ---


@pytest.mark.parametrize('grid_order', ['split_then_pad', 'pad_then_split', 'resize'])
@pytest.mark.parametrize('shape', [(101, 67), (67, 101), (50, 50)], ids=str)
def test_strips_do_not_change_a_bit(monkeypatch, shape, grid_order):
  processor = ImageProcessor(28, grid=3, grid_order=grid_order)
  whole = processor(random_image(*shape))
  monkeypatch.setattr(images, '_STRIP_PIXELS', 7 * max(shape))
  np.testing.assert_array_equal(processor(random_image(*shape)), whole)


@pytest.mark.parametrize('shape', [(images.MAX_SIDE, 2000), (1000, images.MAX_SIDE)], ids=str)
def test_largest_images_need_little_memory(monkeypatch, shape):
  image, made, new = Image.new('RGB', shape, (9, 200, 30)), [], Image.new
  monkeypatch.setattr(Image, 'new', lambda mode, size, color: made.append(size[0] * size[1]) or new(mode, size, color))
  view = ImageProcessor(56)(image)[0]
  assert len(made) > 1
  assert max(made) <= images._STRIP_PIXELS < 20_000**2 / 90
  assert view[0, 0].tolist() == view[-1, -1].tolist() == list(PAD)
  assert np.abs(view[28, 28].astype(int) - (9, 200, 30)).max() < 10


# --- views ---


@pytest.mark.parametrize('grid_order', ['split_then_pad', 'pad_then_split', 'resize'])
@pytest.mark.parametrize('aspect', ['pad', 'crop'])
def test_views_are_raster_crops_then_the_whole(aspect, grid_order):
  """Four colours, one a quadrant: each crop shows its own, whatever the order of steps."""
  colors = [[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 90]]
  quadrants = np.asarray(colors, np.uint8).reshape(2, 2, 3).repeat(32, 0).repeat(32, 1)
  processor = ImageProcessor(16, aspect=aspect, grid=2, grid_order=grid_order)
  views = processor(Image.fromarray(quadrants))
  assert views.shape == (5, 16, 16, 3) == (processor.views, 16, 16, 3)
  assert [view[8, 8].tolist() for view in views[:4]] == colors
  assert [views[4, y, x].tolist() for y in (2, 13) for x in (2, 13)] == colors
  np.testing.assert_array_equal(views[4:], ImageProcessor(16, aspect=aspect)(Image.fromarray(quadrants)))


def test_grid_by_resizing():
  image = random_image(70, 40)
  views = ImageProcessor(16, grid=2, grid_order='resize')(image)
  big = ImageProcessor(32)(image)[0]
  np.testing.assert_array_equal(views[:4], [big[:16, :16], big[:16, 16:], big[16:, :16], big[16:, 16:]])
  views = ImageProcessor(16, 'crop', grid=2, grid_order='resize')(image)
  big = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(views[:4], [big[:16, :16], big[:16, 16:], big[16:, :16], big[16:, 16:]])


def test_without_padding_both_splits_are_the_same():
  image = random_image(70, 41)
  one, other = (ImageProcessor(16, 'crop', 2, order)(image) for order in ('split_then_pad', 'pad_then_split'))
  np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('grid_order', ['split_then_pad', 'pad_then_split'])
@pytest.mark.parametrize('aspect', ['pad', 'crop'])
def test_blocks_without_pixels_are_padding(aspect, grid_order):
  """As the released split does for an image one pixel wide; a 1x1 image has no blocks either."""
  views = ImageProcessor(8, aspect, 2, grid_order)(Image.new('RGB', (1, 1), (7, 8, 9)))
  assert (views[:4] == PAD).all()
  assert (views[4] == (7, 8, 9)).all()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'size': 0}, 'ImageProcessor.size: expected a positive integer; found 0'),
    ({'size': 8, 'grid': True}, 'ImageProcessor.grid: expected a positive integer; found True'),
    ({'size': 8, 'aspect': 'fit'}, "ImageProcessor.aspect: expected one of pad, crop; found 'fit'"),
    (
      {'size': 8, 'grid_order': 'split'},
      "ImageProcessor.grid_order: expected one of split_then_pad, pad_then_split, resize; found 'split'",
    ),
  ],
)
def test_processor_refuses(arguments, message):
  with pytest.raises(ConfigError) as error:
    ImageProcessor(**arguments)
  assert str(error.value) == message

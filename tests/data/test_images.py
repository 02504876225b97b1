"""Pixels against the released package's (golden `crop56.npz`) and transformers', and every kind of bad file."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from transformers import CLIPImageProcessorPil  # the one of transformers' CLIP processors that runs without torch

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import images
from llava_mini_jax.data.errors import DataError
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


# --- files that are odd and fine ---


def png_of_size(width: int, height: int) -> bytes:
  """A well-formed PNG whose header claims a size and whose data are a few bytes."""

  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


RGB = random_image(12, 8)
GRAY = RGB.convert('L')


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'GIF', 'WEBP', 'JPEG'])
def test_every_format(format):
  image = Image.new('RGB', (12, 8), (255, 255, 255))
  options = {'lossless': True} if format == 'WEBP' else {}
  np.testing.assert_array_equal(pixels(file_of(image, format, **options)), np.full((8, 12, 3), 255, np.uint8))


def test_one_pixel():
  np.testing.assert_array_equal(pixels(file_of(Image.new('RGB', (1, 1), (1, 2, 3)))), [[[1, 2, 3]]])


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_alpha_is_dropped_not_composed(mode):
  image = RGB.convert(mode)
  image.putalpha(Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)))
  expected = np.asarray(RGB if mode == 'RGBA' else GRAY.convert('RGB'))
  np.testing.assert_array_equal(pixels(file_of(image)), expected)


@pytest.mark.parametrize('transparency', [None, 3, bytes(range(40))])
def test_palette(transparency):
  image = RGB.quantize(40)
  expected = np.asarray(image.convert('RGB'))
  options = {} if transparency is None else {'transparency': transparency}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    np.testing.assert_array_equal(pixels(file_of(image, **options)), expected)


def test_one_bit():
  image = GRAY.convert('1')
  expected = np.asarray(image)[..., None] * np.uint8([255, 255, 255])
  np.testing.assert_array_equal(pixels(file_of(image)), expected)


def test_cmyk():
  data = file_of(Image.new('CMYK', (8, 8), (255, 0, 0, 0)), 'JPEG', quality=100)
  assert np.abs(pixels(data).astype(int) - (0, 255, 255)).max() <= 2


def test_gray_16_bit_is_scaled_as_16_bit_colour_is():
  values = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], np.uint16)
  got = pixels(file_of(Image.fromarray(values)))
  np.testing.assert_array_equal(got, np.uint8([[0, 0, 1, 0x12, 0x80, 0xFF]])[..., None].repeat(3, -1))

  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  body = zlib.compress(b'\0' + values.repeat(3).astype('>u2').tobytes())
  header = struct.pack('>IIBBBBB', 6, 1, 16, 2, 0, 0, 0)
  color = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', body) + chunk(b'IEND', b'')
  np.testing.assert_array_equal(pixels(color), got)


# EXIF orientation -> where the picture's top left, top right, bottom left, bottom right corners are stored
STORED = {1: 'abcd', 2: 'badc', 3: 'dcba', 4: 'cdab', 5: 'acbd', 6: 'bdac', 7: 'dbca', 8: 'cadb'}
CORNERS = {'a': 10, 'b': 80, 'c': 160, 'd': 240}


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP'])
@pytest.mark.parametrize('orientation', STORED)
def test_exif_orientation(orientation, format):
  exif = Image.Exif()
  exif[0x0112] = orientation
  turned = orientation >= 5
  stored = np.uint8([CORNERS[c] for c in STORED[orientation]]).reshape(2, 2).repeat(8 * (1 + turned), 0)
  stored = Image.fromarray(stored.repeat(8 * (2 - turned), 1)).convert('RGB')
  got = pixels(file_of(stored, format, exif=exif, quality=100)).astype(int)
  assert got.shape == (16, 32, 3)
  corners = [got[y, x, 0] for y in (3, 12) for x in (3, 28)]
  assert np.abs(np.subtract(corners, list(CORNERS.values()))).max() <= 3


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
@pytest.mark.parametrize(
  'exif', [b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0XX*\0\x08\0\0\0', b'Exif\0\0MM\0*\0\0', b'Exif\0\0'], ids=str
)
def test_damaged_exif_is_ignored(exif):
  np.testing.assert_array_equal(pixels(file_of(RGB, exif=exif)), np.asarray(RGB))


def test_animation_gives_its_first_frame():
  frames = [Image.new('RGB', (6, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
  for format in ('GIF', 'WEBP', 'PNG'):
    options = {'lossless': True} if format == 'WEBP' else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


def test_phone_jpeg_with_a_second_picture():
  data = file_of(Image.new('RGB', (8, 8), (9, 9, 9)), 'MPO', save_all=True, append_images=[Image.new('RGB', (8, 8))])
  assert (pixels(data) == 9).all()


def test_largest_and_longest_accepted(monkeypatch):
  assert load_image(file_of(Image.new('RGB', (200, 1))), 'here').size == (200, 1)
  monkeypatch.setattr(images, 'MAX_PIXELS', 64)
  assert load_image(file_of(Image.new('RGB', (8, 8))), 'here').size == (8, 8)
  with pytest.raises(DataError, match='E_IMG_TOO_LARGE'):
    load_image(file_of(Image.new('RGB', (13, 5))), 'here')


# --- files that are bad ---

JPEG = file_of(random_image(64, 64), 'JPEG')
PNG = file_of(random_image(64, 64))
FORMATS = 'expected JPEG, PNG, WEBP, GIF, BMP; found '
LIMITS = 'expected at most 40000000 pixels and 20000 a side; '
BOMB = 'could be decompression bomb DOS attack.'
BAD = {
  'empty': (b'', f"E_IMG_FORMAT: s7: {FORMATS}0 bytes starting b''"),
  'random': (
    bytes(range(7, 99)),
    f"E_IMG_FORMAT: s7: {FORMATS}92 bytes starting b'\\x07\\x08\\t\\n\\x0b\\x0c\\r\\x0e'",
  ),
  'html': (b'<html><body>404</body></html>', f"E_IMG_FORMAT: s7: {FORMATS}29 bytes starting b'<html><b'"),
  'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', f"E_IMG_FORMAT: s7: {FORMATS}41 bytes starting b'<svg xml'"),
  'pdf': (b'%PDF-1.7\n%', f"E_IMG_FORMAT: s7: {FORMATS}10 bytes starting b'%PDF-1.7'"),
  'eps': (
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n',
    f"E_IMG_FORMAT: s7: {FORMATS}61 bytes starting b'%!PS-Ado'",
  ),
  'tiff': (file_of(RGB, 'TIFF')[:64], f"E_IMG_FORMAT: s7: {FORMATS}64 bytes starting b'II*\\x00\\x08\\x00\\x00\\x00'"),
  'zero size': (png_of_size(0, 0), f"E_IMG_FORMAT: s7: {FORMATS}66 bytes starting b'\\x89PNG\\r\\n\\x1a\\n'"),
  'jpeg header': (JPEG[:20], f"E_IMG_FORMAT: s7: {FORMATS}20 bytes starting b'\\xff\\xd8\\xff\\xe0\\x00\\x10JF'"),
  '40000 x 40000': (
    png_of_size(40000, 40000),
    f'E_IMG_TOO_LARGE: s7: {LIMITS}Image size (1600000000 pixels) exceeds limit of 178956970 pixels, {BOMB}',
  ),
  '12000 x 12000': (png_of_size(12000, 12000), f'E_IMG_TOO_LARGE: s7: {LIMITS}found 12000x12000'),
  '9000 x 9000': (png_of_size(9000, 9000), f'E_IMG_TOO_LARGE: s7: {LIMITS}found 9000x9000'),
  '20001 x 1000': (png_of_size(20001, 1000), f'E_IMG_TOO_LARGE: s7: {LIMITS}found 20001x1000'),
  '1 x 20000': (png_of_size(1, 20000), 'E_IMG_ASPECT: s7: expected sides within 200:1; found 1x20000'),
  '402 x 2': (png_of_size(402, 2), 'E_IMG_ASPECT: s7: expected sides within 200:1; found 402x2'),
}
TRUNCATED = {
  'jpeg': JPEG[: len(JPEG) // 2],
  'png': PNG[: len(PNG) // 2],
  'webp': file_of(random_image(64, 64), 'WEBP')[:200],
  'gif': file_of(random_image(64, 64), 'GIF')[:900],
  'bmp': file_of(random_image(64, 64), 'BMP')[:900],
  'png without data': png_of_size(64, 64),
  'png checksum': PNG[:100] + bytes([PNG[100] ^ 1]) + PNG[101:],
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BAD)
def test_bad_file(name):
  data, message = BAD[name]
  start = time.monotonic()
  with pytest.raises(DataError) as error:
    load_image(data, 's7')
  assert str(error.value) == message
  assert time.monotonic() - start < 1


@pytest.mark.parametrize('name', TRUNCATED)
def test_truncated_file(name):
  with pytest.raises(DataError, match=r'^E_IMG_TRUNCATED: s7: expected a whole image; .'):
    load_image(TRUNCATED[name], 's7')


def test_bombs_are_refused_where_warnings_are_errors():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    with pytest.raises(DataError, match=r'^E_IMG_TOO_LARGE: s7: expected at most 40000000 pixels'):
      load_image(png_of_size(12000, 12000), 's7')


def test_damaged_files_raise_nothing_else():
  """Random damage to each format: an image or a DataError."""
  rng = np.random.default_rng(0)
  formats = [file_of(random_image(20, 16), format) for format in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')]
  refused = accepted = 0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for i in range(2000):
      data = bytearray(formats[i % len(formats)])
      for at in rng.integers(0, len(data), 4):
        data[at] = rng.integers(0, 256)
      try:
        load_image(bytes(data), 'here')
        accepted += 1
      except DataError:
        refused += 1
  assert refused > 100
  assert accepted > 100


def test_from_a_path(tmp_path):
  path = tmp_path / 'a.jpg'
  path.write_bytes(file_of(RGB))  # the name does not matter
  np.testing.assert_array_equal(np.asarray(load_image(path, 's7')), np.asarray(RGB))


def test_bad_paths(tmp_path, monkeypatch):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  with pytest.raises(ValueError) as nul:  # Python versions say it differently
    os.stat(tmp_path / 'nul\0.png')
  for path, message in (
    (
      tmp_path / 'none.png',
      f'expected a readable file; [Errno 2] No such file or directory: {str(tmp_path / "none.png")!r}',
    ),
    (tmp_path / 'nul\0.png', f'expected a readable file; {nul.value}'),
    (tmp_path, 'expected a file; found a directory, pipe or device'),
    (pipe, 'expected a file; found a directory, pipe or device'),
  ):
    with pytest.raises(DataError) as error:
      load_image(path, 's7')
    assert str(error.value) == f'E_IMG_MISSING: s7: {message}'
  large = tmp_path / 'large.png'
  large.write_bytes(PNG)
  monkeypatch.setattr(images, 'MAX_BYTES', 100)
  with pytest.raises(DataError) as error:
    load_image(large, 's7')
  assert str(error.value) == f'E_IMG_TOO_LARGE: s7: expected at most 100 bytes; found {len(PNG)}'

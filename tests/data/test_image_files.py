"""Files that are odd and fine, and every kind of bad one."""

from __future__ import annotations

import os
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_images import file_of, pixels, random_image

from llava_mini_jax.data import images
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image

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

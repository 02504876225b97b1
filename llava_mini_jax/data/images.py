"""Images -> pixels, as CLIP's processor and the released package make them.

Enters: encoded bytes, or a file. Leaves: uint8[V size size 3], one view, or for
HD the grid² crops in raster order and the whole image last; `normalize` turns
them into the float32 that the vision tower reads. Bit-exact with the released
preprocessing (golden `crop56.npz`) and with transformers' CLIPImageProcessor.

Two fixed choices differ from the released loaders, which ignore both: EXIF
orientation is applied, and 16-bit gray is scaled to 8 bits instead of clipped.
"""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from llava_mini_jax.config import IMAGE_MEAN, IMAGE_STD, ConfigError
from llava_mini_jax.data.errors import DataError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')  # no others: some of Pillow's start external programs
MAX_BYTES = 256 * 2**20  # of a file
MAX_PIXELS = 40_000_000  # of an image, looked up before it is decoded
MAX_SIDE = 20_000  # padding makes work of long side² (2 s for 1280x20000)
MAX_ASPECT = 200  # long side : short side
PAD_COLOR = tuple(int(255 * mean) for mean in IMAGE_MEAN)  # (122, 116, 104)
MEAN_COLOR = np.rint(255 * np.asarray(IMAGE_MEAN)).astype(np.uint8)  # what the vision tower reads as zero

_LIMITS = f'{MAX_PIXELS} pixels and {MAX_SIDE} a side'
_STRIP_PIXELS = 2**22  # most pixels of padded image held at once
_UPRIGHT = {  # EXIF orientation -> what undoes it
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)  # CLIP's rescaling: the product in float64, then rounded
_MEAN = np.asarray(IMAGE_MEAN, np.float32)
_STD = np.asarray(IMAGE_STD, np.float32)


def load_image(source: bytes | Path, where: str) -> Image.Image:
  """Decodes an image to upright 8-bit RGB.

  Any JPEG, PNG, WebP, GIF (its first frame) or BMP. Alpha is dropped, not composed, as by the released loaders'
  `convert('RGB')`. Size is checked before anything is decoded.

  Args:
    source: the encoded bytes, or a file that holds them.
    where: names the image in errors.
  Raises:
    DataError: E_IMG_MISSING no readable file; E_IMG_FORMAT not one of FORMATS; E_IMG_TOO_LARGE over MAX_BYTES,
      MAX_PIXELS or MAX_SIDE; E_IMG_ASPECT longer than MAX_ASPECT : 1; E_IMG_TRUNCATED data end early or are damaged.
  """
  data = _read(source, where) if isinstance(source, Path) else source
  check_bytes(len(data), where)
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except UnidentifiedImageError as error:
    found = f'{len(data)} bytes starting {data[:8]!r}'
    raise DataError('E_IMG_FORMAT', where, f'expected {", ".join(FORMATS)}; found {found}') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise DataError('E_IMG_TOO_LARGE', where, f'expected at most {_LIMITS}; {error}') from error
  except Exception as error:  # each parser fails on a damaged header in its own way
    raise DataError('E_IMG_TRUNCATED', where, f'expected a whole image; {error}') from error
  width, height = image.size
  if width * height > MAX_PIXELS or max(image.size) > MAX_SIDE:
    raise DataError('E_IMG_TOO_LARGE', where, f'expected at most {_LIMITS}; found {width}x{height}')
  if max(image.size) > MAX_ASPECT * min(image.size):
    raise DataError('E_IMG_ASPECT', where, f'expected sides within {MAX_ASPECT}:1; found {width}x{height}')
  try:
    image.load()
  except Exception as error:  # and each decoder in its own
    raise DataError('E_IMG_TRUNCATED', where, f'expected a whole image; {error}') from error
  turn = _UPRIGHT.get(_orientation(image))
  if image.mode.startswith('I'):  # 16-bit gray: keep the high byte, as Pillow does for 16-bit colour
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  image.info.pop('transparency', None)  # else Pillow looks up, and warns about, what convert then drops
  image = image.convert('RGB')
  return image if turn is None else image.transpose(turn)


def _read(path: Path, where: str) -> bytes:
  try:
    status = os.stat(path)
    data = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES else None
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise DataError('E_IMG_MISSING', where, f'expected a readable file; {error}') from error
  if data is not None:
    return data
  if stat.S_ISREG(status.st_mode):
    check_bytes(status.st_size, where)
  raise DataError('E_IMG_MISSING', where, 'expected a file; found a directory, pipe or device')


def check_bytes(found: int, where: str) -> None:
  """Raises DataError E_IMG_TOO_LARGE for a file of more than MAX_BYTES."""
  if found > MAX_BYTES:
    raise DataError('E_IMG_TOO_LARGE', where, f'expected at most {MAX_BYTES} bytes; found {found}')


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except (SyntaxError, ValueError, KeyError, struct.error):
    return 1  # damaged EXIF says nothing about which way is up, and the pixels are fine


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """An RGB image -> the views that the vision tower sees.

  Attributes:
    size: side of a view, in pixels.
    aspect: what makes a view square. pad = centre on PAD_COLOR, then resize (LLaVA's `image_aspect_ratio=pad`);
      crop = resize the short side, then cut out the centre (CLIP's own).
    grid: 1 = the whole image; r = r² crops of it too.
    grid_order: how crops come about. split_then_pad = cut the original, then make each block square (released
      evaluation); pad_then_split = make it square, then cut (released training); resize = to (r size)², padded if
      aspect is pad and squashed if it is crop, then cut. With aspect crop the first two are the same.
  """

  size: int
  aspect: Literal['pad', 'crop'] = 'pad'
  grid: int = 1
  grid_order: Literal['split_then_pad', 'pad_then_split', 'resize'] = 'split_then_pad'

  def __post_init__(self):
    for field in ('size', 'grid'):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'ImageProcessor.{field}: expected a positive integer; found {value!r}')
    for field, allowed in (('aspect', ('pad', 'crop')), ('grid_order', ('split_then_pad', 'pad_then_split', 'resize'))):
      if getattr(self, field) not in allowed:
        raise ConfigError(
          f'ImageProcessor.{field}: expected one of {", ".join(allowed)}; found {getattr(self, field)!r}'
        )

  @property
  def views(self) -> int:
    """V."""
    return 1 if self.grid == 1 else self.grid**2 + 1

  def __call__(self, image: Image.Image) -> np.ndarray:  # uint8[V size size 3]
    crops = self._crops(image) if self.grid > 1 else []
    return np.stack([np.asarray(view) for view in [*crops, self._square(image)]])

  def _crops(self, image: Image.Image) -> list[Image.Image]:
    """The grid² crops in raster order; what does not divide evenly is left off at the right and the bottom."""
    cells = [(row, column) for row in range(self.grid) for column in range(self.grid)]
    if self.grid_order == 'resize':
      whole = self.grid * self.size
      big = (
        _pad_resize(image, whole) if self.aspect == 'pad' else image.resize((whole, whole), Image.Resampling.BICUBIC)
      )
      return [_block(big, row, column, self.size, self.size) for row, column in cells]
    if self.grid_order == 'pad_then_split' and self.aspect == 'pad':
      left, top, side = _centred(image)
      side //= self.grid
      return [_resize_on_pad(image, left - column * side, top - row * side, side, self.size) for row, column in cells]
    width, height = image.width // self.grid, image.height // self.grid
    return [self._square(_block(image, row, column, width, height)) for row, column in cells]

  def _square(self, image: Image.Image) -> Image.Image:
    if not (image.width and image.height):  # a block of an image with fewer pixels than the grid has cells
      return Image.new('RGB', (self.size, self.size), PAD_COLOR)
    return _pad_resize(image, self.size) if self.aspect == 'pad' else _resize_crop(image, self.size)


def normalize(pixels: np.ndarray) -> np.ndarray:
  """uint8[... 3] -> float32[... 3]: (pixel / 255 - IMAGE_MEAN) / IMAGE_STD, rounded where CLIP's processor rounds."""
  return (_UNIT[pixels] - _MEAN) / _STD


def _block(image: Image.Image, row: int, column: int, width: int, height: int) -> Image.Image:
  return image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def _resize_crop(image: Image.Image, size: int) -> Image.Image:
  """The short side to `size`, bicubic, and the centre cut out; offsets and the long side are rounded down."""
  short = min(image.size)
  width, height = (int(size * side / short) for side in image.size)
  left, top = (width - size) // 2, (height - size) // 2
  return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _centred(image: Image.Image) -> tuple[int, int, int]:
  """Left, top and side of the square that has the image in its middle."""
  side = max(image.size)
  return (side - image.width) // 2, (side - image.height) // 2, side


def _pad_resize(image: Image.Image, size: int) -> Image.Image:
  return _resize_on_pad(image, *_centred(image), size)


def _resize_on_pad(image: Image.Image, left: int, top: int, side: int, size: int) -> Image.Image:
  """A side x side canvas of PAD_COLOR with the image at (left, top), resized to size x size, bicubic.

  The canvas of a legal image can have 400 megapixels, so it is never made whole. Pillow resizes rows, rounds to
  uint8, then resizes columns; doing the rows strip by strip gives the same bits.
  """
  if side == 0:
    return Image.new('RGB', (size, size), PAD_COLOR)
  rows = Image.new('RGB', (size, side), PAD_COLOR)
  step = max(1, _STRIP_PIXELS // side)
  for y in range(max(top, 0), min(top + image.height, side), step):
    height = min(step, side - y)
    strip = Image.new('RGB', (side, height), PAD_COLOR)
    strip.paste(image, (left, top - y))
    rows.paste(strip.resize((size, height), Image.Resampling.BICUBIC), (0, y))
  return rows.resize((size, size), Image.Resampling.BICUBIC)

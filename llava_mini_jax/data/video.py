"""Video -> frames, streamed: memory does not grow with its length.

Enters: an encoded video as bytes or a file, MP4/MOV, Matroska/WebM, AVI or GIF (`containers.py`), decoded by PyAV.
Leaves: the frames that a FrameSampler asks for, each uint8[h w 3] RGB and upright; `squash` gives them the shape that
the released package gives them.

Frames are chosen by their timestamps, as the paper says (1 fps, Sec. 4.2), or by the index rule of the released package
(golden `frames.json`). All are decoded in order and on one thread; a rule that needs to know how long the video is
takes a first pass for it. Only the first video stream is read, cover art apart. Alpha is dropped, pixels are taken as
square, and a flip or turn that the file asks for is done, which the released loader leaves out.

Damage that the container or the decoder notices raises. Damage that still decodes is not seen, as in images; nor is a
fragmented MP4 or a live recording cut exactly between two of its parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from llava_mini_jax.config import ConfigError, require_choice
from llava_mini_jax.data.containers import CONTAINERS, demuxer_of
from llava_mini_jax.data.errors import DataError

MAX_BYTES = 2**31 - 2**20  # of a file: a record holds no more, for a protocol buffer does not
MAX_SECONDS = 4 * 3600
MAX_PIXELS = 40_000_000  # of a frame, looked up before it is decoded

_READ = 2**18  # bytes at a time
_ROUNDING = Fraction(1, 2000)  # seconds: Matroska's times are in milliseconds; else 24 fps of 24 fps misses frames


@dataclasses.dataclass(frozen=True)
class FrameSampler:
  """Which frames of a video.

  Attributes:
    fps: frames per second of video, if `count` is 0: those on display at 0, 1/fps, 2/fps, ... after the first, before
      the end. A shorter clip gives its first frame.
    count: so many frames, those on display at the centres of `count` equal stretches of time; a frame is repeated if
      the video has fewer.
    max_frames: most frames in fps mode; a video with more gives max_frames as `count` does. 0 = no limit.
    rule: timestamp = as above; released = by index, as the released package: `released_indices`.
  """

  fps: float = 1.0
  count: int = 0
  max_frames: int = 0
  rule: Literal['timestamp', 'released'] = 'timestamp'

  def __post_init__(self):
    if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)) or not 0 < self.fps < math.inf:
      raise ConfigError(f'FrameSampler.fps: expected a positive number; found {self.fps!r}')
    for field in ('count', 'max_frames'):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f'FrameSampler.{field}: expected a whole number, 0 or more; found {value!r}')
    if self.count and self.max_frames:
      raise ConfigError(f'FrameSampler.max_frames={self.max_frames} is for fps mode; found count={self.count} too')
    require_choice('FrameSampler.rule', self.rule, ('timestamp', 'released'))

  def released_indices(self, total: int, rate: float) -> list[int]:
    """Of `total` frames at `rate` per second, as the released `load_video` and `get_seq_frames`; never falling.

    `count` frames but no more than the video has, or as many as whole seconds times fps: each the middle of its stretch
    of [0, total - 1], whose borders are rounded half to even. So neighbours can repeat and the last frame is rarely
    taken. A clip with no whole second, which fails there, gives its first frame.
    """
    number = min(total, self.count or int(total / rate * self.fps))
    if self.max_frames:
      number = min(number, self.max_frames)
    if number == 0:
      return [0]
    borders = [round((total - 1) / number * i) for i in range(number + 1)]
    return [(a + b) // 2 for a, b in itertools.pairwise(borders)]


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What decoding may take, where a video is a stranger's.

  Attributes:
    pixels: most of a frame, looked up before it is decoded; 0 = MAX_PIXELS, and never more.
    spend: told the pixels of each decoded frame, and 0 before each packet; what it raises ends the decoding.
  """

  pixels: int = 0
  spend: Callable[[int], None] = lambda pixels: None

  @property
  def most(self) -> int:
    return min(self.pixels or MAX_PIXELS, MAX_PIXELS)


UNBOUND = Bounds()


class VideoInfo(NamedTuple):
  """frames: all of them; seconds: from the first frame to the end of the last; width, height: of the first, upright."""

  frames: int
  seconds: float
  width: int
  height: int


class _Shown(NamedTuple):
  """A decoded frame, its index, when it is on display, in ticks of the stream's clock from the first, and its turn."""

  frame: Any
  index: int
  start: int
  end: int
  turn: tuple[bool, int, int] | None


class _Length(NamedTuple):
  frames: int
  ticks: int


def read_frames(
  source: bytes | Path, sampler: FrameSampler, where: str, bounds: Bounds = UNBOUND
) -> Iterator[np.ndarray]:
  """Yields the sampled frames in order, each uint8[h w 3], read-only; a repeated one is the same array again.

  Args:
    source: the encoded bytes, or a file that holds them.
    where: names the video in errors.
  Raises (when iterated):
    ConfigError: PyAV is not installed.
    DataError: E_VIDEO_MISSING no readable file; E_VIDEO_FORMAT not a video of a known container, or without a video
      stream that can be decoded; E_VIDEO_TRUNCATED the data end early or are damaged; E_VIDEO_EMPTY no frame;
      E_VIDEO_TOO_LARGE over MAX_BYTES, MAX_SECONDS or `bounds.most`. In fps mode frames before the damage come first.
  """
  length = None
  if sampler.rule == 'released' or sampler.count or sampler.max_frames:
    with _opened(source, where, bounds) as (container, stream):
      for shown in _shown(container, stream, where, bounds):
        length = _Length(shown.index + 1, shown.end)
  with _opened(source, where, bounds) as (container, stream):
    targets = iter(_targets(sampler, stream, length))
    by_index = sampler.rule == 'released'
    target = next(targets)
    for shown in _shown(container, stream, where, bounds):
      end = shown.index + 1 if by_index else shown.end
      pixels = None
      while target is not None and target < end:
        pixels = _pixels(shown) if pixels is None else pixels
        yield pixels
        target = next(targets, None)
      if target is None:
        return
    if length is not None:
      raise DataError('E_VIDEO_TRUNCATED', where, f'expected {length.frames} frames again; the file has changed')


def check_video(source: bytes | Path, where: str) -> VideoInfo:
  """Decodes all of a video once. Raises what `read_frames` does."""
  with _opened(source, where) as (container, stream):
    size = None
    for shown in _shown(container, stream, where):
      size = size or _pixels(shown).shape
    return VideoInfo(shown.index + 1, float(shown.end * stream.time_base), size[1], size[0])


def squash(frame: np.ndarray, size: int) -> np.ndarray:
  """uint8[h w 3] -> uint8[size size 3]: pixel i is pixel floor(i * (side / size)), as the released loader resizes.

  The product is float32, so where it should be whole it can be one less (golden `video_frames.npz`).
  """
  rows, columns = (
    (np.arange(size, dtype=np.float32) * np.float32(side / size)).astype(int) for side in frame.shape[:2]
  )
  return frame[rows[:, None], columns]


def _targets(sampler: FrameSampler, stream: Any, length: _Length | None) -> Iterable[int]:
  """Where frames are wanted, never falling: indices by the released rule, else ticks after the first frame."""
  clock = stream.time_base
  if sampler.rule == 'released':
    rate = stream.average_rate or length.frames / (length.ticks * clock)
    return sampler.released_indices(length.frames, float(rate))
  step = 1 / (Fraction(sampler.fps) * clock)  # ticks from one to the next
  slack = min(Fraction(1, 2), _ROUNDING / clock)
  number = sampler.count
  if sampler.max_frames and math.ceil((length.ticks - slack) / step) > sampler.max_frames:
    number = sampler.max_frames
  if number:
    return ((2 * i + 1) * length.ticks // (2 * number) for i in range(number))
  times = (math.floor(k * step + slack) for k in itertools.count())
  return times if length is None else itertools.takewhile(lambda time: time < length.ticks, times)


@contextlib.contextmanager
def _opened(source: bytes | Path, where: str, bounds: Bounds = UNBOUND) -> Iterator[tuple[Any, Any]]:
  """The container and its video stream, neither yet decoded. PyAV reads the open file, and can open nothing else."""
  av = _av()
  with _file(source, where) as file:
    demuxer = demuxer_of(file, where)
    file.seek(0)
    limits = {'max_pixels': str(bounds.most)}
    options = limits | {'protocol_whitelist': 'none'}
    # metadata that is no text is of no interest; from PyAV 19 on it is decoded when it is looked up
    lenient = {'metadata_errors': 'replace'} if int(av.__version__.split('.')[0]) < 19 else {}
    try:
      with av.open(file, format=demuxer, options=options, buffer_size=_READ, **lenient) as container:
        stream = _video_stream(container, where, bounds)
        stream.codec_context.thread_count = 1  # loaders run side by side already
        stream.codec_context.options = limits
        yield container, stream
    except av.EOFError as error:  # of a whole file
      raise _empty(where) from error
    except av.FFmpegError as error:
      message = f'expected a whole {CONTAINERS[demuxer]} video; {error.strerror}'
      raise DataError('E_VIDEO_TRUNCATED', where, message) from error


def _av() -> Any:
  try:
    import av
  except ImportError as error:
    raise ConfigError("video: expected the package av; pip install 'llava_mini_jax[video]'") from error
  return av


def _file(source: bytes | Path, where: str) -> BinaryIO:
  if isinstance(source, bytes):
    check_bytes(len(source), where)
    return io.BytesIO(source)
  try:
    status = os.stat(source)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
      return open(source, 'rb')
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise DataError('E_VIDEO_MISSING', where, f'expected a readable file; {error}') from error
  if stat.S_ISREG(status.st_mode):
    check_bytes(status.st_size, where)
  raise DataError('E_VIDEO_MISSING', where, 'expected a file; found a directory, pipe or device')


def check_bytes(found: int, where: str) -> None:
  """Raises DataError E_VIDEO_TOO_LARGE for a file of more than MAX_BYTES."""
  if found > MAX_BYTES:
    raise _too_large(where, f'{MAX_BYTES} bytes', str(found))


def _too_large(where: str, limit: str, found: str) -> DataError:
  return DataError('E_VIDEO_TOO_LARGE', where, f'expected at most {limit}; found {found}')


def _empty(where: str) -> DataError:
  return DataError('E_VIDEO_EMPTY', where, 'expected a frame; found none')


def _video_stream(container: Any, where: str, bounds: Bounds) -> Any:
  from av.stream import Disposition

  streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
  if not streams:
    found = ', '.join(s.type for s in container.streams) or 'nothing'
    raise DataError('E_VIDEO_FORMAT', where, f'expected a video stream; found {found}')
  stream = streams[0]
  if stream.codec_context is None:
    raise DataError('E_VIDEO_FORMAT', where, 'expected a video stream that can be decoded; found an unknown codec')
  if stream.duration is not None and stream.duration * stream.time_base > MAX_SECONDS:
    raise _too_large(where, f'{MAX_SECONDS} seconds', f'{float(stream.duration * stream.time_base):g}')
  width, height = stream.codec_context.width, stream.codec_context.height
  if width * height > bounds.most:
    raise _too_large(where, f'{bounds.most} pixels a frame', f'{width}x{height}')
  return stream


def _shown(container: Any, stream: Any, where: str, bounds: Bounds = UNBOUND) -> Iterator[_Shown]:
  """Every frame in order of display. One without a timestamp, or with one that goes back, follows the one before it."""
  rate = stream.average_rate or stream.guessed_rate
  usual = max(1, round(1 / (rate * stream.time_base))) if rate else 1
  shown = first = None
  for index, frame in enumerate(_decoded(container, stream, where, bounds)):
    # AVI stores no times of display: those found in it are out of order, the times of decoding are one frame apart
    time = frame.dts if container.format.name == 'avi' else frame.pts
    first = (time or 0) if shown is None else first
    start = shown.end if shown is not None and (time is None or time - first < shown.start) else (time or 0) - first
    end = start + max(1, frame.duration or usual)
    if end * stream.time_base > MAX_SECONDS:
      raise _too_large(where, f'{MAX_SECONDS} seconds', f'a frame that ends at {float(end * stream.time_base):g}')
    if shown is not None:
      yield shown._replace(end=start)
    # asked once: a frame whose side data were looked at is freed only by the garbage collector
    turn = _turn(frame, where) if shown is None else shown.turn
    shown = _Shown(frame, index, start, end, turn)
  if shown is None:
    raise _empty(where)
  yield shown


def _decoded(container: Any, stream: Any, where: str, bounds: Bounds) -> Iterator[Any]:
  import av

  last = 'before the first frame'
  number = 0
  try:
    for packet in container.demux(stream):
      bounds.spend(0)
      frames = [] if packet.is_corrupt else packet.decode()
      if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
        raise DataError('E_VIDEO_TRUNCATED', where, f'expected a whole video; damaged {last}')
      for frame in frames:
        bounds.spend(frame.width * frame.height)
        yield frame
        last = f'after frame {number}' + ('' if frame.time is None else f' ({frame.time:.3f} s)')
        number += 1
  except av.FFmpegError as error:
    if isinstance(error, av.ArgumentError) and stream.codec_context.width == 0:  # so decoders refuse a size
      raise _too_large(where, f'{bounds.most} pixels a frame', f'more {last}') from error
    raise DataError('E_VIDEO_TRUNCATED', where, f'expected a whole video; damaged {last}: {error.strerror}') from error


def _turn(frame: Any, where: str) -> tuple[bool, int, int] | None:
  """What makes it upright: swap x and y, then step through rows and columns by 1 or -1."""
  data = frame.side_data.get('DISPLAYMATRIX')
  if data is None:
    return None
  a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # (x, y) goes to (a x + c y, b x + d y)
  if (a or d) and (b or c) or not (a and d or b and c):
    message = f'expected a display matrix of quarter turns and flips; found {a}, {b}, {c}, {d} / 65536'
    raise DataError('E_VIDEO_FORMAT', where, message)
  return bool(b), -1 if b + d < 0 else 1, -1 if a + c < 0 else 1


def _pixels(shown: _Shown) -> np.ndarray:  # uint8[h w 3]
  pixels = shown.frame.to_ndarray(format='rgb24')
  if shown.turn is not None:
    swap, rows, columns = shown.turn
    pixels = pixels.transpose(1, 0, 2) if swap else pixels
    pixels = np.ascontiguousarray(pixels[::rows, ::columns])
  pixels.flags.writeable = False
  return pixels

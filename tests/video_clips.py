"""Encoded videos whose frames show their number, and what reading them gives or raises."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.video import FrameSampler, check_video, read_frames

KINDS = {  # suffix -> container, codec
  'mp4': ('mp4', 'libx264'),
  'mov': ('mov', 'mpeg4'),
  'mkv': ('matroska', 'libx264'),
  'webm': ('webm', 'libvpx-vp9'),
  'vp8': ('webm', 'libvpx'),
  'avi': ('avi', 'mpeg4'),
  'avi_b': ('avi', 'libx264'),  # frames out of order, and no times to sort them by
  'gif': ('gif', 'gif'),
}
MILLI = Fraction(1, 1000)


def numbered(index: int, width: int = 64, height: int = 48) -> np.ndarray:
  """A frame that shows `index` as eight black or white bars, lowest bit left: no codec blurs that away."""
  bars = (index >> np.arange(8) & 1).astype(np.uint8) * 255
  return np.broadcast_to(np.repeat(bars, width // 8)[None, :, None], (height, width, 3)).copy()


def number(frame: np.ndarray) -> int:
  bars = frame[frame.shape[0] // 2, frame.shape[1] // 16 :: frame.shape[1] // 8, 1]
  return int(((bars > 127) << np.arange(8)).sum())


def clip(kind: str = 'mp4', frames=48, *, rate=24, times=None, turn=None, options=None, out=None, **container) -> bytes:
  """An encoded video. frames: arrays, or how many numbered ones; times: of each, in milliseconds."""
  name, codec = KINDS[kind]
  frames = [numbered(i) for i in range(frames)] if isinstance(frames, int) else frames
  out = out or io.BytesIO()
  with av.open(out, 'w', format=name, options=container) as file:
    stream = file.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = frames[0].shape[:2] if frames else (48, 64)
    stream.pix_fmt = 'rgb8' if codec == 'gif' else 'yuv420p'
    if times:
      stream.codec_context.time_base = MILLI
    if turn:
      stream.set_display_matrix(turn)
    if not frames:
      file.start_encoding()
    for i, pixels in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
      if times:
        frame.pts, frame.time_base = times[i], MILLI
      file.mux(stream.encode(frame))
    file.mux(stream.encode())
  return out.getvalue() if isinstance(out, io.BytesIO) else b''


def numbers(source, **sampler) -> list[int]:
  return [number(frame) for frame in read_frames(source, FrameSampler(**sampler), 'here')]


def refused(source, code: str, message: str, **sampler) -> None:
  """check_video and both ways to sample raise one DataError: the code, the place, then `message`, a pattern."""
  for read in (
    lambda: check_video(source, 'here'),
    lambda: list(read_frames(source, FrameSampler(**sampler), 'here')),
    lambda: list(read_frames(source, FrameSampler(count=3), 'here')),
  ):
    with pytest.raises(DataError, match=f'^{code}: here: {message}') as caught:
      read()
    assert caught.value.code == code and '\n' not in str(caught.value)

"""Every kind of bad video file: cut, changed, empty, too large, no video at all; and what reading one costs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from video_clips import KINDS, clip, numbered, numbers, refused

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import containers, video
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.video import FrameSampler, check_video, read_frames

DAMAGED = r'^E_VIDEO_TRUNCATED: here: expected a whole '


def test_not_a_video(tmp_path):
  expected = 'expected MP4/MOV, Matroska/WebM, AVI, GIF; found '
  refused(b'', 'E_VIDEO_FORMAT', expected + "0 bytes starting b''$")
  (tmp_path / 'frame.png').write_bytes(b'not me')
  playlists = (b'#EXTM3U\n#EXTINF:1,\nframe.png\n', b'ffconcat version 1.0\nfile frame.png\n', b'file frame.png\n')
  for data in (b'hello' * 99, bytes(999), b'<!DOCTYPE html>', b'\x89PNG\r\n\x1a\n' + bytes(99), *playlists):
    path = tmp_path / 'clip.mp4'  # the name says nothing
    path.write_bytes(data)
    refused(path, 'E_VIDEO_FORMAT', expected + f'{len(data)} bytes starting ')


def test_wrong_extension(tmp_path):
  path = tmp_path / 'clip.txt'
  path.write_bytes(clip('webm', 30))
  assert numbers(path) == [0, 24]


def test_no_video_stream():
  out = io.BytesIO()
  with av.open(out, 'w', format='mp4') as file:
    stream = file.add_stream('aac', rate=44100, layout='mono')
    for i in range(3):
      frame = av.AudioFrame(format='fltp', layout='mono', samples=1024)
      frame.planes[0].update(bytes(frame.planes[0].buffer_size))
      frame.sample_rate, frame.pts = 44100, i * 1024
      file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
  refused(out.getvalue(), 'E_VIDEO_FORMAT', 'expected a video stream; found audio$')


def test_missing(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (tmp_path / 'none.mp4', tmp_path / 'a\0b'):
    refused(path, 'E_VIDEO_MISSING', 'expected a readable file; ')
  for path in (tmp_path, tmp_path / 'pipe'):
    refused(path, 'E_VIDEO_MISSING', 'expected a file; found a directory, pipe or device$')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('keep', [0.3, 0.6, 0.95])
def test_cut(kind, keep):
  data = clip(kind, 60, options={'g': '12'})
  refused(data[: int(len(data) * keep)], 'E_VIDEO_TRUNCATED', 'expected a whole ')


def every(part: bytes, data: bytes) -> list[int]:
  return [i for i in range(len(data)) if data.startswith(part, i)]


def test_cut_of_streamable_mp4(tmp_path):
  """With its index in front, or in fragments, the file opens well, and whole frames come first."""
  for flags in ('faststart', 'frag_keyframe+empty_moov'):
    path = tmp_path / f'{flags}.mp4'
    clip('mp4', 60, options={'g': '12'}, out=str(path), movflags=flags)
    assert numbers(path, fps=24) == list(range(60))
    data = path.read_bytes()
    seams = {at + i for kind in (b'moof', b'mdat', b'mfra') for at in every(kind, data) for i in range(-4, 4)}
    for cut in set(range(len(data) // 2, len(data), 23)) - seams:
      refused(data[:cut], 'E_VIDEO_TRUNCATED', 'expected a whole ')


def textured(count: int) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  field = np.kron(rng.integers(0, 256, (12, 40, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
  return [np.ascontiguousarray(field[:, 2 * i : 2 * i + 128]) for i in range(count)]


@pytest.mark.parametrize('kind', ['mp4', 'mov', 'mkv', 'webm', 'vp8', 'avi', 'gif'])
def test_corrupt_midstream(kind):
  """A stretch of zeros, over frames and the headers between them: refused, and what came before is right."""
  data = bytearray(clip(kind, textured(60), options={'g': '12'}))
  whole = list(read_frames(bytes(data), FrameSampler(fps=100), 'here'))
  middle = len(data) // 2
  data[middle : middle + 1500] = bytes(1500)
  data = bytes(data)
  refused(data, 'E_VIDEO_TRUNCATED', 'expected a whole ', fps=100)
  frames = read_frames(data, FrameSampler(fps=100), 'here')
  for expected in whole:
    try:
      np.testing.assert_array_equal(next(frames), expected)
    except DataError:
      break
  else:
    raise AssertionError('every frame came')


def test_corruption_names_the_time():
  data = bytearray(clip('mp4', textured(60), options={'g': '12'}))
  middle = len(data) // 2
  data[middle : middle + 1500] = bytes(1500)
  with pytest.raises(DataError, match=DAMAGED + r'video; damaged after frame \d+ \(\d\.\d{3} s\)'):
    check_video(bytes(data), 'here')


def test_lost_matroska_block():
  """One byte of a block's header: the demuxer goes on at the next cluster and says nothing."""
  data = bytearray(clip('mkv', textured(60), options={'g': '12'}))
  at = data.index(b'\xa3', len(data) // 2)
  while containers._element(bytes(data[at : at + 16])) is None or data[at + 3 : at + 4] != b'\x81':
    at = data.index(b'\xa3', at + 1)
  data[at] = 0
  with av.open(io.BytesIO(bytes(data))) as file:
    assert sum(1 for _ in file.decode(video=0)) < 60
  refused(bytes(data), 'E_VIDEO_TRUNCATED', rf'expected a whole video; damaged at byte {at} of {len(data)}$')


@pytest.mark.parametrize('kind', ['mkv', 'avi'])
def test_empty(kind):
  refused(clip(kind, []), 'E_VIDEO_EMPTY', 'expected a frame; found none$')


def test_too_large(monkeypatch, tmp_path):
  pixels = 'expected at most {} pixels a frame; found {}$'
  black = np.zeros((6000, 8000, 3), np.uint8)
  refused(clip('mp4', [black]), 'E_VIDEO_TOO_LARGE', pixels.format(40_000_000, '8000x6000'))
  seconds = 'expected at most 14400 seconds; found '
  times = [0, 40, 5 * 3600 * 1000]
  refused(clip('mkv', 3, times=times), 'E_VIDEO_TOO_LARGE', seconds + '18000$')
  refused(clip('mkv', 3, times=times, live='1'), 'E_VIDEO_TOO_LARGE', seconds + 'a frame that ends at 18000')
  monkeypatch.setattr(video, 'MAX_PIXELS', 3071)
  for kind in KINDS:
    refused(clip(kind, 3), 'E_VIDEO_TOO_LARGE', pixels.format(3071, '(64x48|more before the first frame)'))
  monkeypatch.setattr(video, 'MAX_PIXELS', 3072)
  assert numbers(clip()) == [0, 24]
  monkeypatch.setattr(video, 'MAX_BYTES', 999)
  data = clip('mp4', 30)
  (tmp_path / 'clip.mp4').write_bytes(data)
  for source in (data, tmp_path / 'clip.mp4'):
    refused(source, 'E_VIDEO_TOO_LARGE', f'expected at most 999 bytes; found {len(data)}$')


def test_too_many_parts(monkeypatch):
  monkeypatch.setattr(containers, 'MAX_PARTS', 50)
  refused(clip('mkv', 60), 'E_VIDEO_TOO_LARGE', 'expected at most 50 parts in the file$')


def test_what_follows_the_video_is_ignored():
  for kind in ('mp4', 'mkv', 'avi', 'gif'):
    for junk in (bytes(100), b'\xff' * 100):
      assert numbers(clip(kind, 30) + junk) == numbers(clip(kind, 30)), (kind, junk[:1])


@pytest.mark.parametrize('kind', ['mp4', 'mkv', 'avi', 'gif'])
def test_mutations(kind):
  """Whatever is done to the bytes, frames or one DataError come out, and nothing else."""
  whole, rng = clip(kind, 12), np.random.default_rng(0)
  codes = set()
  for _ in range(60):
    data = bytearray(whole)
    for at in rng.integers(0, len(data), rng.integers(1, 8)):
      data[at] = rng.integers(256)
    try:
      info = check_video(bytes(data), 'here')
      assert info.frames > 0
    except DataError as error:
      codes.add(error.code)
  assert codes and all(code.startswith('E_VIDEO_') for code in codes)


def test_without_pyav(monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  message = r"^video: expected the package av; pip install 'llava_mini_jax\[video\]'$"
  with pytest.raises(ConfigError, match=message):
    check_video(b'', 'here')


@pytest.mark.parametrize(
  'sampler, message',
  [
    (dict(fps=0), 'FrameSampler.fps: expected a positive number; found 0'),
    (dict(fps=float('nan')), 'FrameSampler.fps: expected a positive number; found nan'),
    (dict(fps=float('inf')), 'FrameSampler.fps: expected a positive number; found inf'),
    (dict(fps='1'), "FrameSampler.fps: expected a positive number; found '1'"),
    (dict(count=-1), 'FrameSampler.count: expected a whole number, 0 or more; found -1'),
    (dict(max_frames=1.5), 'FrameSampler.max_frames: expected a whole number, 0 or more; found 1.5'),
    (dict(count=8, max_frames=9), 'FrameSampler.max_frames=9 is for fps mode; found count=8 too'),
    (dict(rule='decord'), "FrameSampler.rule: expected one of timestamp, released; found 'decord'"),
  ],
  ids=str,
)
def test_bad_sampler(sampler, message):
  with pytest.raises(ConfigError) as caught:
    FrameSampler(**sampler)
  assert str(caught.value) == message


# --- memory ---

MEASURE = """
import sys
from pathlib import Path
from llava_mini_jax.data.video import FrameSampler, read_frames
def run(path, sampler):
  frames = sum(1 for _ in read_frames(Path(path), sampler, 'here'))
  peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
  return frames, int(peak.split()[1])
for sampler in (FrameSampler(fps=24), FrameSampler(count=20), FrameSampler(rule='released', count=20)):
  short, before = run(sys.argv[1], sampler)
  long, after = run(sys.argv[2], sampler)
  print(short, long, after - before)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the peak of resident memory from /proc')
def test_memory_does_not_grow(tmp_path):
  """20 times as long; its frames would take 230 MB."""
  paths = [tmp_path / 'short.mp4', tmp_path / 'long.mp4']
  for path, times in zip(paths, (1, 20), strict=True):
    clip('mp4', [numbered(i, 320, 240) for i in range(50)] * times, out=str(path))
  command = [sys.executable, '-c', MEASURE, *map(str, paths)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  assert [line[:2] for line in lines] == [(50, 1000), (20, 20), (20, 20)]
  assert max(grown for _, _, grown in lines) < 8 * 1024, lines  # kB

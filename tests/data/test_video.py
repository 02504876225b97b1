"""Sampled frames by the number each shows, the released package's indices and pixels, every kind of bad file."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import containers, video
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor, normalize
from llava_mini_jax.data.video import FrameSampler, check_video, read_frames, squash

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
DAMAGED = r'^E_VIDEO_TRUNCATED: here: expected a whole '


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


# --- which frames ---


@pytest.mark.parametrize('kind', KINDS)
def test_every_container(kind):
  """60 frames: what decodes is all of them in order, and 1 fps takes the first of each second."""
  rate = 25 if kind == 'gif' else 24  # a GIF has hundredths of a second
  data = clip(kind, 60, rate=rate)
  info = check_video(data, 'here')
  assert info[0] == 60 and info[2:] == (64, 48) and abs(info.seconds - 60 / rate) < 0.0011
  assert numbers(data) == [0, rate, 2 * rate]
  assert numbers(data, fps=rate) == list(range(60))
  assert numbers(data, count=60) == list(range(60))


@pytest.mark.parametrize(
  'sampler, expected',
  [
    (dict(), [0, 24, 48, 72]),
    (dict(fps=2), [0, 12, 24, 36, 48, 60, 72, 84]),
    (dict(fps=0.5), [0, 48]),
    (dict(fps=0.1), [0]),
    (dict(fps=48), [i // 2 for i in range(192)]),
    (dict(fps=1, max_frames=4), [0, 24, 48, 72]),
    (dict(fps=1, max_frames=3), [16, 48, 80]),
    (dict(fps=24, max_frames=2), [24, 72]),
    (dict(count=1), [48]),
    (dict(count=4), [12, 36, 60, 84]),
    (dict(count=192), [i // 2 for i in range(192)]),
    (dict(rule='released', count=4), [12, 36, 59, 83]),
    (dict(rule='released', max_frames=3), [16, 47, 79]),
  ],
  ids=str,
)
def test_sampling(sampler, expected):
  assert numbers(clip('mp4', 96), **sampler) == expected


def test_variable_frame_rate():
  """The frame on display is the last one begun, however long it stands; the end is that of the last frame."""
  times = [500, 540, 1400, 1500, 1501, 4600, 5500]  # the first frame is time 0
  data = clip('mkv', 7, times=times)
  info = check_video(data, 'here')
  assert numbers(data) == [0, 3 if times[3] == 1500 else 2, 4, 4, 4, 6]
  assert info.frames == 7 and 5 <= info.seconds < 5.1
  for sampler in (dict(fps=7.3), dict(count=9), dict(count=4)):
    length = info.seconds * 1000
    step = 1000 / sampler.get('fps', 1)
    wanted = (
      [step * k for k in range(1000) if step * k < length]
      if 'fps' in sampler
      else [(i + 0.5) * length / sampler['count'] for i in range(sampler['count'])]
    )
    expected = [max(i for i, time in enumerate(times) if time - 500 <= t + 0.5) for t in wanted]
    assert numbers(data, **sampler) == expected, sampler


@pytest.mark.parametrize('kind', ['mp4', 'webm', 'avi', 'gif'])
def test_short_clip(kind):
  data = clip(kind, 1)
  assert numbers(data) == numbers(data, fps=0.01) == numbers(data, rule='released') == [0]
  assert numbers(data, count=3) == [0, 0, 0]
  assert numbers(data, count=3, rule='released') == [0]


@pytest.mark.parametrize('kind', ['mp4', 'webm', 'avi_b'])
def test_streamed_equals_random_access(kind):
  """Pixels too, against a decoder loop of our own that keeps every frame."""
  data = clip(kind, 50, options={'g': '7'})
  with av.open(io.BytesIO(data)) as file:
    every = [frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]
  for sampler in (FrameSampler(fps=5), FrameSampler(count=7), FrameSampler(rule='released', count=7)):
    got = list(read_frames(data, sampler, 'here'))
    assert len(got) in (7, 11)
    for frame in got:
      assert frame.dtype == np.uint8 and frame.shape == (48, 64, 3)
      np.testing.assert_array_equal(frame, every[number(frame)])


def test_live_recording():
  """Written without going back: its parts do not say how long they are, nor does the file."""
  data = clip('webm', 60, live='1')
  assert numbers(data) == [0, 24, 48] and check_video(data, 'here').frames == 60
  refused(data[: len(data) // 2], 'E_VIDEO_TRUNCATED', 'expected a whole video; its part at byte ')


def test_missing_and_falling_timestamps(monkeypatch):
  """A frame without a time, or whose time goes back, follows the one before it; the rest keep their times."""
  times = [0, None, 80, 30, 160, 200]

  class Frame:
    is_corrupt, side_data, width, height, time, duration = False, {}, 8, 8, None, 40

    def __init__(self, index):
      self.pts, self.dts, self.index = times[index], None, index

    def to_ndarray(self, format):
      return numbered(self.index)

  monkeypatch.setattr(video, '_decoded', lambda container, stream, where: map(Frame, range(len(times))))
  data = clip('mkv', 1)
  assert numbers(data, fps=25) == [0, 1, 2, 3, 4, 5]
  assert check_video(data, 'here').seconds == 0.24


def test_repeats_are_shared_and_read_only():
  frames = list(read_frames(clip('mp4', 2), FrameSampler(count=4), 'here'))
  assert frames[0] is frames[1] and frames[2] is frames[3] and frames[0] is not frames[2]
  with pytest.raises(ValueError, match='read-only'):
    frames[0][:] = 0


# --- the released package ---

FRAMES = json.loads((GOLDEN / 'preprocess' / 'frames.json').read_text())
SQUASHED = np.load(GOLDEN / 'preprocess' / 'video_frames.npz')


@pytest.mark.parametrize('case', FRAMES['get_seq_frames'], ids=lambda c: f'{c["total"]}-{c["desired"]}')
def test_released_stretches(case):
  """The recorded function can be asked for more than there are; `load_video`, which we follow, never does."""
  ours = FrameSampler(count=case['desired'], rule='released').released_indices(case['total'], 30)
  if case['desired'] <= case['total']:
    assert ours == case['indices']
  else:
    assert len(ours) == case['total']


@pytest.mark.parametrize('case', FRAMES['load_video'], ids=lambda c: f'{c["total"]}-{c["fps"]}-{c["num_frm"]}')
def test_released_indices(case):
  ours = FrameSampler(count=case['num_frm'] or 0, rule='released').released_indices(case['total'], case['fps'])
  assert ours == case.get('indices', [0])  # where it fails, the first frame


@pytest.mark.parametrize('case', [c for c in FRAMES['load_video'] if c['total'] < 100], ids=lambda c: str(c['total']))
def test_released_frames(case):
  rate = Fraction(24000, 1001) if case['fps'] == 23.976 else int(case['fps'])
  for kind in ('mp4', 'mkv', 'avi'):
    data = clip(kind, case['total'], rate=rate)
    assert numbers(data, count=case['num_frm'] or 0, rule='released') == case.get('indices', [0])


def test_released_squash():
  for frame, expected in zip(SQUASHED['video_src'], SQUASHED['video_resized_u8'], strict=True):
    got = squash(frame, 336)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)
  views = [ImageProcessor(56, aspect='crop')(Image.fromarray(squash(f, 336))) for f in SQUASHED['video_src']]
  expected = SQUASHED['video_pixel_values_56'].transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(normalize(np.concatenate(views)), expected)


@pytest.mark.parametrize('key', [key for key in SQUASHED if key.startswith('nearest')])
def test_released_nearest_index(key):
  side = int(key.split('_')[2])
  ramp = np.arange(side).astype(np.uint16)
  frame = np.zeros((side, 3, 3), np.uint16) + ramp[:, None, None]
  np.testing.assert_array_equal(squash(frame, 336)[:, 0, 0], SQUASHED[key])
  np.testing.assert_array_equal(squash(frame.transpose(1, 0, 2), 336)[0, :, 0], SQUASHED[key])


# --- upright ---

ONE = 1 << 16
TURNS = [
  m for m in itertools.product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1 and sum(map(abs, m)) == 2
]


@pytest.mark.parametrize('turn', TURNS, ids=str)
def test_upright(turn):
  """Each corner goes where the matrix says: (x, y) -> (a x + c y, b x + d y), then moved to start at 0."""
  a, b, c, d = turn
  pixels = np.zeros((48, 64, 3), np.uint8)
  for y, x in itertools.product(range(2), range(2)):
    pixels[y * 24 : y * 24 + 24, x * 32 : x * 32 + 32] = 60 * (1 + 2 * y + x)
  data = clip('mp4', [pixels] * 2, turn=[a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30])
  frame = next(read_frames(data, FrameSampler(), 'here'))
  assert frame.shape == ((48, 64, 3) if a else (64, 48, 3))
  assert check_video(data, 'here')[2:] == frame.shape[1::-1]
  for y, x in itertools.product(range(2), range(2)):
    to_x, to_y = (a * x + c * y) % 2 if a + c > 0 else (a * x + c * y + 1), 0
    to_y = b * x + d * y if b + d > 0 else b * x + d * y + 1
    at = frame[to_y * frame.shape[0] // 2 + 12, to_x * frame.shape[1] // 2 + 12]
    assert np.abs(at.astype(int) - 60 * (1 + 2 * y + x)).max() < 12


def test_quarter_turn_agrees_with_pyav():
  data = clip('mp4', 3, turn=[0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30])
  with av.open(io.BytesIO(data)) as file:
    frame = next(file.decode(video=0))
    expected = np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)
  np.testing.assert_array_equal(next(read_frames(data, FrameSampler(), 'here')), expected)


def test_slanted():
  data = clip('mp4', 2, turn=[ONE, ONE, 0, -ONE, ONE, 0, 0, 0, 1 << 30])
  refused(data, 'E_VIDEO_FORMAT', 'expected a display matrix of quarter turns and flips; found 65536, 65536, -65536')


# --- bad files ---


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

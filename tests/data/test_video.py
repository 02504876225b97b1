"""Sampled frames by the number each shows, the released package's indices and pixels, upright frames."""

from __future__ import annotations

import io
import itertools
import json
from fractions import Fraction

import av
import numpy as np
import pytest
from golden_cases import GOLDEN
from PIL import Image
from video_clips import KINDS, clip, number, numbered, numbers, refused

from llava_mini_jax.data import video
from llava_mini_jax.data.images import ImageProcessor, normalize
from llava_mini_jax.data.video import FrameSampler, check_video, read_frames, squash

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

  monkeypatch.setattr(video, '_decoded', lambda container, stream, where, bounds: map(Frame, range(len(times))))
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

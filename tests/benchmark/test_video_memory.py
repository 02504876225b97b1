"""Memory is flat in the number of frames if they are encoded in chunks, and grows with them if not."""

from __future__ import annotations

import pytest
from small_model import small_config

from llava_mini_jax.benchmark.video_memory import describe, memory_by_frames, video_row

FRAMES = (16, 256)


def temporary(chunk: int) -> tuple[int, int]:
  config = small_config(visual_chunk=chunk)
  few, many = memory_by_frames(config, FRAMES[::-1], run=False, text=8)
  assert (few['frames'], many['frames']) == FRAMES
  pixels = config.vision.image_size**2 * 3
  assert 240 * pixels < many['argument_bytes'] - few['argument_bytes'] < 250 * pixels
  return few['temporary_bytes'], many['temporary_bytes']


def test_memory_by_frames():
  few, many = temporary(8)
  row = 240 * 24 * 4  # float32 tokens of the further frames
  assert many - few < 6 * row
  assert many < 1.6 * few
  few, many = temporary(0)
  assert many > 8 * few


@pytest.mark.slow
def test_a_video_that_is_encoded():
  (found,) = memory_by_frames(small_config(visual_chunk=8), [20], run=True, text=8)
  assert found['output_bytes'] == 32 * 24 * 4
  assert found['peak_resident_bytes'] > found['temporary_bytes'] > 0
  table = describe([found]).splitlines()
  assert table[0].split()[:3] == ['frames', 'argument', 'output'] and table[1].split()[0] == '20'


def test_the_row_is_a_video_and_a_text():
  """Laid out as a prompt: T, L and the places of frames rounded up, the text padded by no frame's slot."""
  row = video_row(small_config(visual_chunk=3), 5, text=18)
  assert row.slot_index.tolist() == [[[0], [1], [2], [3], [4], [32]]]
  assert row.tokens.shape == (1, 32) and row.pixels.shape == (1, 6, 1, 32, 32, 3)
  assert row.fuse_index.shape == (1, 6, 32)
  assert row.fuse_index[0, :5].tolist() == [[*range(5, 23), *[32] * 14]] * 5 and not row.fuse_mask[0, 5].any()
  assert video_row(small_config(visual_chunk=3), 500, text=18).fuse_index.shape == (1, 501, 32)

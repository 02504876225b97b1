"""What packing saves on samples of the lengths of an instruction mix: places in use, and samples per row.

The lengths are assumed, not counted: uniform from 60 to 400 tokens, one vision token included, and one image in 15 of
16 samples. Source of the share: LLaVA-v1.5 (arXiv 2310.03744, Table 7), 625K of whose 665K samples have an image.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from llava_mini_jax.data.packing import Fill, fill, plan
from llava_mini_jax.markdown import table

SHORTEST, LONGEST, WITH_IMAGE = 60, 400, 15 / 16


@dataclasses.dataclass(frozen=True)
class Gain:
  """Rows of so many tokens and visuals, filled from `window` samples at a time; seconds: that the plan took."""

  length: int
  visuals: int
  window: int
  apart: float  # share of tokens in use with one sample a row
  packed: Fill
  seconds: float


def assumed_sizes(samples: int, seed: int = 0) -> np.ndarray:
  """int[samples 2], (tokens, visuals)."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(SHORTEST, LONGEST + 1, samples), rng.random(samples) < WITH_IMAGE], axis=1)


def gains(
  samples: int = 20_000,
  shapes: tuple[tuple[int, int], ...] = ((1024, 8), (2048, 8), (2048, 10), (2048, 16), (4096, 32)),
  windows: tuple[int, ...] = (64, 512, 4096),
) -> Iterator[Gain]:
  """One for each shape (tokens, visuals) of a row and each window."""
  sizes = assumed_sizes(samples)
  for shape in shapes:
    for window in windows:
      start = time.perf_counter()
      groups = plan(sizes, shape, 0, window=window)
      seconds = time.perf_counter() - start
      yield Gain(*shape, window, sizes[:, 0].mean() / shape[0], fill(groups, sizes, shape), seconds)


def describe(found: Iterator[Gain]) -> str:
  """A table in Markdown."""
  head = ['row: tokens, visuals', 'window', 'tokens in use, unpacked', 'packed', 'visuals in use', 'samples a row']
  rows = []
  for gain in found:
    row = f'{gain.length:,}, {gain.visuals}', f'{gain.window:,}', f'{gain.apart:.1%}', f'{gain.packed.tokens:.1%}'
    rest = f'{gain.packed.visuals:.1%}', f'{gain.packed.samples:.2f}', f'{gain.seconds:.1f} s'
    rows.append(row + rest)
  return '\n'.join(table([*head, 'plan'], rows))

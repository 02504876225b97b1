"""Runs every image and frame of a dataset through a frozen vision tower, once, and writes what comes out.

Enters: a split of a prepared dataset, a `MediaProcessor`, and a function that encodes pixels. Leaves: the files that
`features` describes. Which records a file holds, and which visuals are encoded together, does not depend on who writes
it: any number of processes, killed and started again as often as may be, leave the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llava_mini_jax.data.conversation import VIDEO_TAG, tagged_media, turns_from_llava
from llava_mini_jax.data.features import HEADER, Layout, check_layout, read_header
from llava_mini_jax.data.images import MEAN_COLOR
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.records import Record, Split

_FILE_BYTES = 2**30  # about; the unit of what a killed process does again
_FILE_RECORDS = 4096
_SAMPLED = 64  # records looked at to estimate how many visuals there are
_AHEAD = 64  # records decoded before they are asked for

Encode = Callable[[np.ndarray], Any]  # uint8[batch V height width 3] -> [batch V P W], which may still be computing


@dataclasses.dataclass(frozen=True)
class Estimate:
  """visuals of all records; about so many if only some were looked at."""

  visuals: int
  about: bool

  def describe(self, layout: Layout) -> str:
    shape = ' x '.join(map(str, layout.shape))
    count = f'{"about " if self.about else ""}{self.visuals:,} images or frames in {layout.records:,} records'
    size = f'{layout.bytes_per_visual:,} bytes each ({shape} {layout.dtype})'
    return f'{count}, {size}: {self.visuals * layout.bytes_per_visual / 2**30:,.3f} GiB'


def estimate(source: Split, processor: MediaProcessor) -> Estimate:
  """How many visuals a split has, from its tags; of at most 64 records, evenly spread, whose videos are decoded."""
  looked_at = np.unique(np.linspace(0, len(source) - 1, min(len(source), _SAMPLED)).astype(int))
  found = sum(_count(source[int(index)], processor) for index in looked_at)
  return Estimate(round(found * len(source) / len(looked_at)), len(looked_at) < len(source))


def _count(record: Record, processor: MediaProcessor) -> int:
  streams = _streams(record, processor)
  return sum(1 if tag != VIDEO_TAG else sum(1 for _ in stream()) for tag, stream in streams)


def with_file_size(layout: Layout, found: Estimate) -> Layout:
  """The layout whose files have about 1 GiB."""
  each = max(1, found.visuals * layout.bytes_per_visual // layout.records)
  return dataclasses.replace(layout, records_per_file=max(1, min(_FILE_RECORDS, _FILE_BYTES // each)))


def write_header(directory: Path, layout: Layout) -> Layout:
  """Begins, or joins what was begun: -> the layout to write by, with sizes of files and batches of who came first.

  Raises:
    ConfigError: the features there are others; names every field that differs.
    DataError: E_FEATURES_CORRUPT.
  """
  directory.mkdir(parents=True, exist_ok=True)
  header = directory / HEADER
  if not header.exists():
    temporary = directory / f'.{HEADER}.{uuid.uuid4().hex}'
    temporary.write_text(json.dumps(dataclasses.asdict(layout), indent=2) + '\n')
    try:
      with contextlib.suppress(FileExistsError):  # who came first in between is the same, or is refused below
        os.link(temporary, header)
    finally:
      temporary.unlink()
  there = read_header(directory)
  check_layout(directory, there, layout)
  return there


def write_files(
  directory: Path,
  layout: Layout,
  source: Split,
  processor: MediaProcessor,
  encode: Encode,
  *,
  files: Iterable[int],
  threads: int = 1,
  progress: Callable[[int], object] = lambda records: None,
) -> int:
  """Writes those of `files` that are not there yet.

  At most two batches of visuals, and the images of 64 records, are in memory at a time; a video is read frame by frame.

  Args:
    layout: from `write_header`. files: their numbers, below `layout.files`; no two processes may share one.
    threads: that read and decode images.
    progress: called with the number of records just finished.
  Returns:
    Visuals encoded.
  Raises:
    DataError: what is wrong with the first bad record; files finished before it stay.
  """
  visuals = 0
  for file in files:
    items, index = layout.paths(directory, file)
    if index.exists():
      progress(len(layout.indices(file)))
      continue
    partial = items.with_suffix('.partial')
    counts: list[list[int]] = []
    # Uncompressed: bfloat16 noise hardly shrinks. A group is what is read for one item.
    writer = ArrayRecordWriter(str(partial), 'group_size:1,uncompressed')
    try:
      shown = _shown(source, processor, layout.indices(file), threads, counts, progress)
      for features in _encoded(shown, encode, layout.visuals_per_batch):
        writer.write(features.tobytes())
        visuals += 1
    finally:
      writer.close()
    os.replace(partial, items)
    temporary = index.with_suffix('.partial.json')
    temporary.write_text(json.dumps(counts, separators=(',', ':')) + '\n')
    os.replace(temporary, index)
  return visuals


def _shown(source, processor, indices, threads, counts, progress) -> Iterator[np.ndarray]:
  """uint8[V height width 3] of every visual; fills `counts` by record and tag."""

  def read(index: int) -> list[Iterable[np.ndarray]]:
    if index == len(source):
      size = processor.images.size
      return [[np.broadcast_to(MEAN_COLOR, (processor.images.views, size, size, 3))]]
    streams = ((tag, map(processor.views, stream())) for tag, stream in _streams(source[index], processor))
    return [views if tag == VIDEO_TAG else list(views) for tag, views in streams]

  for tags in _ahead(read, indices, threads):
    counts.append([])
    for views in tags:
      counts[-1].append(0)
      for one in views:
        counts[-1][-1] += 1
        yield one
    progress(1)


def _streams(record: Record, processor: MediaProcessor) -> list[tuple[str, Callable[[], Iterator[np.ndarray]]]]:
  """(tag, what reads its visuals) of each tag in order."""
  where = f'sample {record["id"]!r}'
  turns = turns_from_llava(record['conversations'], where)

  def reader(i: int, tag: str, data: bytes):
    return lambda: processor.stream(data, tag, f'{where}: {tag.strip("<>")} {i}')

  pairs = enumerate(tagged_media(turns, record['media'], where))
  return [(tag, reader(i, tag, data)) for i, (tag, data) in pairs]


def _ahead(function: Callable, items: Iterable, threads: int) -> Iterator:
  """function of each item in order, computed ahead by threads."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _encoded(shown: Iterable[np.ndarray], encode: Encode, batch_size: int) -> Iterator[np.ndarray]:
  """[V P W] of each; one batch is read while the one before is computed."""
  before: tuple[Any, int] = (np.zeros(0), 0)
  for group in _batched(shown, batch_size):
    pixels = np.zeros((batch_size, *group[0].shape), np.uint8)
    pixels[: len(group)] = group
    now = encode(pixels), len(group)
    yield from np.asarray(before[0])[: before[1]]
    before = now
  yield from np.asarray(before[0])[: before[1]]


def _batched(items: Iterable, size: int) -> Iterator[tuple]:
  items = iter(items)
  while group := tuple(itertools.islice(items, size)):
    yield group

"""How many tokens and visuals every record needs, measured once and kept.

Enters: a random-access source of `records.Record`. Leaves: int32[len(source) 2], from which `packing` decides which
records share a row or a batch. Measuring reads and tokenizes every record, and decodes videos, so the result is kept
in a file; a restart reads that.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import transformers
from tqdm import tqdm

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.conversation import (
  VIDEO_TAG,
  encode,
  load_template,
  tagged_media,
  template_fingerprint,
  turns_from_llava,
)
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Mixture
from llava_mini_jax.data.records import Record, Split, place_of
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.tokenizer import fingerprint
from llava_mini_jax.data.video import FrameSampler, read_frames

SIZES_NAME = 'sizes.npz'

_MEASURE = 1  # goes up when a record comes to measure otherwise, so that what is kept counts no longer


@dataclasses.dataclass(frozen=True)
class SampleSize:
  """Record -> (tokens with vision slots, visuals), exactly as `samples.RowTransform` lays it out.

  Images are not decoded; videos are, unless the sampler says at once how many frames there will be.

  Attributes:
    tokenizer, template, system, model, row: as the arguments of `pipeline.make_iterator`.
    sampler: of `media.MediaProcessor`.
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  template: str | os.PathLike
  system: str | None
  model: LlavaMiniConfig
  row: RowShape
  sampler: FrameSampler = FrameSampler()

  def __call__(self, record: Record) -> tuple[int, int]:
    """Raises DataError as `conversation.encode`, `conversation.tagged_media` and `video.read_frames`."""
    where = f'sample {record["id"]!r}'
    turns = turns_from_llava(record['conversations'], where)
    pairs = tagged_media(turns, record['media'], where)
    visuals = sum(self._visuals(tag, data, where) for tag, data in pairs)
    ids = encode(self.tokenizer, load_template(self.template), turns, system=self.system, where=where).ids
    untagged = int(not pairs and self.model.text_only == 'zero_image')
    return len(ids) - len(pairs) + visuals * self.row.tokens_per_visual, visuals + untagged

  def _visuals(self, tag: str, data: bytes | Path, where: str) -> int:
    if tag != VIDEO_TAG:
      return 1
    if self.sampler.count and self.sampler.rule == 'timestamp':
      return self.sampler.count
    return sum(1 for _ in read_frames(data, self.sampler, f'{where}: video'))

  @property
  def fingerprint(self) -> str:
    """sha256 of all that decides what a record measures, itself apart."""
    template = template_fingerprint(self.template)
    layout = self.row.tokens_per_visual, self.model.text_only, dataclasses.asdict(self.sampler)
    parts = [_MEASURE, fingerprint(self.tokenizer), template, self.system, *layout]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept_sizes(
  file: Path, source: Split | Mixture, size_of: SampleSize, *, workers: int = 0, bad_sample: str = 'raise'
) -> np.ndarray:
  """`record_sizes`, read from a file if they are there, else measured and written to it, whole or not at all.

  The file belongs in the directory of the run: that can be written to by construction, while a dataset may be on a
  read-only disk and shared with other runs, and a mixture has no one directory.

  Args:
    file: .npz with the sizes and the fingerprint of source and `size_of`. One that is damaged, or of another
      fingerprint, is told of on stderr and replaced.
    workers, bad_sample: as `record_sizes`.
  Raises:
    DataError: as `record_sizes`. OSError: the file cannot be read or written.
  """
  parts = [source.fingerprint, size_of.fingerprint, *(['mask'] if bad_sample == 'mask' else [])]
  key = hashlib.sha256(' '.join(parts).encode()).hexdigest()
  sizes = _read(file, key, len(source))
  if sizes is None:
    sizes = record_sizes(source, size_of, workers=workers, bad_sample=bad_sample)
    _write(file, key, sizes)
  return sizes


def record_sizes(
  source: Sequence[Record],
  size_of: Callable[[Record], tuple[int, int]],
  *,
  workers: int = 0,
  bad_sample: str = 'raise',
) -> np.ndarray:
  """(tokens, visuals) of every record, int32[len(source) 2]; reads each once, behind a progress bar on stderr.

  Args:
    workers: processes that share the work; the result is the same. They are spawned, so source and `size_of` travel by
      pickle and the main module needs its `if __name__ == '__main__'`. 0 = none.
    bad_sample: mask = one that cannot be measured needs nothing, (0, 0): it will be a masked row.
  Raises:
    DataError: what is wrong with the first bad record.
  """
  parts = 8 * workers if workers else -(-len(source) // 64)
  bounds = [len(source) * i // parts for i in range(parts + 1)]
  shares = (*map(itertools.repeat, (source, size_of, bad_sample)), bounds[:-1], bounds[1:])
  with tqdm(total=len(source), desc='measuring', unit=' records') as bar:
    if not workers:
      return _joined(map(_sizes, *shares), bar)
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
      return _joined(pool.map(_sizes, *shares), bar)


def _sizes(source: Sequence[Record], size_of: Callable, bad_sample: str, start: int, stop: int) -> np.ndarray:
  sizes = np.zeros((stop - start, 2), np.int32)
  for i in range(start, stop):
    try:
      sizes[i - start] = _size(source, size_of, i)
    except DataError:
      if bad_sample == 'raise':
        raise
  return sizes


def _size(source: Sequence[Record], size_of: Callable, index: int) -> tuple[int, int]:
  record = source[index]
  try:
    return size_of(record)
  except DataError as error:
    raise error.at(place_of(source, index)) from error


def _joined(parts: Iterable[np.ndarray], bar: tqdm) -> np.ndarray:
  found = [np.zeros((0, 2), np.int32)]
  for part in parts:
    found.append(part)
    bar.update(len(part))
  return np.concatenate(found)


def _read(file: Path, key: str, count: int) -> np.ndarray | None:
  """None if there are none that can be used."""
  if not file.exists():
    return None
  try:
    with np.load(file, allow_pickle=False) as stored:
      found, sizes = str(stored['fingerprint']), stored['sizes']
    if sizes.shape != (count, 2) and found == key or sizes.dtype != np.int32:
      raise ValueError(f'expected int32 sizes of {count} records; found {sizes.dtype}{list(sizes.shape)}')
  except OSError:
    raise
  except Exception as error:  # the parsers of zip and npy fail on damage each in its own way
    return _again(file, f'damaged ({error or type(error).__name__})')
  if found != key:
    return _again(file, 'of other records, or of another tokenizer, template or layout')
  return sizes


def _again(file: Path, why: str) -> None:
  print(f'{file}: {why}; every record is measured again', file=sys.stderr, flush=True)


def _write(file: Path, key: str, sizes: np.ndarray) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(f'.{file.name}.{uuid.uuid4().hex[:8]}')  # several processes may write the same
  try:
    with temporary.open('xb') as out:
      np.savez(out, fingerprint=np.array(key), sizes=sizes)
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)

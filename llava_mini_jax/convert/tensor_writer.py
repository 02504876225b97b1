"""safetensors shards, written piece by piece: enter planned tensors, leaves a directory as Hugging Face lays it out.

A shard's header needs only names, dtypes and shapes, so no tensor has to be in memory longer than it takes to write
it, and a stacked parameter never is in memory as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.tensor_files import CHECKSUMS, FLOATS, INDEX, SINGLE
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.staging import is_vacant, staged_directory

_CODES = {dtype: code for code, dtype in FLOATS.items()}
_UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor to write. pieces: arrays that make it up one after the other, in C order; cast to `dtype`."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: Callable[[], Iterable[np.ndarray]]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
  """Bytes from `5GB`, `200MB`, `1000KB` or a bare number. Raises ConfigError."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text.strip().upper())
  size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if size < 1:
    raise ConfigError(f'max_shard_size: expected a size such as 5GB or 500MB; found {text!r}')
  return size


def write_tensors(
  directory: Path, planned: Sequence[Planned], *, max_shard_bytes: int, progress: Callable[[str], None] = lambda _: None
) -> None:
  """Writes `model.safetensors`, or shards and their index, and SHA256SUMS of all of them.

  Args:
    max_shard_bytes: a tensor larger than that gets a shard of its own.
    progress: told each tensor's name before it is written.
  """
  shards = _shards(planned, max_shard_bytes)
  count = len(shards)
  names = [SINGLE] if count == 1 else [f'model-{i:05}-of-{count:05}.safetensors' for i in range(1, count + 1)]
  sums = {name: _write_shard(directory / name, shard, progress) for name, shard in zip(names, shards, strict=True)}
  if count > 1:
    index = {
      'metadata': {'total_size': sum(tensor.nbytes for tensor in planned)},
      'weight_map': {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')
  (directory / CHECKSUMS).write_text(''.join(f'{digest}  {name}\n' for name, digest in sums.items()))


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
  """A directory to fill, which takes its name only when all of it is written.

  Raises:
    DataError: E_EXISTS if there is one by that name that is not empty.
  """
  _require_vacant(directory := directory.absolute())
  with staged_directory(directory) as partial:
    yield partial
    _require_vacant(directory)


def _require_vacant(directory: Path) -> None:
  if not is_vacant(directory):
    raise DataError('E_EXISTS', str(directory), 'expected no such file or directory, or an empty one')


def _shards(planned: Sequence[Planned], limit: int) -> list[list[Planned]]:
  shards: list[list[Planned]] = [[]]
  size = 0
  for tensor in planned:
    if shards[-1] and size + tensor.nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  return shards


def _write_shard(file: Path, shard: Sequence[Planned], progress: Callable[[str], None]) -> str:
  """-> its sha256."""
  header, end = {'__metadata__': {'format': 'pt'}}, 0  # transformers refuses files without a format
  for tensor in shard:
    start, end = end, end + tensor.nbytes
    header[tensor.name] = {'dtype': _CODES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [start, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  digest = hashlib.sha256()
  with file.open('wb') as stream:

    def write(data: bytes | memoryview) -> None:
      digest.update(data)
      stream.write(data)

    write(len(text).to_bytes(8, 'little'))
    write(text)
    for tensor in shard:
      progress(tensor.name)
      before = stream.tell()
      for piece in tensor.pieces():
        write(np.ascontiguousarray(piece, tensor.dtype).reshape(-1).view(np.uint8).data)
      if stream.tell() - before != tensor.nbytes:
        raise ValueError(f'{tensor.name}: expected {tensor.nbytes} bytes; its pieces had {stream.tell() - before}')
  return digest.hexdigest()

"""What may happen to the files of a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path


def files(directory: Path) -> list[Path]:
  return sorted(path for path in directory.rglob('*') if path.is_file())


def largest(directory: Path) -> Path:
  """Where the arrays are."""
  return max(files(directory), key=lambda path: path.stat().st_size)


def snapshot(directory: Path) -> dict[str, bytes]:
  """Of the lock, which says who had it last, nothing."""
  return {str(path.relative_to(directory)): path.read_bytes() for path in files(directory) if path.name != 'lock'}


def flip_bit(path: Path, rng: random.Random) -> None:
  data = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


DAMAGES = {
  'deleted': Path.unlink,
  'cut short': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  'zeroed': lambda path: path.write_bytes(bytes(path.stat().st_size)),
}

"""What may happen to the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path


def files(directory: Path) -> list[Path]:
  return sorted(path for path in directory.rglob('*') if path.is_file())


def largest(directory: Path) -> Path:
  """Where the arrays are."""
  return max(files(directory), key=lambda path: path.stat().st_size)


def snapshot(directory: Path) -> dict[str, bytes]:
  return {str(path.relative_to(directory)): path.read_bytes() for path in files(directory)}

"""A directory that takes its name only when all of it is written."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def is_vacant(directory: Path) -> bool:
  """Whether there is nothing by that name, or an empty directory."""
  return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


@contextlib.contextmanager
def staged_directory(directory: Path, *, replace: bool = False) -> Iterator[Path]:
  """Yields a fresh directory beside `directory` that takes its place when the block ends well, and vanishes if not.

  Args:
    replace: take the place of what is there; it comes back if that fails.
  Raises:
    OSError: something that is not empty is in its place, and not to be replaced.
  """
  directory = directory.absolute()
  directory.parent.mkdir(parents=True, exist_ok=True)
  unique = uuid.uuid4().hex[:8]  # another process may be writing the same directory
  partial, old = (directory.with_name(f'.{directory.name}.{kind}-{unique}') for kind in ('partial', 'old'))
  partial.mkdir()
  try:
    yield partial
    if replace:
      directory.rename(old)
    try:
      partial.rename(directory)
    except OSError:
      if replace:
        old.rename(directory)
      raise
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(partial, ignore_errors=True)

"""Cells -> the lines of a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
  """A line for the names of the columns, one below them, and one for each row."""
  return [line(head), '|---' * len(head) + '|', *map(line, rows)]


def line(cells: Sequence[object]) -> str:
  return f'| {" | ".join(map(str, cells))} |'

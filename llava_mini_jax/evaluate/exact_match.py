"""Exact match, overall and by category."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def is_match(answer: str, truth: str) -> bool:
  """Equal up to case and surrounding space."""
  return answer.strip().lower() == truth.strip().lower()


def accuracy(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """rows with `correct` and `category` -> {accuracy, count, by_category: {name: {accuracy, count}}}; shares of 1."""
  groups: dict[str, list[bool]] = {}
  for row in rows:
    groups.setdefault(row['category'] or 'uncategorised', []).append(row['correct'])
  everything = [correct for group in groups.values() for correct in group]
  return dict(**_share(everything), by_category={name: _share(group) for name, group in sorted(groups.items())})


def _share(correct: list[bool]) -> dict[str, float]:
  return dict(accuracy=sum(correct) / max(len(correct), 1), count=len(correct))

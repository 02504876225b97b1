"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence

SAFE = 2  # verified ones that always stay


def preserved(steps: Sequence[int], keep: int | None, verified: Collection[int] | None) -> list[bool]:
  """For each of the steps, which rise, whether its checkpoint stays: the newest `keep`, and however old the `SAFE`
  newest of the verified ones, with all that came after them.

  Args:
    keep: None = all stay.
    verified: steps that were read back; None = nothing is, and the newest `keep` have to do.
  """
  stay, safe = [], 0
  for age, step in enumerate(reversed(steps)):
    stay.append(keep is None or age < keep or (verified is not None and safe < SAFE))
    safe += verified is not None and step in verified
  return stay[::-1]

"""What ends a training run."""

from __future__ import annotations

from collections.abc import Mapping


class CheckpointError(RuntimeError):
  """No checkpoint where one was asked for, or one that does not fit; the message lists every leaf at fault."""


class DamagedError(CheckpointError):
  """A checkpoint whose files are missing, cannot be read or hold other bits than were saved."""


class TrainingError(RuntimeError):
  """Training cannot go on; the message names the step and what was found."""


class Preempted(Exception):
  """The run was asked to end (SIGTERM), and saved where it is; the same command goes on from there."""


def mismatches(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
  """One line for each name that is missing, unexpected, or whose description is another."""
  faults = [f'{name}: missing' for name in sorted(wanted.keys() - found.keys())]
  faults += [f'{name}: unexpected' for name in sorted(found.keys() - wanted.keys())]
  both = sorted(wanted.keys() & found.keys())
  return faults + [f'{n}: expected {wanted[n]}, found {found[n]}' for n in both if wanted[n] != found[n]]

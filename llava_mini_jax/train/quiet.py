"""Keeps Orbax from printing tracebacks of damaged checkpoints, of which `train.stored` and `train.checkpoint` tell.

When one of many reads fails, Orbax leaves the others: their exceptions are printed by asyncio and by Python, hundreds
of them, after the one that was caught.
"""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging

_LEFT_ALONE = 'Event loop is closed'  # says what TensorStore calls back to the reads that Orbax has left


def quiet_orbax() -> None:
  """For the whole process; to be called once, under absl's log handler."""
  absl_logging.get_absl_handler().addFilter(_is_another)
  before = sys.unraisablehook

  def unraisable(found: sys.UnraisableHookArgs) -> None:
    code = getattr(found.object, 'cr_code', None)
    if str(found.exc_value) != _LEFT_ALONE and '/orbax/' not in getattr(code, 'co_filename', ''):
      before(found)

  sys.unraisablehook = unraisable


def _is_another(record: logging.LogRecord) -> bool:
  left = record.name == 'asyncio' and any(word in record.getMessage() for word in ('/orbax/', 'OCDBT'))
  return not left and '/orbax/' not in record.pathname

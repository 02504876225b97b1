"""What the media of one request may cost to decode. Size alone does not say: a video of some kilobytes can hold hours
of large frames.
"""

from __future__ import annotations

import functools
import threading
import time

from llava_mini_jax.data.video import Bounds
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.refusal import Refused
from llava_mini_jax.serve.threads import Left


class Watch:
  """Of one request. Its clock stands still while what was decoded is encoded, which may have to be compiled first."""

  def __init__(self, limits: Limits, left: threading.Event):
    """left: whether the request was given up."""
    self._limits, self._left = limits, left
    self._pixels, self._seconds, self._since = limits.decoded_pixels, limits.decode_seconds, 0.0

  def of(self, where: str) -> Bounds:
    """For the next medium, which `where` names; the clock runs from here."""
    self._since = time.monotonic()
    return Bounds(self._limits.video_pixels, functools.partial(self._spend, where))

  def check(self) -> None:
    """Raises Left."""
    if self._left.is_set():
      raise Left

  def _spend(self, where: str, pixels: int) -> None:
    """Raises Refused 422 where the budget or the time is used up, Left."""
    self.check()
    now = time.monotonic()
    self._pixels, self._seconds, self._since = self._pixels - pixels, self._seconds - (now - self._since), now
    if self._pixels < 0:
      most = self._limits.decoded_pixels
      raise Refused(422, f'{where}: expected at most {most} pixels in all frames; found more', param=where)
    if self._seconds < 0:
      seconds = self._limits.decode_seconds
      raise Refused(422, f'{where}: expected media that are decoded within {seconds:g} s; found more', param=where)

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
  """The clock runs from here."""

  def __init__(self, limits: Limits, left: threading.Event):
    """left: whether the request was given up."""
    self._limits, self._gone = limits, left
    self._pixels, self._until = limits.decoded_pixels, time.monotonic() + limits.decode_seconds

  def of(self, where: str) -> Bounds:
    """For one medium, which `where` names."""
    return Bounds(self._limits.video_pixels, functools.partial(self.spend, where))

  def spend(self, where: str, pixels: int = 0) -> None:
    """Raises Refused 422 where the budget or the time is used up, Left."""
    if self._gone.is_set():
      raise Left
    self._pixels -= pixels
    if self._pixels < 0:
      most = self._limits.decoded_pixels
      raise Refused(422, f'{where}: expected at most {most} pixels in all frames; found more', param=where)
    if time.monotonic() > self._until:
      seconds = self._limits.decode_seconds
      raise Refused(422, f'{where}: expected media that are decoded within {seconds:g} s; found more', param=where)

"""The engine's own thread, and answers that asyncio can wait for.

Enters: `Request`s from any thread. Leaves: an `Answering` each. The thread steps while there is work and sleeps while
there is none; after each step it wakes those who wait, so nobody asks the devices whether anything is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time

from llava_mini_jax.infer.core import PromptFailed
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.stream import Stream
from llava_mini_jax.serve.places import Place, Places
from llava_mini_jax.serve.refusal import Refused

LOG = logging.getLogger(__name__)

FAILED = 'the engine failed; the server must be started again'
FAILED_ALONE = 'the server failed; its log says why'


class Answering:
  """An answer that is on its way.

  Attributes:
    stream: what is there of it. first: when its first token was there, of `time.monotonic`; 0 = not yet.
  """

  def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop, place: Place):
    """place: held by the engine until nothing more is to come; whether the client reads it or not."""
    self.stream, self.loop, self.place, self.first = stream, loop, place, 0.0
    self.failed = ''  # why
    self.changed = asyncio.Event()

  async def change(self) -> None:
    """Waits until something is new. Raises Refused 500 if the engine failed."""
    await self.changed.wait()
    self.changed.clear()
    if self.failed:
      raise Refused(500, self.failed)

  async def finished(self) -> None:
    """Waits for all of it. Raises as `change`."""
    while self.stream.finish in ('', 'failed'):  # a failure is told after it has happened
      await self.change()


class Worker:
  """Owns the stepping of an engine.

  Attributes:
    failed: whether a step raised; then nothing is answered any more. places: of requests that are being prepared,
      wait or are answered.
  """

  def __init__(self, engine: Engine, *, queue: int, retry_seconds: int):
    """queue: how many requests may wait for a slot. retry_seconds: told to those that may not."""
    self.engine, self.failed = engine, False
    self.places = Places(engine.core.slots + queue, 'places', retry_seconds)
    self._open: set[Answering] = set()
    self._wake = threading.Condition()
    self._ends = False
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self, seconds: float) -> None:
    """Ends the thread, and waits for it so long; whatever is still open stays as it is."""
    with self._wake:
      self._ends = True
      self._wake.notify()
    self._thread.join(seconds)

  @property
  def working(self) -> bool:
    """Whether there is a thread."""
    return self._thread.is_alive()

  def check_room(self) -> None:
    """Raises Refused: 503 after a failure, 429 where all places are taken."""
    if self.failed:
      raise Refused(503, FAILED)
    self.places.check()

  def submit(self, request: Request, loop: asyncio.AbstractEventLoop, place: Place) -> Answering:
    """From any thread. Raises DataError for a prompt that cannot be, Refused 503."""
    laid, stream = self.engine.lay(request)
    answering = Answering(stream, loop, place)
    with self._wake:  # `_tell` comes after, so that it knows whatever the engine has finished
      if self.failed:
        raise Refused(503, FAILED)
      self.engine.core.add(laid, stream)
      self._open.add(answering)
      place.hold()
      self._wake.notify()
    return answering

  def leave(self, answering: Answering) -> None:
    """Nobody waits for it any more: its slot is free from the next step on."""
    answering.stream.cancel()
    with self._wake:
      self._wake.notify()

  def _run(self) -> None:
    while True:
      with self._wake:
        self._wake.wait_for(lambda: self._ends or self.engine.core.waiting or self.engine.core.active)
        if self._ends:
          return
      try:
        self.engine.step()
      except PromptFailed:
        LOG.exception('a prompt failed')
      except Exception:
        LOG.exception('the engine failed')
        with self._wake:
          self.failed = True
      self._tell()
      if self.failed:
        return

  def _tell(self) -> None:
    with self._wake:
      told = list(self._open)
      over = told if self.failed else [answering for answering in told if answering.stream.finish]
      self._open.difference_update(over)
    now = time.monotonic()
    for answering in told:
      if answering.stream.finish in ('', 'failed') and self.failed:
        answering.failed = FAILED
      elif answering.stream.finish == 'failed':
        answering.failed = FAILED_ALONE
      if answering.stream.ids and not answering.first:
        answering.first = now
      with contextlib.suppress(RuntimeError):  # its event loop has ended: nobody waits
        answering.loop.call_soon_threadsafe(answering.changed.set)
    for answering in over:
      answering.place.let_go()

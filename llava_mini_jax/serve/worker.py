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
from collections.abc import Iterator

from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.stream import Stream
from llava_mini_jax.serve.refusal import Refused

LOG = logging.getLogger(__name__)

FAILED = 'the engine failed; the server must be started again'
FAILED_ALONE = 'the server failed; its log says why'


class Answering:
  """An answer that is on its way.

  Attributes:
    stream: what is there of it. first: when its first token was there, of `time.monotonic`; 0 = not yet.
  """

  def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop):
    self.stream, self.loop, self.first = stream, loop, 0.0
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
    failed: whether a step raised; then nothing is answered any more. most: requests that have a place at a time.
  """

  def __init__(self, engine: Engine, *, queue: int, retry_seconds: int):
    """queue: how many requests may wait for a slot. retry_seconds: told to those that may not."""
    self.engine, self.failed = engine, False
    self.most, self._retry = engine.core.slots + queue, retry_seconds
    self._places = 0
    self._open: set[Answering] = set()
    self._wake = threading.Condition()
    self._ends = False
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread; whatever is still open stays as it is."""
    with self._wake:
      self._ends = True
      self._wake.notify()
    self._thread.join()

  @property
  def places(self) -> int:
    """Requests that are being prepared, wait or are answered."""
    return self._places

  def check_room(self) -> None:
    """Raises Refused: 503 after a failure, 429 where all places are taken."""
    if self.failed:
      raise Refused(503, FAILED)
    if self._places >= self.most:
      retry = {'retry-after': str(self._retry)}
      raise Refused(429, f'all {self.most} places are taken; try again in {self._retry} s', headers=retry)

  @contextlib.contextmanager
  def place(self) -> Iterator[None]:
    """For one request, from its preparation to its end; on the event loop. Raises as `check_room`."""
    self.check_room()
    self._places += 1
    try:
      yield
    finally:
      self._places -= 1

  def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Answering:
    """From any thread. Raises DataError for a prompt that cannot be, Refused 503."""
    answering = Answering(self.engine.submit(request), loop)
    with self._wake:
      if self.failed:
        raise Refused(503, FAILED)
      self._open.add(answering)
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
      except Exception:
        LOG.exception('the engine failed')
        with self._wake:
          alone = any(answering.stream.finish == 'failed' for answering in self._open)
          self.failed = not alone  # a prompt that cannot be put into a slot does not hinder others
      self._tell()
      if self.failed:
        return

  def _tell(self) -> None:
    with self._wake:
      told = list(self._open)
      self._open -= {answering for answering in told if answering.stream.finish}
    now = time.monotonic()
    for answering in told:
      if answering.stream.finish == 'failed':
        answering.failed = FAILED_ALONE
      elif self.failed and not answering.stream.finish:
        answering.failed = FAILED
      if answering.stream.ids and not answering.first:
        answering.first = now
      with contextlib.suppress(RuntimeError):  # its event loop has ended: nobody waits
        answering.loop.call_soon_threadsafe(answering.changed.set)

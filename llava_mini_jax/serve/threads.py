"""Threads that work for requests, a few at a time.

What waits for a thread is a coroutine: a request that is given up leaves nothing behind. One that has begun is told so
by an event, which it looks at when it can. No thread keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from llava_mini_jax.serve.places import Place

_Result = TypeVar('_Result')


class Left(Exception):
  """Nobody waits for this work any more."""


class Threads:
  def __init__(self, count: int, name: str):
    """count: how many work at a time."""
    self._free, self._name = asyncio.Semaphore(count), name
    self._working: dict[concurrent.futures.Future, threading.Event] = {}

  @property
  def working(self) -> int:
    return len(self._working)

  async def run(
    self,
    work: Callable[[threading.Event], _Result],
    place: Place | None = None,
    unwanted: Callable[[_Result], None] | None = None,
  ) -> _Result:
    """What `work` returns or raises; it is given the event that says whether its request was given up.

    Args:
      place: held while a thread works, whether anybody waits for it or not.
      unwanted: told the result of work that was given up.
    """
    await self._free.acquire()
    loop, left, job = asyncio.get_running_loop(), threading.Event(), concurrent.futures.Future()
    job.set_running_or_notify_cancel()
    self._working[job] = left
    if place:
      place.hold()

    def ended(_: concurrent.futures.Future) -> None:
      self._working.pop(job)
      if place:
        place.let_go()
      with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for a thread
        loop.call_soon_threadsafe(self._free.release)

    job.add_done_callback(ended)
    try:
      threading.Thread(target=_work, args=(job, work, left), name=self._name, daemon=True).start()
    except RuntimeError as error:  # the system gives no more threads
      job.set_exception(error)
    try:
      return await asyncio.wrap_future(job)
    except asyncio.CancelledError:
      left.set()
      if unwanted:
        job.add_done_callback(lambda job: None if job.exception() else unwanted(job.result()))
      raise

  def stop(self) -> None:
    """Tells all work that nobody waits for it."""
    for left in list(self._working.values()):
      left.set()


def _work(job: concurrent.futures.Future, work: Callable[[threading.Event], object], left: threading.Event) -> None:
  try:
    job.set_result(work(left))
  except BaseException as error:
    job.set_exception(error)
    del job  # else error, traceback and job would keep each other, and what the request sent

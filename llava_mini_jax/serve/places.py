"""How many requests of a kind there may be at a time: one that finds no place is told to come again."""

from __future__ import annotations

import threading

from llava_mini_jax.serve.refusal import Refused


class Places:
  """Attributes: most, taken: how many there are, and how many are in use. Any thread may use it."""

  def __init__(self, most: int, name: str, retry_seconds: int):
    """name: what they are called in the refusal. retry_seconds: told with it."""
    self.most, self.taken = most, 0
    self._name, self._retry, self._lock = name, retry_seconds, threading.Lock()

  def check(self) -> None:
    """Raises Refused 429 where all are taken."""
    if self.taken >= self.most:
      headers = {'retry-after': str(self._retry)}
      raise Refused(429, f'all {self.most} {self._name} are taken; try again in {self._retry} s', headers=headers)

  def take(self) -> Place:
    """Raises as `check`."""
    with self._lock:
      self.check()
      self.taken += 1
    return Place(self, self._lock)


class Place:
  """One of them. It has one holder at first, and is free again when the last one has let go."""

  def __init__(self, places: Places, lock: threading.Lock):
    self._places, self._lock, self._holders = places, lock, 1

  def hold(self) -> None:
    with self._lock:
      self._holders += 1

  def let_go(self) -> None:
    """Once for each holder."""
    with self._lock:
      self._holders -= 1
      self._places.taken -= not self._holders

  def __enter__(self) -> Place:
    return self

  def __exit__(self, *_: object) -> None:
    self.let_go()

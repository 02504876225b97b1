"""The process that serves: a socket, signals, and the order in which things end.

SIGTERM or SIGINT: no connection is accepted any more, open answers are finished, the process ends with status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.serve.limits import Limits

KEY_VARIABLE = 'LLAVA_MINI_KEY'
LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def read_key(path: str | None) -> str:
  """The key that clients must have: of a file, else of LLAVA_MINI_KEY, else none.

  Never an argument, which other users of the machine could read. Raises ConfigError for a file without one.
  """
  if not path:
    return os.environ.get(KEY_VARIABLE, '').strip()
  key = Path(path).read_text(encoding='utf-8').strip()
  if not key:
    raise ConfigError(f'key_file: expected a key in {path}; found none')
  return key


def host_names(host: str) -> tuple[str, ...]:
  """What requests may call the server: on loopback its names alone, elsewhere anything."""
  return LOOPBACK if host in LOOPBACK else ()


def warm_up(engine: Engine) -> None:
  """Compiles what a short question needs, with an image that is kept and without one."""
  image = engine.look([np.zeros((8, 8, 3), np.uint8)])
  prompts = [
    Prompt([dict(role='user', content=text)], media) for text, media in (('a', []), (f'{IMAGE_TAG}\na', [image]))
  ]
  engine.warm_up([Request(prompt, Sampling()) for prompt in prompts])


def config(app: FastAPI, limits: Limits, **options: Any) -> uvicorn.Config:
  """How uvicorn runs an app; `options` are uvicorn's."""

  class Protocol(_Headed):
    seconds = limits.header_seconds

  defaults = dict(
    http=Protocol,
    ws='none',
    log_level='warning',
    access_log=False,
    server_header=False,
    proxy_headers=False,
    timeout_graceful_shutdown=limits.drain_seconds,
  )
  return uvicorn.Config(app, **{**defaults, **options})


class _Headed(H11Protocol):
  """Closes a connection on which a request's head does not come to its end."""

  seconds = 10.0
  _timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    if self._timer:
      self._timer.cancel()

  def _watch(self) -> None:
    """The clock runs from the first byte of a head to its last."""
    waits = self.cycle is None or self.cycle.response_complete
    if waits and self._timer is None:
      self._timer = self.loop.call_later(self.seconds, self._close)
    elif not waits and self._timer:
      self._timer.cancel()
      self._timer = None

  def _close(self) -> None:
    self._timer = None
    if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
      self.transport.close()


def listen(host: str, port: int) -> socket.socket:
  """Raises ConfigError: the address is taken, or is none of this machine."""
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  bound = socket.socket(family, socket.SOCK_STREAM)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((host, port))
  except (OSError, OverflowError) as error:
    bound.close()
    reason = error.strerror if isinstance(error, OSError) else error
    raise ConfigError(f'serve: expected an address that is free; found {host}:{port}: {reason}') from error
  return bound


def serve(app: FastAPI, bound: socket.socket, limits: Limits) -> None:
  """Until a signal says to end and open answers are finished."""
  with _quiet_end():
    uvicorn.Server(config(app, limits)).run(sockets=[bound])


@contextlib.contextmanager
def _quiet_end() -> Iterator[None]:
  """uvicorn raises the signal once more after it has drained: that was the end that was asked for."""
  names = (signal.SIGTERM, signal.SIGINT)
  before = {name: signal.signal(name, lambda *_: None) for name in names}
  logging.getLogger('uvicorn.error').setLevel(logging.WARNING)
  try:
    yield
  finally:
    for name, handler in before.items():
      signal.signal(name, handler)


def announce(bound: socket.socket, name: str) -> str:
  """One line that says what is served, and where."""
  host, port = bound.getsockname()[:2]
  shown = f'[{host}]' if ':' in host else host
  return f'serving {name} at http://{shown}:{port}'

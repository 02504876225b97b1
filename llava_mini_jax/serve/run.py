"""The process that serves: a socket, signals, and the order in which things end.

SIGTERM or SIGINT: no connection is accepted any more, open answers are finished, the process ends with status 0, also
where a thread does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
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

  Never an argument, which other users of the machine could read. Raises ConfigError for a file without one, or a key
  that no header can hold.
  """
  source = path or KEY_VARIABLE
  key = (Path(path).read_text(encoding='utf-8') if path else os.environ.get(KEY_VARIABLE, '')).strip()
  if path and not key:
    raise ConfigError(f'key_file: expected a key in {path}; found none')
  if not (key.isascii() and key.isprintable()):
    raise ConfigError(f'key: expected printable ASCII in {source}; found something else')
  return key


def host_names(host: str, key: str, server_names: Iterable[str] = ()) -> tuple[str, ...]:
  """What requests may call the server, besides `server_names`; none = anything.

  On loopback its names alone: no key keeps a page out there whose name was made to point to it. Raises ConfigError for
  an address that other machines reach without a key.
  """
  if _is_loopback(host):
    return (*LOOPBACK, host)
  if not key:
    raise ConfigError(
      f'serve: expected a key in --key_file or {KEY_VARIABLE} where other machines reach the server; '
      f'found --host={host} without one'
    )
  return (*LOOPBACK, host) if tuple(server_names) else ()


def _is_loopback(host: str) -> bool:
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


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
    seconds, send_seconds = limits.header_seconds, limits.send_seconds

  defaults = dict(
    http=Protocol,
    ws='none',
    log_level='warning',
    access_log=False,
    server_header=False,
    proxy_headers=False,
    timeout_keep_alive=limits.idle_seconds,
    timeout_graceful_shutdown=limits.drain_seconds,
    limit_concurrency=app.state.service.worker.places.most + limits.connections,
  )
  return uvicorn.Config(app, **{**defaults, **options})


class _Headed(H11Protocol):
  """Closes a connection on which a request's head does not come to its end, or whose client does not read.

  Only here is a connection cut off: an app can close one, which waits for a client that may never read.
  """

  seconds, send_seconds = 10.0, 30.0
  _timer: asyncio.TimerHandle | None = None
  _sending: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    for timer in (self._timer, self._sending):
      if timer:
        timer.cancel()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._sending = self.loop.call_later(self.send_seconds, self.transport.abort)

  def resume_writing(self) -> None:
    super().resume_writing()
    if self._sending:
      self._sending.cancel()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    if self.transport.is_closing():  # once the rest is sent, which is too little for `pause_writing`
      self.loop.call_later(self.send_seconds, self.transport.abort)

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
  """An address of one's own, at which nobody is heard before `announce`.

  Raises ConfigError: the address is taken, or is none of this machine.
  """
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
  server = uvicorn.Server(config(app, limits))
  with _quiet_end(server):
    server.run(sockets=[bound])
  if app.state.service.working:  # Python would wait for it, or take away what it works with
    logging.getLogger(__name__).warning('ended before all work did')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def _quiet_end(server: uvicorn.Server) -> Iterator[None]:
  """uvicorn listens for signals a little later, and raises the one that ended it once more after it has drained."""

  def end(*_: object) -> None:
    server.should_exit = True

  names = (signal.SIGTERM, signal.SIGINT)
  before = {name: signal.signal(name, end) for name in names}
  logging.getLogger('uvicorn.error').setLevel(logging.WARNING)
  try:
    yield
  finally:
    for name, handler in before.items():
      signal.signal(name, handler)


def announce(bound: socket.socket, name: str) -> str:
  """One line that says what is served, and where; from here on clients can connect."""
  bound.listen()
  host, port = bound.getsockname()[:2]
  shown = f'[{host}]' if ':' in host else host
  return f'serving {name} at http://{shown}:{port}'

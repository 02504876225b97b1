"""The ASGI layer around the app: who may ask, how much is read and how long, and how it ended.

Nothing of a request is read before host, origin, key and announced length are checked. The body is counted while it
comes, whatever length was announced, and together with those of all other requests. An exception that nobody expected
is logged here and ends with status 500.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.refusal import Refused, refusal

LOG = logging.getLogger(__name__)

OPEN = ('/', '/health')  # what is served without a key
_DISCARD_SECONDS = 2.0  # for what is still coming when a body is refused: a client that writes does not read yet


class Gate:
  def __init__(
    self,
    app: ASGIApp,
    *,
    limits: Limits,
    key: str,
    hosts: Iterable[str],
    server_names: Iterable[str],
    ended: Callable[[str, int, float], None],
  ):
    """
    Args:
      key: what `Authorization: Bearer` must say; '' = nothing. hosts: names that this server goes by; none = any.
      server_names: further ones, which a proxy before it has; pages from there may use it.
      ended: told path, status (499 = the client left) and seconds of every request.
    """
    self._app, self._limits, self._key, self._ended = app, limits, key.encode(), ended
    self._names = frozenset(name.lower() for name in server_names)
    self._hosts = frozenset(name.lower() for name in hosts) | self._names
    self.open_bytes = 0  # of bodies of requests that are not answered yet

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status, limited = time.monotonic(), 499, None

    async def counted(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      headers = {name.decode('latin-1'): value.decode('latin-1') for name, value in scope['headers']}
      try:
        self._check(scope['path'], headers)
        limited = _Limited(receive, self, self._limits, headers)
        await self._app(scope, limited, counted)
      except Refused as refused:
        await refusal(refused)(scope, receive, counted)
    except ClientDisconnect:
      status = 499
    except Exception:
      LOG.exception('%s %s failed', scope['method'], scope['path'])
      if status == 499:
        await refusal(Refused(500, 'the server failed; its log says why'))(scope, receive, counted)
    finally:
      self.open_bytes -= limited.read if limited else 0
      self._ended(scope['path'], status, time.monotonic() - began)

  def _check(self, path: str, headers: dict[str, str]) -> None:
    """Hosts and origins keep pages of other sites, which a user's browser has open, from using a server on loopback."""
    host = headers.get('host', '').lower()
    if self._hosts and _name(host) not in self._hosts and path != '/health':  # which tells nothing, at any address
      raise Refused(403, f'host: expected one of {", ".join(sorted(self._hosts))}; found {host[:80]!r}')
    origin = headers.get('origin')
    if origin is not None and not self._is_own(origin.lower(), host):
      raise Refused(403, f'origin: expected this server; found {origin[:80]!r}')
    if self._key and path not in OPEN:
      scheme, _, found = headers.get('authorization', '').partition(' ')
      if not (hmac.compare_digest(found.strip().encode('latin-1'), self._key) and scheme.lower() == 'bearer'):
        raise Refused(401, 'expected a valid key: Authorization: Bearer KEY', headers={'www-authenticate': 'Bearer'})

  def _is_own(self, origin: str, host: str) -> bool:
    try:
      parts = urlsplit(origin)
      return parts.netloc == host or parts.hostname in self._names
    except ValueError:
      return False


class _Limited:
  """`receive` that counts and does not wait for ever. Raises Refused 413, 408, 429."""

  def __init__(self, receive: Receive, gate: Gate, limits: Limits, headers: dict[str, str]):
    self._receive, self._gate, self._limits, self.read, self._done = receive, gate, limits, 0, False
    announced = headers.get('content-length', '')
    self._announced = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    self._waits = headers.get('expect', '').lower() == '100-continue'
    self._until = asyncio.get_running_loop().time() + limits.read_seconds

  async def __call__(self) -> Message:
    if self._done:  # what comes now is that the client has left: that may take as long as an answer
      return await self._receive()
    if self._announced > self._limits.body_bytes:
      await self._refuse(self._announced)
    try:
      async with asyncio.timeout_at(self._until):
        message = await self._receive()
    except TimeoutError:
      raise Refused(408, f'expected the whole body within {self._limits.read_seconds:g} s') from None
    if message['type'] == 'http.request':
      size = len(message.get('body', b''))
      self.read += size
      self._gate.open_bytes += size
      self._done = not message.get('more_body', False)
      if self.read > self._limits.body_bytes:
        await self._refuse(self.read)
      if self._gate.open_bytes > self._limits.open_bytes:
        seconds = self._limits.retry_seconds
        headers = {'retry-after': str(seconds), 'connection': 'close'}
        raise Refused(429, f'too many bodies at a time; try again in {seconds} s', headers=headers)
    return message

  async def _refuse(self, found: int) -> None:
    if not (self._waits or self._done):
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
          more = True
          while more:
            more = (await self._receive()).get('more_body', False)
    raise Refused(413, f'expected a body of at most {self._limits.body_bytes} bytes; found {found}')


def _name(host: str) -> str:
  """Without a port."""
  return host.partition(']')[0].lstrip('[') if host.startswith('[') else host.partition(':')[0]

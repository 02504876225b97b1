"""Apps that answer on a free port of loopback, in a thread of the test's process."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image

from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.app import Service, make_app
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.run import config, listen

NAME, PATH = 'tiny', '/v1/chat/completions'


class Served:
  """Attributes: url. http: a client. openai: OpenAI's. service: behind it. server: uvicorn's."""

  def __init__(self, url: str, service: Service, server: uvicorn.Server, key: str):
    self.url, self.service, self.server = url, service, server
    headers = {'authorization': f'Bearer {key}'} if key else {}
    self.http = httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)
    own = httpx.Client(trust_env=False, timeout=60)
    self.openai = openai.OpenAI(base_url=f'{url}/v1', api_key=key or 'none', max_retries=0, http_client=own)

  def ask(self, **fields) -> httpx.Response:
    """POSTs a chat request; one short question unless `fields` say otherwise."""
    return self.http.post(PATH, json=chat(**fields))


def chat(content: object = 'hello', **fields) -> dict:
  return dict(model=NAME, messages=[dict(role='user', content=content)], **{'max_tokens': 6, **fields})


@contextlib.contextmanager
def served(engine: Engine, *, limits: Limits | None = None, key: str = '', **options) -> Iterator[Served]:
  limits = limits or Limits()
  app, bound = make_app(engine, name=NAME, limits=limits, key=key, **options), listen('127.0.0.1', 0)
  server = uvicorn.Server(config(app, limits))
  thread = threading.Thread(target=server.run, kwargs=dict(sockets=[bound]))
  thread.start()
  wait(lambda: server.started)
  one = Served(f'http://127.0.0.1:{bound.getsockname()[1]}', app.state.service, server, key)
  try:
    yield one
  finally:
    one.http.close()
    one.openai.close()
    server.should_exit = True
    thread.join(60)
    bound.close()
    assert not thread.is_alive()


def wait(holds: Callable[[], bool], seconds: float = 30) -> None:
  until = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < until, 'nothing came of it'
    time.sleep(0.005)


def png(pixels: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def data_uri(data: bytes, kind: str = 'image/png') -> str:
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'


def shows(*sources: str, text: str = 'color?', video: bool = False) -> list[dict]:
  """Parts of a message: images, or videos, and a text."""
  kind = 'video_url' if video else 'image_url'
  return [*({'type': kind, kind: dict(url=source)} for source in sources), dict(type='text', text=text)]


def send(server: Served, path: str = PATH, body: dict | bytes | None = None, head: str = '', **fields) -> socket.socket:
  """A request on a connection of its own, whose answer nobody has read; a chat unless a `body` says otherwise.

  head: other headers than those of a JSON body that is whole.
  """
  data = body if isinstance(body, bytes) else json.dumps(body or chat(**fields)).encode()
  host, port = server.url.removeprefix('http://').split(':')
  connection = socket.create_connection((host, int(port)), timeout=30)
  head = head or f'Content-Type: application/json\r\nContent-Length: {len(data)}'
  connection.sendall(f'POST {path} HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n'.encode() + data)
  return connection

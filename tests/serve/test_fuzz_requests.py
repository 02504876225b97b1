"""Requests that went wrong somewhere: each is answered in time, none with a 5xx, and the server goes on."""

from __future__ import annotations

import copy
import json
import random
import time

import httpx
import pytest
from asking import images
from serving import chat, data_uri, png, shows

pytestmark = pytest.mark.usefixtures('quick_compilation')

PATHS = ('/v1/chat/completions',) * 8 + (
  '/v1/compressor',
  '/v1/files',
  '/v1/files/file-1',
  '/v1/models',
  '/health',
  '/x',
)
ODD = (
  None,
  True,
  -1,
  0,
  1e308,
  float('nan'),
  float('inf'),
  '',
  '\ud800',
  '\0',
  'a' * 5000,
  [],
  {},
  [[]],
  2**63,
  '<image>',
)
ORIGINS = ('http://[', 'null', '', 'http://a b', 'http://:x', '//', 'http://[::1', '\xff')
CHARSETS = ('undefined', 'idna', 'punycode', 'utf-7', 'utf-16', 'hex', 'rot13', 'unicode_escape', '"', 'a' * 300)
TYPES = ('application/json',) * 12 + ('text/plain', '', 'multipart/form-data; boundary=x')
SLOWEST = 10.0  # seconds; what hangs takes a minute


def request(rng: random.Random) -> dict:
  """A good request of some kind."""
  image = data_uri(png(images(rng.randrange(4))[0]))
  content = rng.choice(['hello', shows(image), shows('file-1'), shows(image, image)])
  fields = dict(
    max_tokens=3, temperature=1.0, seed=1, stop=['a'], logprobs=True, top_logprobs=2, stream=True, top_p=0.5, n=1
  )
  return chat(content, **{name: fields[name] for name in rng.sample(sorted(fields), rng.randrange(5))}) | dict(
    max_tokens=3
  )


def places(value: object) -> list[tuple]:
  """(container, key) of everything inside."""
  keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [place for key, inner in list(keys) for place in ((value, key), *places(inner))]


def mutated(rng: random.Random) -> bytes:
  """Other values, keys that are missing or new, bytes of an image or of the JSON itself that changed."""
  body = copy.deepcopy(request(rng))
  for _ in range(rng.randrange(3)):
    inside, key = rng.choice(places(body) or [(body, 'model')])
    kind, old = rng.randrange(4), inside[key]
    if kind == 0 and isinstance(inside, dict):
      inside.pop(key)
    elif kind == 1 and isinstance(inside, dict):
      inside[rng.choice(('model', 'x', 'type', 'url', 'role', ''))] = inside.get(key)
    elif isinstance(old, str) and len(old) > 50:
      at = rng.randrange(len(old))
      inside[key] = old[:at] + rng.choice(('', 'A', '*', '=', '\u20ac')) + old[at + 1 :]
    else:
      inside[key] = copy.deepcopy(rng.choice(ODD))
  data = bytearray(json.dumps(body).encode())
  if rng.random() < 0.2:
    for _ in range(rng.randrange(1, 4)):
      data[rng.randrange(len(data))] = rng.randrange(256)
  return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def upload(rng: random.Random) -> tuple[bytes, str]:
  """A body and its content type: parts whose names are in some charset, damaged or not."""
  name = bytes(rng.randrange(32, 256) for _ in range(rng.randrange(9))).replace(b'"', b'')
  head = b'Content-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n'
  data = b'--x\r\n' + head + b'xyz\r\n--x--\r\n'
  kept = data if rng.random() < 0.5 else data[: rng.randrange(len(data))]
  return kept, f'multipart/form-data; boundary=x; charset={rng.choice(CHARSETS)}'


def fuzz(server, count: int, seed: int) -> dict[int, int]:
  """How often each status came."""
  rng, statuses = random.Random(seed), {}
  for i in range(count):
    method = rng.choice(('POST',) * 12 + ('GET', 'PUT', 'DELETE'))
    headers = {'content-type': rng.choice(TYPES)}
    body, path, began = mutated(rng), rng.choice(PATHS), time.monotonic()
    if path == '/v1/files':
      body, headers['content-type'] = upload(rng)
    if rng.random() < 0.05:
      headers['origin'] = rng.choice(ORIGINS).encode('latin-1')
    reply = server.http.request(method, path, content=body, headers=headers)
    assert reply.status_code < 500, (i, body[:2000], reply.text)
    assert time.monotonic() - began < SLOWEST, (i, body[:2000])
    if reply.status_code >= 400:
      message = reply.json()['error']['message']
      assert '\n' not in message and 'Traceback' not in message and len(message) < 1000, message
    statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
  return statuses


def check(server, count: int, seed: int) -> None:
  server.ask(), server.ask(content=shows(data_uri(png(images(0)[0]))))  # compiled before anything is timed
  statuses = fuzz(server, count, seed)
  assert statuses[200] > count // 20 and statuses[422] > count // 20 and statuses[400] > count // 100, statuses
  assert server.ask().is_success
  assert httpx.get(f'{server.url}/health', trust_env=False).json() == dict(status='ok')
  assert server.service.worker.places.taken == 0


def test_300_requests(server):
  check(server, 300, 0)


@pytest.mark.slow
def test_2000_requests(server):
  check(server, 2000, 1)

"""A server under load, from another process: requests per second, time to first token, what is lost, overload.

Clients ask one after the other and read each answer to its end as it streams. Then three times as many as there are
places do, without a pause after a refusal: those without a place are to be told 429, and the server to go on as before.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import dataclasses
import io
import itertools
import time
from collections.abc import Iterator

import httpx
import numpy as np
from PIL import Image

from llava_mini_jax.config import ConfigError

QUESTION = 'what color is the shape?'
_OVERLOAD = 5.0  # seconds
_SIZE = 64  # pixels a side of the images that are sent


@dataclasses.dataclass
class Load:
  """What came of some requests."""

  seconds: float = 0.0
  first: list[float] = dataclasses.field(default_factory=list)  # to the first text of each answer, s
  whole: list[float] = dataclasses.field(default_factory=list)  # to its end, s
  statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  lost: int = 0  # without any status, or whose stream broke off
  reused: int = 0  # images whose vision part was known


def load(url: str, *, clients: int, seconds: float, images: int, tokens: int, key: str = '') -> tuple[Load, Load, bool]:
  """
  Args:
    url: of the server. clients: that ask at the same time. images: that the questions are about, in turn.
    tokens: most of an answer.
  Returns:
    The steady load; the overload; whether the server answers afterwards. Raises ConfigError: no server there.
  """
  return asyncio.run(_load(url, clients, seconds, images, tokens, {'authorization': f'Bearer {key}'} if key else {}))


async def _load(url: str, clients: int, seconds: float, images: int, tokens: int, headers: dict) -> tuple:
  limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
  async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits, trust_env=False) as http:
    try:
      found = await http.get('/v1/models')
      found.raise_for_status()
      metrics = (await http.get('/metrics')).text
    except httpx.HTTPError as error:
      raise ConfigError(f'serve: expected a server at {url}; found {error}') from error
    bodies = itertools.cycle(_bodies(found.json()['data'][0]['id'], images, tokens))
    await _ask(http, next(bodies), Load())  # its programs are compiled
    steady = Load()
    began = time.monotonic()
    await asyncio.gather(*(_client(http, bodies, steady, began + seconds) for _ in range(clients)))
    steady.seconds = time.monotonic() - began
    over, began = Load(), time.monotonic()
    crowd = 3 * _places(metrics)
    await asyncio.gather(*(_client(http, bodies, over, began + min(seconds, _OVERLOAD)) for _ in range(crowd)))
    over.seconds = time.monotonic() - began
    after = Load()
    await _ask(http, next(bodies), after)
    return steady, over, after.statuses[200] == 1 and not after.lost


def _places(metrics: str) -> int:
  """Slots and queue of the server, from its metrics."""
  numbers = dict(line.rsplit(' ', 1) for line in metrics.splitlines() if line and not line.startswith('#'))
  return int(float(numbers['llava_mini_most_places']))


async def _client(http: httpx.AsyncClient, bodies: Iterator[dict], load: Load, until: float) -> None:
  while time.monotonic() < until:
    await _ask(http, next(bodies), load)


async def _ask(http: httpx.AsyncClient, body: dict, load: Load) -> None:
  began, first, whole = time.monotonic(), 0.0, False
  try:
    async with http.stream('POST', '/v1/chat/completions', json=body) as reply:
      load.statuses[reply.status_code] += 1
      if reply.status_code != 200:
        return
      async for line in reply.aiter_lines():
        now = time.monotonic() - began
        if not first and '"content": "' in line and '"content": ""' not in line:
          first = now
        if '"reused": 1' in line:
          load.reused += 1
        whole = whole or line == 'data: [DONE]'
  except httpx.HTTPError:
    whole = False
  if not whole:
    load.lost += 1
    return
  load.whole.append(time.monotonic() - began)
  load.first.append(first or load.whole[-1])


def _bodies(model: str, images: int, tokens: int) -> list[dict]:
  """Questions about images of noise."""
  bodies = []
  for seed in range(images):
    pixels, out = np.random.default_rng(seed).integers(0, 256, (_SIZE, _SIZE, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(out, 'PNG')
    image = dict(url=f'data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}')
    content = [dict(type='image_url', image_url=image), dict(type='text', text=QUESTION)]
    bodies.append(
      dict(
        model=model,
        messages=[dict(role='user', content=content)],
        max_tokens=tokens,
        stream=True,
        stream_options=dict(include_usage=True),
      )
    )
  return bodies


def describe(steady: Load, over: Load, recovered: bool) -> str:
  """Lines for a reader."""

  def milliseconds(times: list[float]) -> str:
    if not times:
      return 'none'
    return 'p50 {:.1f} ms, p99 {:.1f} ms'.format(*(1e3 * np.percentile(times, [50, 99])))

  statuses = ', '.join(f'{count} x {status}' for status, count in sorted(over.statuses.items()))
  count = len(steady.whole)
  return '\n'.join(
    [
      f'{count} answers in {steady.seconds:.1f} s: {count / steady.seconds:.1f} requests/s, {steady.lost} lost, '
      f'{steady.statuses.total() - steady.statuses[200]} refused, {steady.reused} about an image seen before',
      f'time to first token: {milliseconds(steady.first)}; to the last: {milliseconds(steady.whole)}',
      f'overload, {over.seconds:.1f} s of three clients per place: {statuses}, {over.lost} lost; '
      f'afterwards {"answers" if recovered else "DOES NOT ANSWER"}',
    ]
  )

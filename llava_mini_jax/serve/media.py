"""What a client shows: data URIs and uploaded files -> `Visuals` that the engine keeps between questions.

Nothing is fetched: an http(s) URL is refused, and so is any path. Media go by the sha256 of their bytes, so the same
image is looked at once whoever sends it again, in whatever form.
"""

from __future__ import annotations

import base64
import binascii
import collections
import concurrent.futures
import hashlib
import re
import threading
from collections.abc import Callable

from llava_mini_jax.data.conversation import IMAGE_TAG, VIDEO_TAG
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.video import UNBOUND, Bounds
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.infer.visuals import Visuals
from llava_mini_jax.serve.refusal import Refused

_DATA = re.compile(r'data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,', re.ASCII)
_SCHEME = re.compile(r'\s*([A-Za-z][A-Za-z0-9+.-]*):')
_PATIENCE = 0.25  # seconds until who waits for another's look sees whether it is still wanted itself
KEEP = {IMAGE_TAG: 'seen', VIDEO_TAG: 'features'}  # a video's keys and values would fill the devices


class Files:
  """Uploads in memory; the least recently used go first. Any thread may use it."""

  def __init__(self, most_bytes: int):
    self._most, self._bytes, self._lock = most_bytes, 0, threading.Lock()
    self._kept: collections.OrderedDict[str, tuple[str, bytes]] = collections.OrderedDict()

  def add(self, name: str, data: bytes) -> str:
    """-> its id, which the content alone decides."""
    file_id = f'file-{hashlib.sha256(data).hexdigest()[:32]}'
    with self._lock:
      self._forget(file_id)
      self._kept[file_id] = name, data
      self._bytes += len(data)
      while self._bytes > self._most:
        self._forget(next(iter(self._kept)))
    return file_id

  def get(self, file_id: str) -> tuple[str, bytes]:
    """Name and content. Raises Refused 404."""
    with self._lock:
      if file_id not in self._kept:
        raise Refused(404, f'file: expected one that was uploaded and is still kept; found {file_id[:50]!a}')
      self._kept.move_to_end(file_id)
      return self._kept[file_id]

  def delete(self, file_id: str) -> None:
    """Raises Refused 404."""
    self.get(file_id)
    with self._lock:
      self._forget(file_id)

  def _forget(self, file_id: str) -> None:
    if file_id in self._kept:
      self._bytes -= len(self._kept.pop(file_id)[1])

  def read(self, url: str, tag: str, where: str) -> bytes:
    """The bytes that an `image_url` or `video_url` stands for.

    Raises Refused: 403 a URL to fetch, 404 a file that is not kept, 422 anything else that is no base64 data URI.
    """
    if url.startswith('file-'):
      return self.get(url)[1]
    if not url.startswith('data:'):
      scheme = _SCHEME.match(url)
      if scheme and scheme[1].lower() in ('http', 'https', 'ftp', 'file', 'gs', 's3'):
        found = scheme[1].lower()
        raise Refused(
          403, f'{where}: expected a data URI or an uploaded file, nothing is fetched; found {found}:', param=where
        )
      raise Refused(422, f'{where}: expected a data URI or the id of an uploaded file; found neither', param=where)
    return _decoded(url, tag, where)


def _decoded(url: str, tag: str, where: str) -> bytes:
  head = _DATA.match(url[:256])
  kind = tag.strip('<>')
  if not head or not (head['type'] or '').startswith((f'{kind}/', 'application/octet-stream')):
    raise Refused(422, f'{where}: expected data:{kind}/TYPE;base64,...; found {url[:30]!a}', param=where)
  try:
    data = base64.b64decode(url[head.end() :], validate=True)
  except (binascii.Error, ValueError) as error:
    raise Refused(422, f'{where}: expected base64; {error}', param=where) from None
  if not data:
    raise Refused(422, f'{where}: expected data after base64,; found none', param=where)
  return data


class Looker:
  """Looks at each medium once. Any thread may use it."""

  def __init__(self, engine: Engine, *, cached: int, frames: int):
    """cached: images and frames that are kept, the least recently used go first. frames: most of one medium."""
    self._engine, self._cached, self._frames = engine, cached, frames
    self._kept: collections.OrderedDict[tuple[str, str], Visuals] = collections.OrderedDict()
    self._coming: dict[tuple[str, str], concurrent.futures.Future] = {}
    self._lock = threading.Lock()

  def look(self, data: bytes, tag: str, where: str, bounds: Bounds = UNBOUND) -> tuple[Visuals, bool]:
    """What the engine has seen of it, and whether it had before.

    Two that ask for the same at the same time look once.

    Raises DataError if it cannot be read, Refused 422 for too many frames, and what `bounds` raise.
    """
    key = tag, hashlib.sha256(data).hexdigest()
    while True:
      bounds.spend(0)
      with self._lock:
        if found := self._kept.get(key):
          self._kept.move_to_end(key)
          return found, True
        if mine := key not in self._coming:
          self._coming[key] = concurrent.futures.Future()
        coming = self._coming[key]
      if mine:
        self._settle(key, coming, lambda: self._seen(data, tag, where, bounds))
        return coming.result(), False
      try:
        return coming.result(_PATIENCE), True
      except DataError as error:  # of these bytes, whoever sent them
        raise DataError(error.code, where, error.message) from error
      except Exception:  # that request's own: it was given up or had no time left; or the look is not over yet
        continue

  def _settle(self, key: tuple[str, str], coming: concurrent.futures.Future, make: Callable[[], Visuals]) -> None:
    try:
      visuals = make()
    except BaseException as error:
      with self._lock:
        del self._coming[key]
      coming.set_exception(error)
      return
    with self._lock:
      del self._coming[key]
      self._kept[key] = visuals
      while sum(map(len, self._kept.values())) > self._cached:
        self._kept.popitem(last=False)
    coming.set_result(visuals)

  def _seen(self, data: bytes, tag: str, where: str, bounds: Bounds) -> Visuals:
    views = []  # what the tower reads of frames is small, and whole frames are not
    for frame in self._engine.encoder.media.stream(data, tag, where, bounds):
      if len(views) == self._frames:
        raise Refused(422, f'{where}: expected at most {self._frames} frames; found more', param=where)
      views += self._engine.views([frame])
    visuals = self._engine.core.look(KEEP[tag])
    visuals.add(views)
    return visuals

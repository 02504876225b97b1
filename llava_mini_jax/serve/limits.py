"""What one request, and all of them together, may ask of the server."""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Limits:
  """Raises ConfigError: a number below 1."""

  body_bytes: int = 20 * 2**20  # -> 413
  open_bytes: int = 160 * 2**20  # of the bodies of all requests that are not answered yet -> 429
  read_seconds: float = 30.0  # until the whole body is there -> 408
  header_seconds: float = 10.0  # until the head of a request is there; then the connection is closed
  # From an answer to the next request of its connection. Longer than clients keep one (openai and httpx: 5 s), so that
  # it is they who close it: a request that is on its way when the server closes is lost.
  idle_seconds: float = 60.0
  send_seconds: float = 30.0  # until a client reads on; then the connection is cut off
  connections: int = 256  # besides those that have a place -> 503
  media: int = 8  # images and videos of a request -> 422
  frames: int = 64  # images and frames of a request -> 422
  video_pixels: int = 4096 * 2160  # of a frame -> 422
  decoded_pixels: int = 2**33  # of all frames that a request makes the server decode, seen or not -> 422
  decode_seconds: float = 60.0  # for the media of a request -> 422
  characters: int = 131_072  # of text, before it is tokenized -> 422
  new_tokens: int = 1024  # of an answer -> 422
  queue: int = 32  # requests without a slot -> 429
  uploads: int = 8  # at a time -> 429
  retry_seconds: int = 1  # said with 429
  cached_visuals: int = 64  # images and frames whose vision part is kept
  file_bytes: int = 256 * 2**20  # of uploads that are kept
  prepare_threads: int = 2  # that decode media
  drain_seconds: int = 60  # for open answers, once the server is told to end

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name in ('queue', 'cached_visuals') else 1e-3
      if not value >= least:
        raise ConfigError(f'Limits.{field.name}: expected a positive number; found {value!r}')

"""Images or frames that outlive a question: encoded once, asked about any number of times.

Enters: views uint8[V size size 3], one visual after another, all at once or as they come. Leaves: their compressed
tokens, and chunk by chunk what text finds of them. Pre-fusion is causal and vision comes first, so neither depends on
the text (docs/inference.md). What is kept is a choice between memory and time:

  seen      pre-fusion's keys and values, on the devices: a question costs its text alone. For images.
  features  what the tower makes of them, in the host's memory: a question costs pre-fusion's vision part. For videos.
  pixels    the views themselves, in the host's memory: a question costs the tower too. For the longest videos.

Device memory does not grow with the number of visuals, `seen` apart.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from llava_mini_jax.config import require_choice
from llava_mini_jax.types import Seen

KEEP = ('seen', 'features', 'pixels')
_ids = itertools.count()


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A few neighbouring visuals. Arrays are padded to a size that is compiled; `count` of them are real."""

  count: int
  seen: Seen


@dataclasses.dataclass
class FusedSum:
  """The sum of a text fused with the first `visuals` visuals: more frames are added to it, none is read again."""

  text: bytes
  total: jax.Array  # float32[1 T D]
  visuals: int


class Visuals:
  """What stands for one `<image>` or `<video>` tag.

  Attributes:
    uid: another one for every object. fused: of the last question. of_video: whether `<video>` stands for them.
  """

  def __init__(self, encode: Callable, see: Callable, sizes: Callable[[int], int], chunk: int, keep: str):
    """Made by `Engine.look`.

    Args:
      encode, see: of `programs.Programs`, with parameters. sizes: of how many visuals a chunk of so many is.
      chunk: most visuals that are on the devices at a time. keep: one of KEEP.
    Raises:
      ConfigError: another `keep`.
    """
    require_choice('keep', keep, KEEP)
    self._encode, self._see, self._sizes, self._chunk, self.keep = encode, see, sizes, chunk, keep
    self.uid, self.fused, self.of_video = next(_ids), None, False
    self._compressed: list[np.ndarray] = []  # [C D] each
    self._kept: list[np.ndarray] = []  # of each visual its features [V P W] or pixels
    self._chunks: list[Chunk] = []

  def __len__(self) -> int:
    return len(self._compressed)

  def add(self, views: Iterable[np.ndarray]) -> None:
    """More visuals, uint8[V size size 3] each, in the order of their slots; `views` is read a chunk at a time.

    Not while a question about them is being answered.
    """
    views = iter(views)
    while some := list(itertools.islice(views, self._chunk)):
      pixels = self._padded(some)
      if self.keep == 'features':
        pixels = np.array(self._encode(pixels))
        self._kept += list(pixels[: len(some)])
      elif self.keep == 'pixels':
        self._kept += some
      seen = self._see(pixels)
      if self.keep == 'seen':
        self._chunks.append(Chunk(len(some), seen))
      # A copy: on CPUs a view would keep the device's array.
      self._compressed += list(np.array(seen.compressed)[: len(some)])

  def compressed(self) -> np.ndarray:
    """[M C D]."""
    return np.stack(self._compressed)

  @property
  def host_bytes(self) -> int:
    """Of features or pixels that are kept in host memory."""
    return sum(x.nbytes for x in self._kept)

  def chunks(self, start: int = 0) -> Iterator[Chunk]:
    """What text finds of them, from visual `start` on, where a chunk began or the visuals ended once."""
    if self.keep == 'seen':
      at = 0
      for chunk in self._chunks:
        if at >= start:
          yield chunk
        at += chunk.count
      return
    for at in range(start, len(self), self._chunk):
      some = self._kept[at : at + self._chunk]
      yield Chunk(len(some), self._see(self._padded(some)))

  def _padded(self, some: list[np.ndarray]) -> np.ndarray:
    """Filled up with the last one."""
    return np.stack(some + [some[-1]] * (self._sizes(len(some)) - len(some)))

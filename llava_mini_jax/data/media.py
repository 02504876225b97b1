"""Images and videos -> the visuals that the vision tower sees: one for an image, one per frame for a video."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llava_mini_jax.config import require_choice
from llava_mini_jax.data.conversation import VIDEO_TAG, Turn, tagged_media
from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.data.video import UNBOUND, Bounds, FrameSampler, read_frames, squash


@dataclasses.dataclass(frozen=True)
class MediaProcessor:
  """How an experiment reads media.

  Attributes:
    images: makes the views of a visual.
    sampler: which frames of a video are seen.
    frame_resize: squash = a frame is first squashed to the tower's square by nearest neighbour (released); aspect = it
      is treated as an image.
  """

  images: ImageProcessor
  sampler: FrameSampler = FrameSampler()
  frame_resize: str = 'squash'

  def __post_init__(self):
    require_choice('MediaProcessor.frame_resize', self.frame_resize, ('squash', 'aspect'))

  def read(self, source: bytes | Path, tag: str, where: str) -> list[np.ndarray]:
    """What stands for one `<image>` or `<video>` tag: uint8[h w 3] each, an image or frames in time order.

    Raises DataError as `images.load_image` and `video.read_frames`.
    """
    return list(self.stream(source, tag, where))

  def stream(self, source: bytes | Path, tag: str, where: str, bounds: Bounds = UNBOUND) -> Iterator[np.ndarray]:
    """`read`, one at a time: memory does not grow with the length of a video. bounds: of a video."""
    if tag != VIDEO_TAG:
      yield np.asarray(load_image(source, where))
      return
    for frame in read_frames(source, self.sampler, where, bounds):
      yield squash(frame, self.images.size) if self.frame_resize == 'squash' else frame

  def read_record(self, turns: Iterable[Turn], media: Sequence[bytes | Path], where: str) -> list[list[np.ndarray]]:
    """`read` for every tag of a conversation. Raises DataError E_IMAGE_TAGS too, if there is not a tag for each."""
    pairs = enumerate(tagged_media(turns, media, where))
    return [self.read(data, tag, f'{where}: {tag.strip("<>")} {i}') for i, (tag, data) in pairs]

  def views(self, visual: np.ndarray | Image.Image) -> np.ndarray:
    """uint8[h w 3] -> uint8[V size size 3]."""
    return self.images(as_image(visual))


def as_image(visual: np.ndarray | Image.Image) -> Image.Image:
  return visual if isinstance(visual, Image.Image) else Image.fromarray(visual)

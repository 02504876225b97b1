"""A conversation about images and videos that are encoded once, however many questions there are.

What is shown is kept as `visuals.Visuals`, and so is what the decoder has read: of a later question, what stood before
it is read again only where it is fused otherwise. With `prefusion.fuse_history_answers` (released) an answer enters
the decoder raw when it is said and fused when it is history, so reading begins at the last answer; without, after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from llava_mini_jax.data.conversation import IMAGE_TAG, MEDIA_TAG, VIDEO_TAG, Turn
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.core import Memory
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import DEFAULT, Sampling
from llava_mini_jax.infer.stream import Answer, Stream
from llava_mini_jax.infer.visuals import Visuals

Picture = np.ndarray | Image.Image


class Session:
  """One conversation; one question at a time.

  Attributes:
    turns: those that were answered. memory: what the decoder keeps; `memory.reused` tokens of the last prompt were not
      read again.
  """

  def __init__(self, engine: Engine, *, name: str = 'session'):
    """name: in errors."""
    self._engine, self._name = engine, name
    self._media: list[Visuals] = []
    self._new_tags = ''  # of what was shown since the last question
    self.start_over()

  def start_over(self) -> None:
    """Forgets the turns, not what was shown."""
    self.turns: list[Turn] = []
    self.memory = Memory()
    self._new_tags = ''.join(f'{VIDEO_TAG if visuals.of_video else IMAGE_TAG}\n' for visuals in self._media)

  def show_image(self, image: Picture, grid: int = 0) -> None:
    """An image, RGB uint8[h w 3], for the questions to come; grid as `DataConfig.grid`, 0 = the experiment's."""
    self._show(self._engine.look([image], grid=grid), IMAGE_TAG)

  def show_video(self, frames: Iterable[Picture], *, keep: str = 'features') -> Visuals:
    """A video, all of it or the beginning: frames are read a chunk at a time.

    Args:
      frames: RGB uint8[h w 3] each, in time order. keep: one of `visuals.KEEP`.
    Returns:
      What `add_frames` takes.
    """
    visuals = self._engine.look(frames, keep=keep)
    visuals.of_video = True
    self._show(visuals, VIDEO_TAG)
    return visuals

  def add_frames(self, video: Visuals, frames: Iterable[Picture]) -> None:
    """More frames of a video. A question that is asked again afterwards, before any answer, reads them alone."""
    video.add(self._engine.views(frames))

  def ask(self, question: str, sampling: Sampling = DEFAULT, *, remember: bool = True) -> Answer:
    """The whole answer; as `stream`."""
    stream, turns = self._submit(question, sampling, remember)
    answer = stream.result()
    self._end(turns, answer, remember)
    return answer

  def stream(self, question: str, sampling: Sampling = DEFAULT, *, remember: bool = True) -> Iterator[str]:
    """The answer in pieces of text; left before its end, it is cancelled.

    Args:
      remember: whether question and answer are history to later ones.
    Raises:
      DataError: a question that cannot be asked, or a conversation that has become too long.
    """
    stream, turns = self._submit(question, sampling, remember)
    try:
      yield from stream
    finally:
      stream.cancel()
    self._end(turns, stream.result(), remember)

  def _show(self, visuals: Visuals, tag: str) -> None:
    self._media.append(visuals)
    self._new_tags += f'{tag}\n'

  def _submit(self, question: str, sampling: Sampling, remember: bool) -> tuple[Stream, list[Turn]]:
    if found := MEDIA_TAG.search(question):
      raise DataError('E_IMAGE_TAGS', self._name, f'expected no {found[0]}: the image is shown already; found one')
    turns = [*self.turns, {'role': 'user', 'content': self._new_tags + question}]
    request = Request(Prompt(turns, self._media, self._name), sampling)
    return self._engine.submit(request, self.memory if remember else None), turns

  def _end(self, turns: list[Turn], answer: Answer, remember: bool) -> None:
    if remember:
      self.turns, self._new_tags = [*turns, {'role': 'assistant', 'content': answer.text}], ''

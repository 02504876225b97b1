"""Asks a model: any mix of questions about images, high-resolution images, several of them, videos, or none.

Enters: `Request`s, conversations with media. Leaves: `Answer`s, whole or in pieces as they come. Batching is
continuous (`core`); images and videos that outlive a question are kept by `look` or by a `session.Session`.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import end_of_turn, load_template
from llava_mini_jax.infer.core import Core, Memory
from llava_mini_jax.infer.load import Loaded, load_run
from llava_mini_jax.infer.prompts import Laid, Prompt, PromptEncoder
from llava_mini_jax.infer.sampling import DEFAULT, Sampling
from llava_mini_jax.infer.stream import Answer, Stream
from llava_mini_jax.infer.visuals import Visuals
from llava_mini_jax.sharding import make_mesh

_LENGTH, _CHUNK = 2048, 8


@dataclasses.dataclass(frozen=True)
class Request:
  """A conversation that ends with a question, and how it is to be answered."""

  prompt: Prompt
  sampling: Sampling = DEFAULT
  grid: int = 0  # as `DataConfig.grid`, of this one's images; 0 = the experiment's


class Engine:
  """A model with a fixed number of slots. Any thread may use it.

  Attributes:
    run: the model. encoder: with `encoder.media`, which reads files as the model was trained. core: slots and programs.
  """

  def __init__(self, run: Loaded, *, slots: int = 8, max_length: int = 0, visual_chunk: int = 0):
    """
    Args:
      slots: answers that are decoded together. max_length: most tokens of a prompt, with vision slots, and its answer;
        0 = 2,048, or as many as the decoder has positions.
      visual_chunk: most images or frames that are encoded together; 0 = as `model.visual_chunk` says, else 8.
    Raises:
      MeshError: slots or visual_chunk do not divide over data × fsdp.
      ConfigError: a max_length that the decoder has no positions for, a template without an end of turn, or a
        compressor that reads the question, varies in its number of tokens, or acts in the decoder.
    """
    model = run.experiment.model
    model.require_plain_visuals('Engine', '. launch/evaluate.py asks such a model')
    most = model.decoder.max_position_embeddings
    max_length = max_length or min(_LENGTH, most)
    if not 1 < max_length <= most:
      raise ConfigError(
        f'Engine.max_length: expected 2 to {most}, the decoder.max_position_embeddings; found {max_length}'
      )
    visual_chunk = visual_chunk or run.experiment.model.visual_chunk or _CHUNK
    self.run = run
    self.encoder = PromptEncoder(run.experiment, run.tokenizer)
    self.core = Core(run, slots=slots, max_length=max_length, visual_chunk=visual_chunk)
    self._end = end_of_turn(run.tokenizer, load_template(run.experiment.data.template))

  @classmethod
  def from_checkpoint(
    cls,
    path: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: str = '',
    quantize: str = '',
    step: int | None = None,
    changes: Sequence[str] = (),
    **sizes: int,
  ) -> Engine:
    """A run that was trained or imported.

    Args:
      mesh: None = one device. dtype: bfloat16 or float32, of computation and of parameters; '' = as trained.
      quantize: int8, int4 or nf4 kernels; '' = none. step, changes: as `load.load_run`. sizes: as `Engine`.
    Raises:
      As `load.load_run` and `Engine`.
    """
    mesh = mesh or make_mesh((1, 1, 1), devices=jax.devices()[:1])
    changes = [*changes, *([f'model.dtype={dtype}'] if dtype else [])]
    return cls(load_run(Path(path), mesh, step, changes, slim=True, quantize=quantize), **sizes)

  def generate(self, requests: Iterable[Request]) -> list[Answer]:
    """One answer each, in order. Raises DataError for a bad prompt, by name."""
    return list(self.answers(requests))

  def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
    """`generate`, one by one; requests are read when there is room for them, a batch ahead."""
    waiting: collections.deque[Stream] = collections.deque()
    ahead = 2 * self.core.slots
    for request in requests:
      waiting.append(self.submit(request))
      if len(waiting) > ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()

  def submit(self, request: Request, memory: Memory | None = None) -> Stream:
    """Queues a request. Iterate the stream for text as it comes; `Stream.cancel` ends it.

    Args:
      memory: of one conversation; what of its earlier prompts is unchanged is not read again.
    Raises:
      DataError: a bad prompt, or one that does not fit.
    """
    laid, stream = self.lay(request)
    self.core.add(laid, stream, memory)
    return stream

  def lay(self, request: Request) -> tuple[Laid, Stream]:
    """What `submit` gives to the core. Raises DataError: a bad prompt."""
    laid, sampling = self.encoder.lay(request.prompt, request.grid), request.sampling
    ends = {*sampling.stop_ids, *(() if sampling.ignore_end else (self._end,))}
    return laid, Stream(sampling, len(laid.tokens), end=ends, decode=self._text, advance=self.step)

  def step(self) -> bool:
    """The next token of every answer that has a slot; whether anything is left to do. Streams call it themselves."""
    return self.core.step()

  def look(self, media: Iterable[np.ndarray | Image.Image] = (), *, keep: str = 'seen', grid: int = 0) -> Visuals:
    """Encodes an image, or frames as they come, for any number of prompts: a medium of `Prompt.media`.

    Args:
      media: RGB, uint8[h w 3], read a chunk at a time. keep: one of `visuals.KEEP`.
    """
    visuals = self.core.look(keep)
    visuals.add(self.views(media, grid))
    return visuals

  def views(self, media: Iterable[np.ndarray | Image.Image], grid: int = 0) -> Iterator[np.ndarray]:
    """What `Visuals.add` takes."""
    return self.encoder.views(media, grid)

  def warm_up(self, requests: Sequence[Request]) -> None:
    """Compiles ahead of time what requests of such sizes need, for every number of them that is prefilled together."""
    for count in sorted({self.core.row_places(n) for n in range(1, self.core.slots + 1)}):
      for request in requests:
        short = dataclasses.replace(request.sampling, max_new_tokens=1)
        self.generate([dataclasses.replace(request, sampling=short)] * count)

  def _text(self, ids: Sequence[int]) -> str:
    return self.run.tokenizer.decode(ids, skip_special_tokens=True)

"""Prompts -> Batch: what a question and its images look like to the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import transformers
from PIL import Image

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.conversation import Encoded, Turn, encode, load_template
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.inputs import media_processor
from llava_mini_jax.data.media import as_image
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.visuals import Visuals
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation that ends with a question."""

  turns: Sequence[Turn]
  # for each `<image>` and `<video>` what stands for it: one image or a video's frames, RGB, uint8[h w 3], or what the
  # engine has kept of them
  media: Sequence[Sequence[np.ndarray | Image.Image] | Visuals] = ()
  name: str = 'prompt'  # names it in errors


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
  """One prompt as the model reads it, without padding."""

  name: str
  tokens: np.ndarray  # int32[n]; 0 in vision slots
  slots: np.ndarray  # int32[M C]; where in `tokens` the compressed tokens of each visual go
  fused: np.ndarray  # int32[t]; where the text tokens lie that are fused with every visual
  media: Sequence[Sequence[np.ndarray] | Visuals]  # by tag; uint8 or float32[V size size 3] each


def prompt_shape(model: LlavaMiniConfig, *, length: int, text: int, visuals: int, views: int = 1) -> RowShape:
  """The row for prompts of so many tokens at most, sizes rounded up so that few are compiled.

  T is the text alone: with a video's own slots in it, every frame would pay for the length of the video in pre-fusion.

  Args:
    length: text tokens and vision slots. text: text tokens. visuals: images and frames. views: of each visual.
  Returns:
    L and T are multiples of 16; M is a power of two up to `model.visual_chunk`, above it a multiple of that.
  """
  places, chunk = 1 << max(0, visuals - 1).bit_length(), model.visual_chunk
  if chunk:
    places = _round_up(visuals, chunk) if visuals > chunk else min(places, chunk)
  return RowShape.for_model(
    model,
    length=_round_up(length, _LENGTH_STEP),
    visuals=places,
    fused_text=_round_up(max(text, 1), _LENGTH_STEP),
    views=views,
  )


def _round_up(value: int, step: int) -> int:
  return -(-value // step) * step


class PromptEncoder:
  """Encodes prompts as the experiment's training data were encoded.

  Attributes:
    media: reads files as the experiment does, for `Prompt.media`.
  """

  def __init__(self, experiment: Experiment, tokenizer: transformers.PreTrainedTokenizerFast):
    self._model, self._tokenizer = experiment.model, tokenizer
    self._template = load_template(experiment.data.template)
    self._system = None if experiment.data.default_system else ''
    self.media = media_processor(experiment.data, experiment.model)

  def encode(self, prompt: Prompt) -> Encoded:
    """Ids and mask. Raises DataError naming the prompt: as `conversation.encode`; E_EMPTY_TURNS if the template drops
    all of it; E_TOO_LONG for more tokens than the decoder has positions.
    """
    encoded = encode(
      self._tokenizer,
      self._template,
      list(prompt.turns),
      system=self._system,
      add_generation_prompt=True,
      where=prompt.name,
    )
    if not len(encoded.ids):
      raise DataError('E_EMPTY_TURNS', prompt.name, 'expected text or an image that the template keeps; found none')
    tokens, most = self._tokens(prompt, encoded), self._model.decoder.max_position_embeddings
    if tokens > most:
      raise DataError('E_TOO_LONG', prompt.name, f'expected at most {most} tokens with vision slots; found {tokens}')
    return encoded

  def sizes(self, prompts: Sequence[Prompt], encoded: Sequence[Encoded]) -> tuple[int, int, int]:
    """The most that any of these has: tokens with vision slots, text tokens, visuals."""
    tokens, text = max(map(self._tokens, prompts, encoded)), max(map(_text_tokens, encoded))
    return tokens, text, max(sum(map(len, prompt.media)) for prompt in prompts)

  def shape(self, sizes: tuple[int, int, int]) -> RowShape:
    """The row that holds a prompt of these `sizes`."""
    length, text, visuals = sizes
    return prompt_shape(self._model, length=length, text=text, visuals=visuals, views=self.media.images.views)

  def _tokens(self, prompt: Prompt, encoded: Encoded) -> int:
    slots = self._model.slots_per_visual(self.media.images.views) * sum(map(len, prompt.media))
    return slots + _text_tokens(encoded)

  def batch(self, prompts: Sequence[Prompt], encoded: Sequence[Encoded], shape: RowShape, *, rows: int) -> Batch:
    """One prompt per row, padded to `rows` rows by repeating the last.

    shape: from `shape`, or larger.

    Raises:
      DataError: E_IMAGE_TAGS, E_TOO_LONG, naming the prompt.
    """
    built = [self._row(p, e, shape) for p, e in zip(prompts, encoded, strict=True)]
    built += [built[-1]] * (rows - len(built))
    return Batch(**{key: np.stack([row[key] for row in built]) for key in built[0]})

  def lay(self, prompt: Prompt, grid: int = 0) -> Laid:
    """A prompt with its media made ready for the tower.

    grid: as `DataConfig.grid`, of this prompt's images; 0 = the experiment's.

    Raises DataError as `encode` and `build_row`.
    """
    images = self._images(grid)
    encoded, visuals = self.encode(prompt), sum(map(len, prompt.media))
    length = self._model.slots_per_visual(images.views) * visuals + _text_tokens(encoded)
    sizes = dict(visuals=max(1, visuals), fused_text=len(encoded.ids), views=images.views)
    fields = self._fields(prompt, encoded, RowShape.for_model(self._model, length=length, **sizes))
    fused = fields['fuse_index'][0, fields['fuse_mask'][0]]
    media = [some if isinstance(some, Visuals) else list(self.views(some, grid)) for some in prompt.media]
    return Laid(prompt.name, fields['tokens'], fields['slot_index'][:visuals], fused, media)

  def views(self, media: Iterable[np.ndarray | Image.Image], grid: int = 0) -> Iterator[np.ndarray]:
    """What the tower sees of each, uint8[V size size 3], as it comes; grid as in `lay`."""
    return map(self._images(grid), map(as_image, media))

  def _images(self, grid: int) -> ImageProcessor:
    return dataclasses.replace(self.media.images, grid=grid) if grid else self.media.images

  def _row(self, prompt: Prompt, encoded: Encoded, shape: RowShape) -> dict[str, np.ndarray]:
    row = self._fields(prompt, encoded, shape)
    size = self.media.images.size
    row['pixels'] = np.zeros((shape.visuals, self.media.images.views, size, size, 3), np.uint8)
    for i, visual in enumerate(itertools.chain.from_iterable(prompt.media)):
      row['pixels'][i] = self.media.views(visual)
    return row

  def _fields(self, prompt: Prompt, encoded: Encoded, shape: RowShape) -> dict[str, np.ndarray]:
    """All but the pixels."""
    return build_row(
      encoded.ids,
      np.zeros(len(encoded.ids), bool),
      shape,
      where=prompt.name,
      visuals_per_tag=[len(visuals) for visuals in prompt.media],
      fuse=None if self._model.prefusion.fuse_history_answers else ~encoded.assistant,
      fuse_token_zero=self._model.prefusion.fuse_token_zero,
    )


def _text_tokens(encoded: Encoded) -> int:
  return int((encoded.ids != IMAGE_TOKEN_ID).sum())

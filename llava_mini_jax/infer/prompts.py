"""Prompts -> Batch: what a question and its images look like to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import transformers
from PIL import Image

from llava_mini_jax.data.conversation import Encoded, Turn, encode, load_template
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

_LENGTH_STEP = 16  # prompts are padded to a multiple, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation that ends with a question."""

  turns: Sequence[Turn]
  images: Sequence[np.ndarray | Image.Image] = ()  # RGB, uint8[h w 3]; one per `<image>`
  name: str = 'prompt'  # names it in errors


class PromptEncoder:
  """Encodes prompts as the experiment's training data were encoded."""

  def __init__(self, experiment: Experiment, tokenizer: transformers.PreTrainedTokenizerFast):
    self._model, self._tokenizer = experiment.model, tokenizer
    self._template = load_template(experiment.data.template)
    self._system = None if experiment.data.default_system else ''
    self._processor = ImageProcessor(size=experiment.model.vision.image_size, aspect=experiment.data.aspect)

  def encode(self, prompt: Prompt) -> Encoded:
    """Raises DataError naming the prompt."""
    return encode(
      self._tokenizer,
      self._template,
      list(prompt.turns),
      system=self._system,
      add_generation_prompt=True,
      where=prompt.name,
    )

  def row_length(self, encoded: Sequence[Encoded]) -> int:
    """The padded length that holds all of these with their vision tokens."""
    c = self._model.tokens_per_visual
    longest = max(len(e.ids) + (c - 1) * int((e.ids == IMAGE_TOKEN_ID).sum()) for e in encoded)
    return -(-longest // _LENGTH_STEP) * _LENGTH_STEP

  def batch(self, prompts: Sequence[Prompt], encoded: Sequence[Encoded], *, length: int, rows: int) -> Batch:
    """One prompt per row, padded to `rows` rows by repeating the last.

    Raises:
      DataError: E_IMAGE_TAGS, E_TOO_LONG, naming the prompt.
    """
    visuals = max(1, *(len(prompt.images) for prompt in prompts))
    shape = RowShape.for_model(self._model, length=length, visuals=visuals)
    built = [self._row(p, e, shape) for p, e in zip(prompts, encoded, strict=True)]
    built += [built[-1]] * (rows - len(built))
    return Batch(**{key: np.stack([row[key] for row in built]) for key in built[0]})

  def _row(self, prompt: Prompt, encoded: Encoded, shape: RowShape) -> dict[str, np.ndarray]:
    nothing_learnt = np.zeros(len(encoded.ids), bool)
    row = build_row(
      encoded.ids,
      nothing_learnt,
      shape,
      where=prompt.name,
      visuals_per_tag=[1] * len(prompt.images),
      fuse=None if self._model.prefusion.fuse_history_answers else ~encoded.assistant,
      fuse_token_zero=self._model.prefusion.fuse_token_zero,
    )
    size = self._processor.size
    row['pixels'] = np.zeros((shape.visuals, self._processor.views, size, size, 3), np.uint8)
    for i, image in enumerate(prompt.images):
      row['pixels'][i] = self._processor(image if isinstance(image, Image.Image) else Image.fromarray(image))
    return row

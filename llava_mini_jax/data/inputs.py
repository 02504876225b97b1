"""An experiment's data section made real: the records, the tokenizer, and how a sample becomes a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grain
import transformers

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.pipeline import make_iterator
from llava_mini_jax.data.records import Split, open_split
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.experiment import DataConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
  config: DataConfig
  model: LlavaMiniConfig
  source: Split
  tokenizer: transformers.PreTrainedTokenizerFast
  processor: ImageProcessor
  row: RowShape

  def iterator(
    self, *, batch_size: int, seed: int, shard_index: int, shard_count: int
  ) -> grain.experimental.ElasticIterator:
    """Endless shuffled batches; see `pipeline.make_iterator`."""
    config = self.config
    return make_iterator(
      self.source,
      tokenizer=self.tokenizer,
      template=config.template,
      system=None if config.default_system else '',
      model=self.model,
      row=self.row,
      processor=self.processor,
      batch_size=batch_size,
      seed=seed,
      shard_index=shard_index,
      shard_count=shard_count,
      worker_count=config.workers,
      augment=Augment(flip=config.flip, shift=config.shift) if config.flip or config.shift else None,
      max_turns=config.max_turns or None,
      side_by_side=config.side_by_side,
    )


def tokenizer_directory(config: DataConfig) -> Path:
  return Path(config.tokenizer or Path(config.dataset) / 'tokenizer')


def load_inputs(config: DataConfig, model: LlavaMiniConfig) -> Inputs:
  """Raises DataError if the dataset, the split or the tokenizer is missing or damaged."""
  return Inputs(
    config=config,
    model=model,
    source=open_split(config.dataset, config.split),
    tokenizer=load_tokenizer(tokenizer_directory(config)),
    processor=ImageProcessor(size=model.vision.image_size, aspect=config.aspect),
    row=RowShape.for_model(
      model,
      length=config.row_length,
      visuals=config.visuals_per_row,
      fused_text=config.fused_text or None,
    ),
  )

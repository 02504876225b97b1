"""An experiment's data section made real: the records, the tokenizer, and how a sample becomes a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grain
import numpy as np
import transformers

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.conversation import end_of_turn, load_template, template_fingerprint
from llava_mini_jax.data.features import Features, MixedFeatures, open_features
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.mixture import Epochs, Mixture, Shuffled, parse
from llava_mini_jax.data.packing import Grouped, Packed
from llava_mini_jax.data.pipeline import make_iterator
from llava_mini_jax.data.records import Split, open_split
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.sizes import SampleSize, kept_sizes, record_sizes
from llava_mini_jax.data.tokenizer import fingerprint, load_tokenizer
from llava_mini_jax.data.video import FrameSampler
from llava_mini_jax.experiment import DataConfig

Order = Shuffled | Packed | Grouped


@dataclasses.dataclass(frozen=True)
class Inputs:
  config: DataConfig
  model: LlavaMiniConfig
  source: Split | Mixture
  tokenizer: transformers.PreTrainedTokenizerFast
  processor: MediaProcessor
  row: RowShape
  features: Features | MixedFeatures | None = None

  def fingerprints(self) -> dict[str, Any]:
    """What the config's paths lead to, wherever it lies: {dataset, tokenizer, template, features: or None}."""
    layout = self.features and self.features.layout
    return dict(
      dataset=self.source.fingerprint,
      tokenizer=fingerprint(self.tokenizer),
      template=template_fingerprint(self.config.template),
      features=layout and dict(tower=layout.tower, dtype=layout.dtype),
    )

  def order(self, *, batch_size: int, seed: int, kept: Path | None = None) -> Order | None:
    """What each epoch visits; None = every record once, shuffled.

    Packing and grouping measure every record first.

    Args:
      kept: where the sizes are kept (`sizes.kept_sizes`); None = nowhere.
    """
    config = self.config
    if not (config.pack or config.group_by_length):
      return Shuffled(self.source, seed) if isinstance(self.source, Mixture) else None
    measure = SampleSize(self.tokenizer, config.template, self._system, self.model, self.row, self.processor.sampler)
    options = dict(workers=config.workers, bad_sample=config.bad_sample)
    sizes = kept_sizes(kept, self.source, measure, **options) if kept else record_sizes(self.source, measure, **options)
    if config.truncate:
      sizes[:, 0] = np.minimum(sizes[:, 0], self.row.length)
    if config.bad_sample == 'mask':  # a row too long is refused when it is laid out
      sizes[(sizes > (self.row.length, self.row.visuals)).any(axis=1)] = 0
    if config.pack:
      return Packed(self.source, sizes, self.row, seed, config.pack_window)
    # without any visual in a batch, gradients would reach text embeddings that are detached elsewhere
    text_visuals = min(1, self.row.visuals) if self.model.detach_text else 0
    tables = config.row_lengths, config.visual_counts
    return Grouped(self.source, sizes, batch_size, self.row, seed, *tables, text_visuals)

  def rows(self, order: Order | None, epochs: float) -> int:
    """Rows that so many epochs have."""
    return int(epochs * len(self.source)) if order is None else Epochs(order, None).items_in(epochs)

  def samples(self, order: Order | None, rows: int) -> int:
    """Samples that so many rows hold; of packed rows about, as many each as those of the first epoch."""
    if not isinstance(order, Packed):
      return rows
    groups = order(0)
    return rows * sum(map(len, groups)) // len(groups)

  def iterator(
    self, order: Order | None, *, batch_size: int, seed: int, shard_index: int, shard_count: int
  ) -> grain.experimental.ElasticIterator:
    """Endless batches, in an order from `order`; see `pipeline.make_iterator`."""
    config = self.config
    return make_iterator(
      self.source,
      tokenizer=self.tokenizer,
      template=config.template,
      system=self._system,
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
      truncate=config.truncate,
      order=order,
      features=self.features,
      bad_sample=config.bad_sample,
    )

  @property
  def _system(self) -> str | None:
    return None if self.config.default_system else ''


def tokenizer_directory(config: DataConfig, start: str = '') -> Path:
  """The one named, else that of the run to start from, else that of the (first) dataset.

  Raises ConfigError: there is no such run.
  """
  if start and not config.tokenizer:
    if not Path(start).is_dir():
      raise ConfigError(f'train.init_from: expected the directory of a run or of an import; found none at {start}')
    return Path(start) / 'tokenizer'
  return Path(config.tokenizer or Path(config.mixture[0][0] if config.mixture else config.dataset) / 'tokenizer')


def media_processor(config: DataConfig, model: LlavaMiniConfig) -> MediaProcessor:
  """Raises ConfigError naming a field that cannot be."""
  return MediaProcessor(
    ImageProcessor(model.vision.image_size, config.aspect, config.grid, config.grid_order),
    FrameSampler(config.video_fps, config.video_frames, config.video_max_frames, config.video_rule),
    config.frame_resize,
  )


def load_inputs(config: DataConfig, model: LlavaMiniConfig, *, seed: int = 0, start: str = '') -> Inputs:
  """Opens everything.

  Args:
    seed: of what a mixture samples. start: the run whose tokenizer serves if the config names none.

  Raises DataError if dataset, split, features or tokenizer is missing or damaged, ConfigError if they do not fit."""
  if config.row_length > model.decoder.max_position_embeddings:
    limit = f'decoder.max_position_embeddings={model.decoder.max_position_embeddings}'
    raise ConfigError(f'data.row_length: expected at most {limit}; found {config.row_length}')
  source = Mixture(parse(config.mixture), seed=seed) if config.mixture else open_split(config.dataset, config.split)
  tokenizer = load_tokenizer(tokenizer_directory(config, start))
  end_of_turn(tokenizer, load_template(config.template))
  processor = media_processor(config, model)
  row = RowShape.for_model(
    model,
    length=config.row_length,
    visuals=config.visuals_per_row,
    fused_text=config.fused_text or None,
    views=processor.images.views,
  )
  features = open_features(config.features, source, config, model) if config.features else None
  return Inputs(config, model, source, tokenizer, processor, row, features)

"""Records -> shuffled, sharded, batched rows, and those on to the devices.

Enters: a random-access source of `records.Record`. Leaves: dicts of numpy arrays that are the fields of
`types.Batch`, then Batches of jax Arrays. What a sample becomes depends on the seed and its place in the stream
alone, so neither a resume nor another number of workers or processes changes it; the whole state is one integer.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
import transformers
from absl import flags

from llava_mini_jax.config import ConfigError, LlavaMiniConfig, require_choice
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.features import Features, MixedFeatures
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.mixture import Epochs, Mixture, Shuffled
from llava_mini_jax.data.packing import FittedRows, Grouped, Packed, PackedRows
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.samples import RowTransform, Source
from llava_mini_jax.experiment import BAD_SAMPLE
from llava_mini_jax.sharding import process_rows
from llava_mini_jax.types import Batch


def make_iterator(
  source: Source,
  *,
  tokenizer: transformers.PreTrainedTokenizerFast,
  template: str | os.PathLike,
  system: str | None = None,
  model: LlavaMiniConfig,
  row: RowShape,
  processor: MediaProcessor,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  shuffle: bool = True,
  shard_index: int = 0,
  shard_count: int = 1,
  worker_count: int = 0,
  augment: Augment | None = None,
  max_turns: int | None = None,
  side_by_side: bool = False,
  truncate: bool = False,
  order: Callable[[int], Sequence] | None = None,
  features: Features | MixedFeatures | None = None,
  bad_sample: str = 'raise',
) -> grain.experimental.ElasticIterator:
  """This process's share of the batches, as dicts of the fields of `types.Batch`.

  Args:
    source: records; each epoch visits every one once.
    tokenizer, template, system: how conversations become ids (`conversation.encode`); template is a name or a file.
    model, row, processor: the static sizes; they must agree.
    batch_size: of the global batch; this process yields batch_size / shard_count rows of it.
    seed: of the order, the augmentation and the choice of turns.
    num_epochs: None = without end. A last, incomplete global batch is dropped (on every process alike).
    shuffle: a new order each epoch; False = the source's.
    shard_index, shard_count: this process and how many there are. Row i of the global batch belongs to process
      i % shard_count.
    worker_count: processes that prepare rows; 0 = a thread of this one. Workers are spawned, so the main module
      needs its `if __name__ == '__main__'`.
    augment: applied to every image.
    max_turns: as `samples.choose_turns`; None = whole conversations.
    side_by_side: a row holds questions of one record, in random order, that do not see each other: as many as fit, at
      most `max_turns` (see `branches`).
    truncate: leave off what of a sample does not fit at its end (`rows.cut`), instead of refusing it.
    order: instead of `shuffle`, what each epoch visits: a `packing.Grouped`, whose batches are of like samples, or a
      `packing.Packed`, whose rows hold several. None = every record once, or what a Mixture draws.
    features: of the records, from `features.open_features`; images are then not decoded. Not with `augment`.
    bad_sample: raise; mask = a bad sample keeps its place, as padding that nothing is learnt from, is counted in
      `bad_samples` and logged. No other takes its place, so order and resume stay what they are.
  Returns:
    An iterator whose `get_state()` is `{'global_next_index': rows handed out over all processes}`; `set_state`
    accepts it on any number of workers and processes.
  Raises:
    ConfigError: sizes that do not agree.
    DataError: E_EMPTY for a source that cannot fill one batch; while iterating, what is wrong with a sample, unless
      bad ones are masked. The iterator is of no use after that.
  """
  _check_sizes(tokenizer, model, row, processor)
  require_choice('bad_sample', bad_sample, BAD_SAMPLE)
  if batch_size < 1 or shard_count < 1 or batch_size % shard_count or not 0 <= shard_index < shard_count:
    raise ConfigError(f'batch_size={batch_size} does not divide over shard {shard_index} of {shard_count}')
  if max_turns is not None and max_turns < 1:
    raise ConfigError(f'max_turns: expected at least 1; found {max_turns}')
  if not len(source):
    raise DataError('E_EMPTY', str(getattr(source, 'directory', 'source')), 'expected at least one record; found none')
  if features is not None and augment is not None:
    raise ConfigError('features: expected no augmentation, which they cannot follow; found one')
  _check_order(order, batch_size, row, model, max_turns is not None or side_by_side)
  if order is None and isinstance(source, Mixture):
    order = Shuffled(source, seed if shuffle else None)
  options = (augment, max_turns, side_by_side, truncate, features, bad_sample)
  transform = RowTransform(source, tokenizer, template, system, model, row, processor, *options)
  if isinstance(order, Packed):
    transform = PackedRows(transform, row)
  elif isinstance(order, Grouped) and order.fitted:
    transform = FittedRows(transform, row)
  dataset = _indices(len(source), seed, num_epochs, shuffle, order).random_map(transform)
  whole = len(dataset) // batch_size * batch_size
  if not whole:
    raise DataError('E_EMPTY', 'source', f'expected at least one batch of {batch_size}; found {len(dataset)} record(s)')
  if worker_count and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which are unparsed outside of absl.app
  return grain.experimental.ElasticIterator(
    dataset[:whole],  # else processes whose share is longer would yield a batch more than the others
    batch_size,
    grain.sharding.ShardOptions(shard_index=shard_index, shard_count=shard_count),
    read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),  # batches; Python threads do not add up
    multiprocessing_options=grain.MultiprocessingOptions(num_workers=worker_count) if worker_count else None,
  )


def _indices(
  count: int, seed: int, num_epochs: int | None, shuffle: bool, order: Callable[[int], Sequence] | None
) -> grain.MapDataset:
  """Of records, or groups of them, and not the records themselves: Grain weighs whatever passes through it."""
  if order is not None:
    epochs = Epochs(order, num_epochs)
    epochs.items_in(1)  # an empty epoch is an error now, not in a worker
    return grain.MapDataset.source(epochs).seed(seed)
  dataset = grain.MapDataset.range(count).seed(seed)
  return (dataset.shuffle() if shuffle else dataset).repeat(num_epochs)


def _check_order(order, batch_size: int, row: RowShape, model: LlavaMiniConfig, random_sizes: bool) -> None:
  if isinstance(order, Grouped) and order.batch_size != batch_size:
    raise ConfigError(f'order.batch_size: expected {batch_size}; found {order.batch_size}')
  if isinstance(order, Grouped | Packed) and order.row != row:
    raise ConfigError(f'order.row: expected {row}; found {order.row}')
  fitted = isinstance(order, Grouped) and order.fitted
  if fitted and model.detach_text and not order.text_visuals:
    raise ConfigError('order.text_visuals: expected 1 or more, for the model has detach_text; found 0')
  if isinstance(order, Packed) and model.video_stop_grad:
    raise ConfigError('model.video_stop_grad: expected False when packing, which puts several visuals in every row')
  if random_sizes and (fitted or isinstance(order, Packed)):
    raise ConfigError('packing, or rows of several shapes: expected no max_turns and no side_by_side; found one')


def _check_sizes(tokenizer, model: LlavaMiniConfig, row: RowShape, processor: MediaProcessor) -> None:
  for name, expected, found in (
    ('processor.size', model.vision.image_size, processor.images.size),
    ('row.tokens_per_visual', model.slots_per_visual(processor.images.views), row.tokens_per_visual),
  ):
    if expected != found:
      raise ConfigError(f"{name}: expected {expected}, the model's; found {found}")
  if len(tokenizer) > model.decoder.vocab_size:
    raise ConfigError(
      f'decoder.vocab_size={model.decoder.vocab_size} cannot hold the {len(tokenizer)} tokens of the tokenizer'
    )


class DeviceBatches:
  """Batches on the devices, a few ahead of the consumer. Made by `device_batches`."""

  def __init__(self, iterator: grain.experimental.ElasticIterator, sharding: jax.sharding.NamedSharding, ahead: int):
    self._iterator, self._sharding, self._ahead = iterator, sharding, ahead
    self._groups = process_rows(sharding.mesh)[1]
    self._ready: collections.deque[tuple[Batch, dict[str, Any]]] = collections.deque()
    self._end: Exception | None = None
    self._state = iterator.get_state()

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """The next Batch. An error further ahead is raised only when its turn has come, and again ever after."""
    while self._end is None and len(self._ready) <= self._ahead:
      try:
        arrays = next(self._iterator)
      except Exception as error:  # StopIteration too
        self._end = error
      else:
        self._ready.append((self._put(arrays), self._iterator.get_state()))
    if not self._ready:
      raise self._end
    batch, self._state = self._ready.popleft()
    return batch

  def _put(self, arrays: dict[str, np.ndarray]) -> Batch:
    """The global batch, of which this process gives its group's rows (`sharding.process_rows`)."""

    def put(array: np.ndarray) -> jax.Array:
      whole = (len(array) * self._groups, *array.shape[1:])
      return jax.make_array_from_process_local_data(self._sharding, array, whole)

    return Batch(**{name: put(array) for name, array in arrays.items()})

  def get_state(self) -> dict[str, Any]:
    """The iterator's state just after the last batch handed out: a resume from it yields the batch after that."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues after the batch that `state` was got with; whatever was prepared ahead is dropped."""
    if self._iterator is None:
      raise RuntimeError('the batches were closed')
    self._ready.clear()
    self._end, self._state = None, state
    self._iterator.set_state(state)

  def close(self) -> None:
    """Stops worker threads and processes; the iterator is of no use after that. Closing twice is allowed."""
    self._ready.clear()
    self._end = RuntimeError('the batches were closed')
    iterator, self._iterator = self._iterator, None  # Grain's iterators complain if they outlive the interpreter
    if iterator is not None:
      iterator.close()


def device_batches(
  iterator: grain.experimental.ElasticIterator, sharding: jax.sharding.NamedSharding, *, ahead: int = 2
) -> DeviceBatches:
  """Puts batches on the devices before they are asked for.

  Args:
    iterator: from `make_iterator`, of the shard that `sharding.process_rows(mesh)` names; owned by the result from now
      on.
    sharding: of the row axis, as `sharding.batch_sharding(mesh)`; each process gives the rows that it holds.
    ahead: batches transferred beyond the one handed out.
  Returns:
    An iterator of `types.Batch` whose `get_state` and `set_state` concern the batches handed out, not those ahead.
  """
  return DeviceBatches(iterator, sharding, ahead)

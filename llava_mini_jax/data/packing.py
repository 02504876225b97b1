"""Fewer places that are padding: several whole samples in one row, or shorter rows for batches of short samples.

Enters: how many tokens and visuals every record needs (`sizes`), and rows of one sample each from `rows.build_row`.
Leaves: which records share a row or a batch, and those rows. Packing changes nothing for a sample: `segment_ids` keep
the samples of a row from seeing each other, positions restart, and each visual keeps the text it is fused with and its
slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import length_grouped, permutation, samples_of
from llava_mini_jax.data.records import Record
from llava_mini_jax.data.rows import RowShape

Row = dict[str, np.ndarray]

_BY_TOKEN = ('tokens', 'targets', 'loss_mask', 'positions')
_BY_VISUAL = {'pixels', 'features'}


WINDOW = 512


def plan(sizes: np.ndarray, capacity: tuple[int, int], *key: int | str, window: int = WINDOW) -> list[tuple[int, ...]]:
  """Which samples share a row: greedy first-fit, longest first, among each `window` samples of a shuffled order.

  Args:
    sizes: int[n 2], (tokens, visuals) of every sample. capacity: of a row.
    key: the seed and the epoch; the plan depends on nothing else.
    window: the buffer, samples packed together; more = fuller rows, and a row's samples are less random.
  Returns:
    Groups of indices in random order; every sample is in one of them, once.
  Raises:
    DataError: E_TOO_LONG for a sample that fits no row.
  """
  check_sizes(sizes, capacity, lambda i: f'sample {i}')
  share = (sizes / np.maximum(capacity, 1)).max(axis=1)
  order = permutation(len(sizes), 'pack', *key)
  rows: list[list[int]] = []
  for start in range(0, len(order), window):
    members = order[start : start + window]
    members = members[np.argsort(-share[members], kind='stable')]
    rows += _first_fit(members.tolist(), sizes[members].tolist(), capacity)
  return [tuple(rows[i]) for i in permutation(len(rows), 'rows', *key)]


def _first_fit(members: Sequence[int], sizes: Sequence[Sequence[int]], capacity: tuple[int, int]) -> list[list[int]]:
  """Each in the first row that has room for it."""
  rows: list[list[int]] = []
  free: list[list[int]] = []  # room of the rows, (tokens, visuals)
  for i, (tokens, visuals) in zip(members, sizes, strict=True):
    at = next((at for at, room in enumerate(free) if tokens <= room[0] and visuals <= room[1]), len(rows))
    if at == len(rows):
      rows.append([])
      free.append(list(capacity))
    rows[at].append(i)
    free[at][0] -= tokens
    free[at][1] -= visuals
  return rows


@dataclasses.dataclass(frozen=True)
class Fill:
  """How full the rows of a plan are. samples: in a row on average; tokens, visuals: share of the places in use."""

  samples: float
  tokens: float
  visuals: float

  def __str__(self) -> str:
    shares = f'{self.tokens:.1%} of its tokens and {self.visuals:.1%} of its visuals in use'
    return f'{self.samples:.2f} samples a row, {shares}'


def fill(groups: Sequence[Sequence[int]], sizes: np.ndarray, capacity: tuple[int, int]) -> Fill:
  """Of the rows that `plan` made of samples of these sizes."""
  members = np.concatenate([np.asarray(group) for group in groups])
  tokens, visuals = sizes[members].sum(axis=0) / (len(groups) * np.maximum(capacity, 1))
  return Fill(len(members) / len(groups), float(tokens), float(visuals))


def check_sizes(sizes: np.ndarray, capacity: tuple[int, int], name: Callable[[int], str]) -> None:
  """Raises DataError E_TOO_LONG naming the first sample that fits no row."""
  for i in np.flatnonzero((sizes > np.asarray(capacity)).any(axis=1))[:1]:
    tokens, visuals = sizes[i]
    message = f'expected at most {capacity[0]} tokens and {capacity[1]} visual(s); found {tokens} and {visuals}'
    raise DataError('E_TOO_LONG', name(i), message)


@dataclasses.dataclass(frozen=True)
class Packed:
  """epoch -> groups of record indices as `plan`; an order for `mixture.Epochs`.

  A plan depends on sizes, seed and epoch alone, so a place in the stream stays one integer and a resume is exact.

  Attributes:
    sizes: int[len(source) 2], from `sizes.record_sizes`. window: as for `plan`.
  Raises:
    DataError: E_TOO_LONG naming a sample that fits no row.
  """

  source: Sequence[Record]
  sizes: np.ndarray
  row: RowShape
  seed: int
  window: int = WINDOW

  def __post_init__(self):
    check_sizes(self.sizes, self._capacity, lambda i: f'sample {self.source[int(i)]["id"]!r}')

  @property
  def _capacity(self) -> tuple[int, int]:
    return self.row.length, self.row.visuals

  def __call__(self, epoch: int) -> list[tuple[int, ...]]:
    return self._first if epoch == 0 else self._planned(epoch)

  @functools.cached_property
  def _first(self) -> list[tuple[int, ...]]:
    """Of epoch 0, which a start asks for several times: how many rows, how full, how many samples."""
    return self._planned(0)

  def _planned(self, epoch: int) -> list[tuple[int, ...]]:
    found = samples_of(self.source, epoch)
    groups = plan(self.sizes[found], self._capacity, self.seed, epoch, window=self.window)
    return [tuple(found[list(group)].tolist()) for group in groups]

  def fill(self, epoch: int) -> Fill:
    """How full the rows of an epoch are."""
    return fill(self(epoch), self.sizes, self._capacity)


@dataclasses.dataclass(frozen=True)
class Grouped:
  """epoch -> record indices as `mixture.length_grouped`, text-only samples apart; an order for `mixture.Epochs`.

  With `lengths` or `visual_counts` the order gives (index, length, visuals) instead: the least of each table that holds
  all samples of the batch, so that a step does less. A step is compiled once for every pair of a length and a count.

  Attributes:
    sizes: int[len(source) 2], from `sizes.record_sizes`.
    row: what a row may hold at most.
    lengths: ascending, up to row.length, which stands for none.
    visual_counts: ascending, up to row.visuals, which stands for none: what batches have room for, so that one of
      images is not laid out for the frames of a video. Samples that need different ones of them are apart, too.
    text_visuals: the same for a batch of text only. With 0 it never runs the vision tower, but its text is not detached
      either: a model with `detach_text` needs 1.
  Raises:
    ConfigError: lengths or counts that do not end in those of the row.
    DataError: E_TOO_LONG naming a sample that fits no row.
  """

  source: Sequence[Record]
  sizes: np.ndarray
  batch_size: int
  row: RowShape
  seed: int
  lengths: tuple[int, ...] = ()
  visual_counts: tuple[int, ...] = ()
  text_visuals: int = 0

  def __post_init__(self):
    for name, table, most in (
      ('lengths', self.lengths, self.row.length),
      ('visual_counts', self.visual_counts, self.row.visuals),
    ):
      if table and (list(table) != sorted(set(table)) or table[-1] != most):
        raise ConfigError(f'{name}: expected ascending numbers up to {most}; found {table}')
    check_sizes(self.sizes, (self.row.length, self.row.visuals), lambda i: f'sample {self.source[int(i)]["id"]!r}')

  @property
  def fitted(self) -> bool:
    """Whether batches differ in shape."""
    return bool(self.lengths or self.visual_counts)

  def __call__(self, epoch: int) -> Sequence[int | tuple[int, int, int]]:
    found = samples_of(self.source, epoch)
    lengths, counts = (np.asarray(table) for table in self._tables)
    tokens, visuals = self.sizes[found].T
    kind = np.where(visuals > 0, np.searchsorted(counts, visuals), len(counts))
    found = found[length_grouped(tokens, self.batch_size, self.seed, epoch, apart=kind)]
    if not self.fitted:
      return found
    longest, most = self.sizes[found].reshape(-1, self.batch_size, 2).max(axis=1).T
    length = lengths[np.searchsorted(lengths, longest)]
    count = np.where(most > 0, counts[np.searchsorted(counts, most)], self.text_visuals)
    shapes = np.stack([length, count], axis=1).repeat(self.batch_size, axis=0)
    return [tuple(item) for item in np.column_stack([found, shapes]).tolist()]

  @property
  def _tables(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return self.lengths or (self.row.length,), self.visual_counts or (self.row.visuals,)


@dataclasses.dataclass(frozen=True)
class FittedRows:
  """(record index, length, visuals), and random numbers -> its row at that length, with so many visuals."""

  transform: Callable[[int, np.random.Generator], Row]
  row: RowShape

  def __call__(self, item: tuple[int, int, int], rng: np.random.Generator) -> Row:
    index, length, visuals = item
    fused_text = min(length, self.row.fused_text)
    shape = dataclasses.replace(self.row, length=length, visuals=visuals, fused_text=fused_text)
    return pack_rows([self.transform(index, rng)], shape)


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """Group of record indices, and random numbers -> a packed row. `transform`: one index -> its row, as RowTransform."""

  transform: Callable[[int, np.random.Generator], Row]
  row: RowShape

  def __call__(self, group: Sequence[int], rng: np.random.Generator) -> Row:
    return pack_rows([self.transform(i, rng) for i in group], self.row)


def pack_rows(rows: Sequence[Row], shape: RowShape) -> Row:
  """Joins rows into one: tokens, positions and pixels as they are, one after the other; every index moves along.

  Args:
    rows: at least one, from `rows.build_row`, with or without pixels [M V H W 3], features [M V P W] and branch_ids; of
      any length. They may be packed themselves.
    shape: of the result.
  Returns:
    The fields of the rows; branch_ids if one of them has it. A masked row leaves nothing but its count.
  Raises:
    DataError: E_TOO_LONG if tokens, visuals or the fused text of one of them do not fit.
  """
  used = [(int((row['segment_ids'] > 0).sum()), _present(row)) for row in rows]
  tokens, visuals = (sum(column) for column in zip(*used, strict=True))
  fused = max(int(row['fuse_mask'].sum(axis=1).max(initial=0)) for row in rows)
  for name, most, found in (
    ('tokens', shape.length, tokens),
    ('visuals', shape.visuals, visuals),
    ('instruction tokens to fuse', shape.fused_text, fused),
  ):
    if found > most:
      raise DataError('E_TOO_LONG', f'a row of {len(rows)} samples', f'expected at most {most} {name}; found {found}')

  packed = _empty(rows, shape)
  start = first = segments = 0
  for row, (length, count) in zip(rows, used, strict=True):
    at, to = slice(start, start + length), slice(first, first + count)
    for name in _BY_TOKEN:
      packed[name][at] = row[name][:length]
    packed['segment_ids'][at] = row['segment_ids'][:length] + segments
    if 'branch_ids' in row:
      packed['branch_ids'][at] = row['branch_ids'][:length]
    for name in _BY_VISUAL & row.keys():
      packed[name][to] = row[name][:count]
    for name in ('fuse_index', 'slot_index'):
      index = row[name][:count, : packed[name].shape[1]]
      packed[name][to, : index.shape[1]] = np.where(index < len(row['tokens']), index + start, shape.length)
    start, first, segments = start + length, first + count, packed['segment_ids'][at].max(initial=segments)
  packed['fuse_mask'] = packed['fuse_index'] < shape.length
  if 'bad_samples' in rows[0]:
    packed['bad_samples'] = np.sum([row['bad_samples'] for row in rows], dtype=np.int32)
  return packed


def _present(row: Row) -> int:
  """How many visuals the row has: those up to the last that touches a place of it."""
  touches = row['fuse_mask'].any(axis=1) | (row['slot_index'] < len(row['tokens'])).any(axis=1)
  return int(np.flatnonzero(touches).max(initial=-1)) + 1


def _empty(rows: Sequence[Row], shape: RowShape) -> Row:
  like = rows[0]
  packed = {name: np.zeros(shape.length, like[name].dtype) for name in (*_BY_TOKEN, 'segment_ids')}
  packed['fuse_index'] = np.full((shape.visuals, shape.fused_text), shape.length, np.int32)
  packed['slot_index'] = np.full((shape.visuals, shape.tokens_per_visual), shape.length, np.int32)
  for name in _BY_VISUAL & like.keys():
    packed[name] = np.zeros((shape.visuals, *like[name].shape[1:]), like[name].dtype)
  if any('branch_ids' in row for row in rows):
    packed['branch_ids'] = np.zeros(shape.length, np.int32)
  return packed

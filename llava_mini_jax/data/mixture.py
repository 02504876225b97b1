"""Several prepared datasets in one run: what is kept of each, what an epoch draws of it, and in which order.

Enters: rows (directory, split, rule, weight) of a configuration. Leaves: a `Mixture`, which is a random-access source
of `records.Record`, and orders: pure functions of an epoch's number, which `Epochs` turns into one random-access
sequence, so that a place in the stream is one integer. Rules are spelled as in LLaVA-NeXT's data yaml.
"""

from __future__ import annotations

import bisect
import dataclasses
import fractions
import hashlib
import itertools
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import Record, Split, open_split

_RULE = re.compile(r'all|(first|end|random):(\d+(?:\.\d+)?)(%?)', re.ASCII)
_RULES = "'all', 'first:N', 'end:N' or 'random:N', N a positive count or, with '%', a percentage up to 100"


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of a mixture.

  Attributes:
    directory, split: of a prepared dataset.
    rule: which records are kept: 'all', 'first:N', 'end:N', 'random:N'; N may be a percentage, rounded up to whole
      records. What 'random' keeps depends on the seed and the records alone; a smaller N keeps some of the same.
    weight: how often an epoch draws each kept record, on average (`Mixture.draw`).
  """

  directory: str
  split: str = 'train'
  rule: str = 'all'
  weight: float = 1.0

  @property
  def name(self) -> str:
    return f'{self.directory}:{self.split}'


def parse(rows: Sequence[Sequence[Any]], field: str = 'DataConfig.mixture') -> tuple[Part, ...]:
  """(directory, split, rule, weight) each -> parts; rule and weight may be left out.

  Raises:
    ConfigError: names the row, its directory and the field.
  """
  parts = []
  for i, row in enumerate(rows):
    where = f'{field}[{i}]'
    if not isinstance(row, tuple | list) or not 2 <= len(row) <= 4:
      raise ConfigError(f'{where}: expected (directory, split, rule, weight); found {row!r}')
    part = Part(*row)
    for name in ('directory', 'split'):
      value = getattr(part, name)
      if not isinstance(value, str) or not value:
        raise ConfigError(f'{where}: {name}: expected a string; found {value!r}')
    where = f'{where} {part.name!r}'
    if not isinstance(part.rule, str) or not _amount(part.rule):
      raise ConfigError(f'{where}: rule: expected {_RULES}; found {part.rule!r}')
    number = isinstance(part.weight, int | float) and not isinstance(part.weight, bool)
    if not number or not 0 < part.weight < math.inf:
      raise ConfigError(f'{where}: weight: expected a positive number; found {part.weight!r}')
    parts.append(dataclasses.replace(part, weight=float(part.weight)))
  if not parts:
    raise ConfigError(f'{field}: expected at least one source; found none')
  return tuple(parts)


def _amount(rule: str) -> tuple[str, fractions.Fraction | int] | None:
  """What is kept: from where, and a share (Fraction) or a count (int) of it. None for what is not a rule."""
  match = _RULE.fullmatch(rule)
  if not match:
    return None
  kind, number, percent = match.groups()
  if kind is None:
    return 'first', fractions.Fraction(1)
  amount = fractions.Fraction(number)
  if amount == 0 or (percent and amount > 100) or (not percent and '.' in number):
    return None
  return kind, amount / 100 if percent else int(amount)


def _kept(part: Part, source: Split, seed: int, where: str) -> Sequence[int]:
  """Indices of the records kept, ascending."""
  kind, amount = _amount(part.rule)
  count = len(source)
  most = math.ceil(amount * count) if isinstance(amount, fractions.Fraction) else amount
  if most > count:
    raise ConfigError(f'{where}: rule: {part.rule!r} expects at least {most} records; found {count}')
  if kind == 'random':
    return np.sort(permutation(count, 'keep', seed, source.fingerprint)[:most])
  return range(most) if kind == 'first' else range(count - most, count)


def permutation(count: int, *key: int | str) -> np.ndarray:
  """A random order int64[count] that depends on `count` and `key` alone.

  NumPy promises that the bits of PCG64 never change, but not what its `Generator` makes of them.
  """
  digest = hashlib.sha256(json.dumps(key).encode()).digest()
  return np.argsort(np.random.PCG64(int.from_bytes(digest[:16], 'little')).random_raw(count), kind='stable')


class Mixture:
  """The kept records of all parts, one part after the other, by random access.

  Pickles without its open files: a worker opens those of a part when it first reads from it.

  Attributes:
    parts: what it was made of.
    counts: records kept of each. drawn: samples of each in an epoch.
    per_epoch: samples of an epoch; not `len`, which counts records.
    fingerprint: sha256 over what is kept of each part, in which order, and its weight; not over where it lies.
  """

  def __init__(self, parts: Sequence[Part], *, seed: int):
    """Opens every part.

    Args:
      parts: from `parse`. seed: of what 'random' keeps, and of what an epoch draws.
    Raises:
      ConfigError: a part has fewer records than its rule names, or a weight that draws none.
      DataError: as `records.open_split`.
    """
    self.parts, self.seed = tuple(parts), seed
    self._open = {i: open_split(part.directory, part.split) for i, part in enumerate(self.parts)}
    self._records = [len(source) for source in self._open.values()]
    self._kept, self.drawn, digest = [], [], hashlib.sha256()
    for i, part in enumerate(self.parts):
      where = f'DataConfig.mixture[{i}] {part.name!r}'
      kept = _kept(part, self._open[i], seed, where)
      drawn = int(part.weight * len(kept) + 0.5)
      if not drawn:
        raise ConfigError(f'{where}: weight: {part.weight:g} of {len(kept)} record(s) is less than one sample an epoch')
      self._kept.append(kept)
      self.drawn.append(drawn)
      indices = hashlib.sha256(np.asarray(kept, '<i8').tobytes()).hexdigest()
      digest.update(json.dumps([self._open[i].fingerprint, part.rule, indices, part.weight]).encode() + b'\n')
    self.counts = [len(kept) for kept in self._kept]
    self._ends = list(itertools.accumulate(self.counts))
    self.per_epoch = sum(self.drawn)
    self.fingerprint = digest.hexdigest()

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_open': {}}

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    """Record `index`, its id led by the name of its part. Raises IndexError past the end, DataError as `Split`."""
    i, of_part = self.locate(index.__index__())
    record = self.split(i)[of_part]
    return {**record, 'id': f'{self.parts[i].name}:{record["id"]}'}

  def place(self, index: int) -> str:
    """Names record `index` in errors, by its place in its own dataset."""
    i, of_part = self.locate(index)
    return self.split(i).place(of_part)

  def locate(self, index: int) -> tuple[int, int]:
    """Of which part record `index` is, and which record of its split. Raises IndexError past the end."""
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    i = bisect.bisect_right(self._ends, index)
    return i, int(self._kept[i][index - self._ends[i] + self.counts[i]])

  def split(self, i: int) -> Split:
    """The whole split that part i keeps some of."""
    if i not in self._open:
      self._open[i] = open_split(self.parts[i].directory, self.parts[i].split)
    return self._open[i]

  def draw(self, epoch: int) -> np.ndarray:
    """The samples of an epoch: indices int64[per_epoch], part by part.

    A part with n kept records and weight w gives w·n samples, rounded (halves up). It deals them like cards: its
    records in a random order, and again in another one when all are dealt, each epoch going on where the last one
    stopped. So a whole w gives every record w times in every epoch; w = 0.5 one half, and the other half in the next
    epoch; and at the end of any epoch the numbers of times that records of a part were drawn differ by at most 1.
    """
    found = []
    for i, (count, drawn) in enumerate(zip(self.counts, self.drawn, strict=True)):
      start, stop = epoch * drawn, (epoch + 1) * drawn
      rounds = range(start // count, -(-stop // count))
      dealt = np.concatenate([permutation(count, 'draw', self.seed, i, number) for number in rounds])
      first = rounds.start * count
      found.append(self._ends[i] - count + dealt[start - first : stop - first])
    return np.concatenate(found)

  def describe(self) -> str:
    """A table of the parts, for people."""
    rows = [('source', 'records', 'rule', 'kept', 'weight', 'drawn', 'share')]
    for part, *numbers in zip(self.parts, self._records, self.counts, self.drawn, strict=True):
      records, kept, drawn = numbers
      share = f'{100 * drawn / self.per_epoch:.1f}%'
      rows.append((part.name, f'{records:,}', part.rule, f'{kept:,}', f'{part.weight:g}', f'{drawn:,}', share))
    rows.append(('total', f'{sum(self._records):,}', '', f'{len(self):,}', '', f'{self.per_epoch:,}', '100.0%'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = (0, 2)  # columns that are not numbers
    lines = [[f'{cell:{"<>"[i not in words]}{widths[i]}}' for i, cell in enumerate(row)] for row in rows]
    return '\n'.join('  '.join(line) for line in lines)


def length_grouped(
  lengths: np.ndarray,
  batch_size: int,
  *key: int | str,
  apart: np.ndarray | None = None,
  window: int = 64,
) -> np.ndarray:
  """A random order in which every `batch_size` samples are about equally long.

  Samples are shuffled, sorted by length within each `window` batches of them, cut into batches, and the batches
  shuffled. Source: the length- and modality-grouped samplers of transformers and LLaVA, whose window is one batch.

  Args:
    lengths: int[n], in any unit.
    key: the seed and the epoch; the order depends on nothing else.
    apart: bool[n] or int[n]: the kind of each (text only, one image, a video). Samples of different kinds share a batch
      only in what is left when every kind has filled its own batches: at most one batch fewer than there are kinds.
    window: batches that are sorted together; more = more alike, and less random.
  Returns:
    Indices int64[n // batch_size * batch_size]. The rest, others in each epoch and of any kind, is left out: a batch
    that went on in the next epoch would not be of one kind.
  """
  order = permutation(len(lengths), 'group', *key)
  kinds = np.zeros(len(lengths), int) if apart is None else np.asarray(apart, int)
  batches, rest = [], []
  for kind in np.unique(kinds):
    members = order[kinds[order] == kind]
    whole = len(members) // batch_size * batch_size
    rest.append(members[whole:])
    members = members[:whole]
    members = members[np.lexsort((lengths[members], np.arange(whole) // (window * batch_size)))]
    batches.append(members.reshape(-1, batch_size))
  left = np.concatenate(rest) if rest else order
  # drawn from all of them: the last would always be of one kind, of which an epoch might then see none
  dropped = permutation(len(left), 'rest', *key)[: len(left) % batch_size]
  batches.append(np.delete(left, dropped).reshape(-1, batch_size))
  batches = np.concatenate(batches)
  return batches[permutation(len(batches), 'batches', *key)].reshape(-1)


def samples_of(source: Sequence[Record], epoch: int) -> np.ndarray:
  """The samples of an epoch, unshuffled: what a Mixture draws, every record of any other source."""
  return source.draw(epoch) if isinstance(source, Mixture) else np.arange(len(source))


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """epoch -> record indices in a random order; in that of the source without a seed."""

  source: Sequence[Record]
  seed: int | None

  def __call__(self, epoch: int) -> np.ndarray:
    found = samples_of(self.source, epoch)
    return found if self.seed is None else found[permutation(len(found), 'shuffle', self.seed, epoch)]


class Epochs:
  """What an order gives for epoch 0, 1, ..., one after the other, by random access: a source for Grain.

  An item depends on the order and the index alone. Finding an epoch computes the orders of those before it, once in
  every process, for epochs need not be equally long.
  """

  def __init__(self, order: Callable[[int], Sequence[Any]], num_epochs: int | None, starts: Sequence[int] = (0,)):
    """Args: order: pure and picklable. num_epochs: None = without end. starts: of the epochs known already.

    Raises DataError E_EMPTY if an epoch has no item.
    """
    self._order, self._num_epochs = order, num_epochs
    self._starts = list(starts)
    self._recent: dict[int, Sequence[Any]] = {}
    self._lock = threading.Lock()

  def __reduce__(self):
    return type(self), (self._order, self._num_epochs, tuple(self._starts))

  def __len__(self) -> int:
    return sys.maxsize if self._num_epochs is None else self.items_in(self._num_epochs)

  def __getitem__(self, index: int) -> Any:
    with self._lock:
      while self._starts[-1] <= index:
        self._extend()
      epoch = bisect.bisect_right(self._starts, index) - 1
      item = self._items(epoch)[index - self._starts[epoch]]
    return int(item) if isinstance(item, np.integer) else item

  def items_in(self, epochs: float) -> int:
    """How many items so many epochs have; of a part of an epoch, that part of its items, rounded down."""
    whole = int(epochs)
    with self._lock:
      while len(self._starts) <= math.ceil(epochs):
        self._extend()
      return self._starts[whole] + int((epochs - whole) * (self._starts[math.ceil(epochs)] - self._starts[whole]))

  def _extend(self) -> None:
    epoch = len(self._starts) - 1
    items = len(self._items(epoch))
    if not items:
      raise DataError('E_EMPTY', f'epoch {epoch}', 'expected samples that fill at least one batch; found too few')
    self._starts.append(self._starts[-1] + items)

  def _items(self, epoch: int) -> Sequence[Any]:
    if epoch not in self._recent:
      self._recent = {known: self._recent[known] for known in sorted(self._recent)[-1:]}  # two at most: they are large
      self._recent[epoch] = self._order(epoch)
    return self._recent[epoch]

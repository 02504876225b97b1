"""What a frozen vision tower makes of a dataset, as it lies on disk, read beside the records.

Enters: what `feature_writer` leaves in a directory per split (`directory_of`):

  features.json       what the features are of and how they were made (`Layout`)
  I-of-N.array_record for each `records_per_file` records, an item per visual in order: [V P W], little endian
  I-of-N.json         for each of those records, how many visuals each of its tags stands for. It appears last: a file
                      without it is unfinished

After the last record comes one more, a visual of the mean colour: what text alone is fused with (`text_only`).
Leaves: the visuals of a record by random access. array_record checksums every item, so a damaged one raises.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Mixture
from llava_mini_jax.data.records import Split
from llava_mini_jax.experiment import DataConfig

DTYPES = ('bfloat16', 'float32')
HEADER = 'features.json'

Visuals = list[list[np.ndarray]]  # of a record: those of each tag, [V P W] each


@dataclasses.dataclass(frozen=True)
class Layout:
  """What features are of and how they were made; all that a run has to share, but for the last two.

  Attributes:
    dataset: fingerprint of the records. tower: of the parameters (`train.features.tower_fingerprint`).
    settings: `settings_of` the run that made them.
    dtype: of what is stored. shape: [V, P, W] of a visual.
    visuals_per_batch: encoded together; XLA's rounding may depend on it.
  """

  dataset: str
  records: int
  tower: str
  settings: dict[str, Any]
  dtype: str
  shape: tuple[int, int, int]
  records_per_file: int
  visuals_per_batch: int

  @property
  def bytes_per_visual(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

  @property
  def files(self) -> int:
    return -(-(self.records + 1) // self.records_per_file)

  def indices(self, file: int) -> range:
    """Records that a file holds; the last one of all is the visual of the mean colour."""
    return range(file * self.records_per_file, min((file + 1) * self.records_per_file, self.records + 1))

  def paths(self, directory: Path, file: int) -> tuple[Path, Path]:
    """Items, and how many belong to each record."""
    name = f'{file:05d}-of-{self.files:05d}'
    return directory / f'{name}.array_record', directory / f'{name}.json'


def settings_of(data: DataConfig, model: LlavaMiniConfig) -> dict[str, Any]:
  """The fields that decide what the tower makes of a record, by name."""
  names = ['aspect', 'grid', 'video_fps', 'video_frames', 'video_max_frames', 'video_rule', 'frame_resize']
  names += ['grid_order'] if data.grid > 1 else []
  vision = ('image_size', 'patch_size', 'num_attention_heads', 'layer_norm_eps', 'run_layers')
  return {
    **{f'data.{name}': getattr(data, name) for name in names},
    **{f'model.vision.{name}': getattr(model.vision, name) for name in vision},
    'model.dtype': model.dtype,
  }


def directory_of(root: str | os.PathLike, split: Split) -> Path:
  """Where under `root` the features of a split lie: one root serves several datasets."""
  return Path(root) / f'{split.name}-{split.fingerprint[:16]}'


def read_header(directory: Path) -> Layout:
  """Raises DataError: E_NO_FEATURES, E_FEATURES_CORRUPT."""
  try:
    values = json.loads((directory / HEADER).read_text())
    return Layout(**{**values, 'shape': tuple(values['shape'])})
  except FileNotFoundError:
    message = 'expected features of this dataset; found none: write them with launch/prepare_data.py --features'
    raise DataError('E_NO_FEATURES', str(directory), message) from None
  except (ValueError, TypeError, KeyError) as error:
    raise DataError('E_FEATURES_CORRUPT', str(directory / HEADER), f'cannot be read ({error})') from error


def check_layout(directory: Path, there: Layout, wanted: Layout) -> None:
  """Raises ConfigError naming every field in which features differ from those wanted; files and batches may."""
  old, new = ({**dataclasses.asdict(layout), **layout.settings} for layout in (there, wanted))
  names = [*(old['settings'] | new['settings']), 'dataset', 'records', 'tower', 'dtype', 'shape']
  check_same(directory, {name: (new.get(name), old.get(name)) for name in names})


def check_same(directory: Path, fields: dict[str, tuple[Any, Any]]) -> None:
  """fields: name -> (expected, found). Raises ConfigError in one line."""
  lines = [f'{name}: expected {a!r}; found {b!r}' for name, (a, b) in fields.items() if a != b]
  if lines:
    raise ConfigError(f'features in {directory} were made otherwise: {", ".join(lines)}')


class Features:
  """The features of one split, by random access beside its records. Pickles as its directory.

  Attributes:
    directory, layout: as the module says.
  """

  def __init__(self, directory: str | os.PathLike):
    """Raises DataError: E_NO_FEATURES; E_FEATURES_MISSING (lists files that are not there); E_FEATURES_CORRUPT."""
    self.directory = Path(directory)
    self.layout = read_header(self.directory)
    paths = [self.layout.paths(self.directory, file) for file in range(self.layout.files)]
    missing = [str(file) for file, pair in enumerate(paths) if not all(path.exists() for path in pair)]
    if missing:
      some = ', '.join(missing[:8]) + (f' and {len(missing) - 8} more' if len(missing) > 8 else '')
      message = f'expected {len(paths)} finished files; {some} are missing: run launch/prepare_data.py --features again'
      raise DataError('E_FEATURES_MISSING', str(self.directory), message)
    counts = [_read_counts(index, len(self.layout.indices(file))) for file, (_, index) in enumerate(paths)]
    per_record = list(itertools.chain.from_iterable(counts))
    self._tags = _starts([len(tags) for tags in per_record])
    self._visuals = _starts(list(itertools.chain.from_iterable(per_record)))
    sizes = [sum(map(sum, of_file)) for of_file in counts]
    # With their numbers said, files are not opened before they are read; one without items is never.
    files = [f'{items}[0:{size}]' for (items, _), size in zip(paths, sizes, strict=True) if size]
    self._source = grain.sources.ArrayRecordDataSource(files)

  def __reduce__(self):
    return type(self), (self.directory,)

  def __len__(self) -> int:
    return self.layout.records

  def __getitem__(self, index: int) -> Visuals:
    """Of record `index`. Raises IndexError past the end, DataError E_FEATURES_CORRUPT if its bytes are damaged."""
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    return self._read(index)

  @property
  def blank(self) -> np.ndarray:
    """[V P W] of a visual of the mean colour."""
    return self._read(len(self))[0][0]

  def _read(self, index: int) -> Visuals:
    tags = range(self._tags[index], self._tags[index + 1])
    return [[self._item(i) for i in range(self._visuals[tag], self._visuals[tag + 1])] for tag in tags]

  def _item(self, number: int) -> np.ndarray:
    try:
      return np.frombuffer(self._source[number], jnp.dtype(self.layout.dtype)).reshape(self.layout.shape)
    except Exception as error:  # a damaged file surfaces as a RuntimeError, often an empty one
      detail = str(error).strip().splitlines()[:1] or [type(error).__name__]
      where = f'{self.directory}: item {number}'
      raise DataError('E_FEATURES_CORRUPT', where, f'cannot be read ({detail[0]})') from error


@dataclasses.dataclass(frozen=True)
class MixedFeatures:
  """The features of a mixture's kept records, by random access beside them."""

  mixture: Mixture
  parts: Sequence[Features]

  @property
  def layout(self) -> Layout:
    """Of the first part: they share all that is not of their dataset."""
    return self.parts[0].layout

  @property
  def directory(self) -> Path:
    return self.parts[0].directory

  def __getitem__(self, index: int) -> Visuals:
    part, record = self.mixture.locate(index)
    return self.parts[part][record]

  @property
  def blank(self) -> np.ndarray:
    return self.parts[0].blank


def open_features(
  root: str | os.PathLike, source: Split | Mixture, data: DataConfig, model: LlavaMiniConfig
) -> Features | MixedFeatures:
  """The features of every record of a run's source.

  Raises:
    ConfigError: they were made with other settings than the run has; one line names the fields.
    DataError: as `Features`.
  """
  if isinstance(source, Mixture):
    parts = [open_features(root, split, data, model) for split in map(source.split, range(len(source.parts)))]
    first = parts[0].layout
    for part in parts:
      same = {name: (getattr(first, name), getattr(part.layout, name)) for name in ('tower', 'dtype')}
      check_same(part.directory, same)
    return MixedFeatures(source, parts)
  directory = directory_of(root, source)
  layout = read_header(directory)
  settings = settings_of(data, model)
  expected = dict(settings=settings, dataset=source.fingerprint, records=len(source))
  check_layout(directory, layout, dataclasses.replace(layout, **expected))
  return Features(directory)


def _read_counts(path: Path, records: int) -> list[list[int]]:
  try:
    counts = json.loads(path.read_text())
    good = len(counts) == records and all(type(n) is int and n >= 0 for tags in counts for n in tags)
  except (ValueError, TypeError) as error:
    raise DataError('E_FEATURES_CORRUPT', str(path), f'cannot be read ({error})') from error
  if not good:
    raise DataError('E_FEATURES_CORRUPT', str(path), f'expected the numbers of visuals of {records} records')
  return counts


def _starts(sizes: list[int]) -> list[int]:
  return [0, *itertools.accumulate(sizes)]

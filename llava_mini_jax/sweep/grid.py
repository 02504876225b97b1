"""What a sweep is: a base experiment, points that change some of its fields, and seeds.

A sweep file, as configs/ablations/table6.py, is a Python file with `get_sweep() -> Sweep`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import runpy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_mini_jax.analyze.flops import prompt_flops, training_flops
from llava_mini_jax.analyze.stations import trained_stations
from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.experiment import Experiment

_NAME = re.compile(r'[A-Za-z0-9_]+')
TEXT = 12  # tokens of a question, about, that FLOPs of an answer are counted with


@dataclasses.dataclass(frozen=True)
class Point:
  """One cell of the grid.

  Attributes:
    name: of its directory: letters, digits and _.
    changes: by path, as 'model.prefusion.num_layers', what differs from the base.
    paper: what the paper prints for its row, by column; empty if it has none.
    series: names of the lines that it is on in plots.
  """

  name: str
  changes: Mapping[str, Any]
  paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
  series: tuple[str, ...] = ('',)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Points in the order in which they run, each with all seeds before the next.

  Raises ConfigError: a name twice or none, a field that there is not.
  """

  title: str
  base: Experiment
  points: tuple[Point, ...]
  seeds: tuple[int, ...] = (0, 1, 2)
  split: str = 'test'

  def __post_init__(self):
    names = [point.name for point in self.points]
    if not names or not self.seeds:
      raise ConfigError(f'sweep: expected points and seeds; found {len(names)} and {len(self.seeds)}')
    for name in names:
      if not _NAME.fullmatch(name) or names.count(name) > 1:
        raise ConfigError(f'sweep: expected names of letters, digits and _, each once; found {name!r}')
    for point in self.points:
      self.experiment(point, self.seeds[0])

  def experiment(self, point: Point, seed: int) -> Experiment:
    return changed(self.base, {**point.changes, 'train.seed': seed})

  def runs(self) -> Iterator[tuple[Point, int]]:
    return ((point, seed) for point in self.points for seed in self.seeds)


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
  """The experiment with fields replaced, by path. Raises ConfigError naming a field that there is not."""
  values = copy.deepcopy(experiment.to_dict())
  for path, value in changes.items():
    *sections, field = path.split('.')
    place = values
    for name in sections:
      place = place.get(name) if isinstance(place, dict) else None
    if not isinstance(place, dict) or field not in place:
      raise ConfigError(f'sweep: expected the path of a field; found {path!r}')
    place[field] = value
  return Experiment.from_dict(values)


def with_text_room(base: Experiment, points: Iterable[Point], text: int) -> tuple[Point, ...]:
  """The points with rows that hold so many tokens of text beside the vision tokens that each has.

  Else points with fewer vision tokens would be taught more. For rows of one visual.
  """

  def length(point: Point) -> int:
    experiment = changed(base, point.changes)
    return text + experiment.model.slots_per_visual(_views(experiment))

  return tuple(
    dataclasses.replace(point, changes={**point.changes, 'data.row_length': length(point)}) for point in points
  )


def _views(experiment: Experiment) -> int:
  return ImageProcessor(experiment.model.vision.image_size, grid=experiment.data.grid).views


def load_sweep(file: str | os.PathLike, changes: Mapping[str, Any], seeds: tuple[int, ...] = ()) -> Sweep:
  """Runs a sweep file.

  Args:
    changes: by path, what differs from its base on this machine. seeds: instead of its own.
  Raises:
    ConfigError: no such file, or it has no `get_sweep`.
  """
  if not Path(file).is_file():
    raise ConfigError(f'sweep: no such file: {file}')
  build = runpy.run_path(os.fspath(file)).get('get_sweep')
  if build is None:
    raise ConfigError(f'{file}: expected a function get_sweep; found none')
  sweep = build()
  return dataclasses.replace(sweep, base=changed(sweep.base, changes), seeds=seeds or sweep.seeds)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run, known before it: vision tokens and FLOPs (every product) of an answer, and FLOPs of the training."""

  tokens: int
  prompt_flops: float
  steps: int
  training_flops: float


def cost(experiment: Experiment, *, kept: Path | None = None) -> Cost:
  """Counts the steps as the trainer does. With `group_by_length` every batch is taken for the largest.

  Args:
    experiment: its dataset is opened and counted; records are read only to pack or group them.
    kept: where the trainer keeps their sizes; None = they are measured anew.
  Raises:
    DataError, ConfigError: as `load_inputs`.
  """
  model, data, train = experiment.model, experiment.data, experiment.train
  views = _views(experiment)
  inputs = load_inputs(data, model, seed=train.seed, start=train.init_from)
  order = inputs.order(batch_size=train.batch_size, seed=train.seed, kept=kept)
  steps = experiment.total_steps(inputs.rows(order, train.epochs))
  sizes = dict(
    rows=train.batch_size,
    length=data.row_length,
    visuals=data.visuals_per_row,
    fused_text=data.fused_text or data.row_length,
    views=views,
  )
  each = training_flops(model, **trained_stations(experiment), **sizes)
  return Cost(model.slots_per_visual(views), prompt_flops(model, TEXT, views=views).total, steps, steps * each)

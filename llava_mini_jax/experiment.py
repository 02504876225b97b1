"""One experiment: the model, its data and its training, as frozen dataclasses.

`configs/*.py` build these and hand them out as `ml_collections.ConfigDict`s, so
that every field can be overridden on the command line; `from_dict` turns what
comes back into typed, checked values.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from llava_mini_jax.config import QUANTIZED, ConfigError, LlavaMiniConfig, build_dataclass, require_choice

BAD_SAMPLE = ('raise', 'mask')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples come from and what a row looks like."""

  dataset: str = ''  # directory written by launch/prepare_data.py
  split: str = 'train'
  mixture: tuple = ()  # instead of dataset and split: (directory, split, rule, weight) each; see `data/mixture.py`
  tokenizer: str = ''  # HF fast tokenizer directory; '' = that of train.init_from, else that of the dataset
  template: str = 'vicuna_v1'  # conversation template: a name or a Jinja file
  default_system: bool = True  # False leaves the template's system text out
  row_length: int = 2048  # L
  visuals_per_row: int = 1  # M; 0 = text alone
  fused_text: int = 0  # T; 0 = row_length
  aspect: str = 'pad'  # pad to a square with the mean colour, or crop the centre
  grid: int = 1  # r > 1: high resolution, r × r crops besides the whole image
  # how crops come about (`images.ImageProcessor`): as in released training; released evaluation: split_then_pad
  grid_order: str = 'pad_then_split'
  video_fps: float = 1.0  # frames per second that are seen
  video_frames: int = 0  # instead of video_fps: so many, evenly spread
  video_max_frames: int = 0  # of video_fps; a longer video is seen at so many, evenly spread. 0 = no limit
  video_rule: str = 'timestamp'  # timestamp; released = the index rule of the released package
  frame_resize: str = 'squash'  # squash a frame to a square (released); aspect = treat it as an image
  max_turns: int = 0  # keep a random 1…max_turns questions of a record, in random order; 0 = the conversation as it is
  side_by_side: bool = False  # questions of a record share its image in one row, and none sees another; as many as fit
  truncate: bool = False  # cut a sample at row_length instead of refusing it, unless an image or every target is lost
  pack: bool = False  # several whole samples share a row
  pack_window: int = 512  # samples that are packed together, out of which rows are filled
  group_by_length: bool = False  # batches of like length, text only apart
  row_lengths: tuple = ()  # with group_by_length: the lengths that a batch may have, up to row_length
  visual_counts: tuple = ()  # with group_by_length: the numbers of visuals that its rows have room for, likewise
  flip: float = 0.0  # probability of a horizontal flip
  shift: int = 0  # most pixels of a random shift that keeps the content inside
  workers: int = 0  # data worker processes
  # raise = a bad sample ends the run; mask = it keeps its place in the batch, as padding, is counted and logged
  bad_sample: str = 'raise'
  bad_sample_share: float = 0.001  # of a run's samples that may be masked; the one after them ends the run
  features: str = ''  # directory written by prepare_data.py --features: the frozen tower's output is read, not computed

  def __post_init__(self):
    require_choice('DataConfig.aspect', self.aspect, ('pad', 'crop'))
    require_choice('DataConfig.bad_sample', self.bad_sample, BAD_SAMPLE)
    if not 0 <= self.bad_sample_share <= 1:
      raise ConfigError(f'DataConfig.bad_sample_share: expected a share from 0 to 1; found {self.bad_sample_share}')
    for field in ('row_length', 'pack_window'):
      if getattr(self, field) < 1:
        raise ConfigError(f'DataConfig.{field}: expected a positive integer; found {getattr(self, field)}')
    for field in ('visuals_per_row', 'fused_text', 'max_turns', 'shift', 'workers'):
      if getattr(self, field) < 0:
        raise ConfigError(f'DataConfig.{field}: expected 0 or more; found {getattr(self, field)}')
    if self.pack and self.group_by_length:
      raise ConfigError('DataConfig: expected at most one of pack and group_by_length; found both')
    for field in ('row_lengths', 'visual_counts'):
      found = getattr(self, field)
      if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in found):
        raise ConfigError(f'DataConfig.{field}: expected positive integers; found {found!r}')
      if found and not self.group_by_length:
        raise ConfigError(f'DataConfig.{field}: expected none without group_by_length')
    if (self.pack or self.group_by_length) and (self.max_turns or self.side_by_side):
      raise ConfigError('DataConfig: expected no max_turns and no side_by_side with pack or group_by_length; found one')
    if self.truncate and self.side_by_side:
      raise ConfigError('DataConfig: expected at most one of truncate and side_by_side; found both')
    if self.mixture and self.dataset:
      raise ConfigError('DataConfig: expected at most one of dataset and mixture; found both')
    if self.features and (self.flip or self.shift):
      raise ConfigError('DataConfig.features: expected no flip and no shift with features; found one')
    if not 0 <= self.flip <= 1:
      raise ConfigError(f'DataConfig.flip: expected a probability; found {self.flip}')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How it trains. `groups` is a table of (path pattern, peak learning rate or 'frozen'); the first match decides."""

  groups: tuple = (('.*', 1e-4),)
  init_from: str = ''  # a run, or an imported checkpoint, whose parameters and tokenizer this one starts with
  init_fresh: tuple = ()  # path patterns of the parameters that may start anew if `init_from` does not have them
  lora_rank: int = 0  # adapters of that rank train in place of the kernels that lora_targets match; 0 = none
  lora_alpha: float = 16.0  # an adapter's share is lora_alpha / lora_rank
  lora_targets: tuple = ()  # path patterns of kernels that `groups` freeze; their adapters are `lora/PATH/a` and `/b`
  lora_base: str = ''  # int8, int4, nf4: what those kernels are kept in; '' = param_dtype
  param_dtype: str = 'float32'  # bfloat16: half the memory; updates are rounded at random, adapters stay float32
  batch_size: int = 256  # global
  accumulate: int = 1  # micro-steps that a batch is computed in, with the memory of one and the numbers of all
  epochs: float = 1.0
  max_steps: int = 0  # ends earlier; the schedule is laid out over the shorter of the two. 0 = no limit
  seed: int = 0
  warmup_ratio: float = 0.03
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8
  max_grad_norm: float = 1.0
  max_skipped: int = 10  # steps skipped in a row (not finite, spikes, nothing to learn) that end the run
  spike_sigmas: float = 0.0  # skip a loss or gradient norm so many deviations above the window's mean; 0 = never
  spike_window: int = 128  # steps that counted, which spikes are measured against
  mesh: tuple = (1, -1, 1)  # data × fsdp × tensor; -1 = the remaining devices
  slices: int = 1  # TPU slices (or processes) that only a data-center network joins; `data` is a multiple of it
  log_every: int = 10
  save_every: int = 500
  keep: int = 3  # newest checkpoints kept; of verified ones always 2
  verify_saves: bool = True  # a save counts when it was read back from disk and is what was saved
  failed_saves: int = 3  # in a row, that end the run

  def __post_init__(self):
    counts = ('batch_size', 'accumulate', 'log_every', 'save_every', 'keep', 'failed_saves', 'slices', 'max_skipped')
    for field in counts:
      if getattr(self, field) < 1:
        raise ConfigError(f'TrainConfig.{field}: expected a positive integer; found {getattr(self, field)}')
    for field, top in (('warmup_ratio', 1.0), ('beta1', 1.0), ('beta2', 1.0)):
      if not 0 <= getattr(self, field) < top:
        raise ConfigError(f'TrainConfig.{field}: expected 0 <= value < {top:g}; found {getattr(self, field)}')
    for field in ('epochs', 'eps', 'max_grad_norm', 'lora_alpha'):
      if not getattr(self, field) > 0:
        raise ConfigError(f'TrainConfig.{field}: expected a positive number; found {getattr(self, field)}')
    for field, least in (('spike_sigmas', 0), ('spike_window', 2)):
      if getattr(self, field) < least:
        raise ConfigError(f'TrainConfig.{field}: expected {least} or more; found {getattr(self, field)}')
    if self.weight_decay < 0 or self.max_steps < 0:
      raise ConfigError('TrainConfig: weight_decay and max_steps must not be negative')
    require_choice('TrainConfig.param_dtype', self.param_dtype, ('float32', 'bfloat16'))
    if self.lora_base:
      require_choice('TrainConfig.lora_base', self.lora_base, QUANTIZED)
      if not self.lora_rank:
        raise ConfigError(f'TrainConfig: expected a lora_rank with lora_base={self.lora_base!r}; found none')
    if self.lora_rank < 0 or bool(self.lora_rank) != bool(self.lora_targets):
      found = f'lora_rank={self.lora_rank}, lora_targets={self.lora_targets!r}'
      raise ConfigError(f'TrainConfig: expected both a positive lora_rank and lora_targets, or neither; found {found}')
    if not all(isinstance(pattern, str) for pattern in self.lora_targets):
      raise ConfigError(f'TrainConfig.lora_targets: expected path patterns; found {self.lora_targets!r}')
    if not all(isinstance(size, int) for size in self.mesh):
      raise ConfigError(f'TrainConfig.mesh: expected integers; found {self.mesh!r}')
    if not all(isinstance(pattern, str) for pattern in self.init_fresh):
      raise ConfigError(f'TrainConfig.init_fresh: expected patterns; found {self.init_fresh!r}')
    for row in self.groups:
      if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[0], str):
        raise ConfigError(f"TrainConfig.groups: expected (pattern, learning rate or 'frozen'); found {row!r}")


@dataclasses.dataclass(frozen=True)
class Experiment:
  model: LlavaMiniConfig
  data: DataConfig
  train: TrainConfig

  def to_dict(self) -> dict[str, Any]:
    return dict(model=self.model.to_dict(), data=dataclasses.asdict(self.data), train=dataclasses.asdict(self.train))

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """For `config_flags`: every field can be overridden, `--config.train.batch_size=64`."""
    return ml_collections.ConfigDict(self.to_dict())

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
    """Inverse of `to_dict`, also from a ConfigDict or JSON. Raises ConfigError naming what is wrong."""
    if isinstance(values, ml_collections.ConfigDict):
      values = values.to_dict()
    if not isinstance(values, Mapping):
      raise ConfigError(f'config: expected the sections model, data, train; found {values!r}')
    unknown = sorted(set(values) - {'model', 'data', 'train'})
    missing = sorted({'model', 'data', 'train'} - set(values))
    if unknown or missing:
      raise ConfigError(f'config: expected the sections model, data, train; missing {missing}, unknown {unknown}')
    return cls(
      model=LlavaMiniConfig.from_dict(values['model']),
      data=build_dataclass(DataConfig, values['data'], 'data'),
      train=build_dataclass(TrainConfig, values['train'], 'train'),
    )

  def total_steps(self, rows: int) -> int:
    """Steps of a run over that many rows: whole batches only. Raises ConfigError if there is none."""
    steps = rows // self.train.batch_size
    steps = min(steps, self.train.max_steps) if self.train.max_steps else steps
    if not steps:
      raise ConfigError(
        f'{rows} row(s) in {self.train.epochs:g} epochs do not fill one batch of {self.train.batch_size}'
      )
    return steps


def read_change(text: str, flag: str) -> tuple[str, Any]:
  """`section.field=value` -> the field's path and its value, a Python literal or else text. Raises ConfigError."""
  path, equals, value = text.partition('=')
  if not equals:
    raise ConfigError(f'{flag}: expected section.field=value; found {text!r}')
  try:
    return path, ast.literal_eval(value)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it says of what is no literal
    return path, value

"""The cases of `test_golden.py`: files -> recorded calls of the released model, and our layout of their inputs.

A case is one or more calls: keys that begin with one of `PARTS` belong to a call of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.released import from_released, to_released
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.train.tree import abstract_model, parameter_shapes, unflatten
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

GOLDEN = Path(os.environ.get('LLAVA_MINI_GOLDEN', Path(__file__).parent / 'golden'))  # where the recorded tensors lie

# Recorded misbehaviour of the released code, not reproduced: where the attention mask is not a plain prefix of a row,
# it picks that row's text by offsets of another layout.
NOT_RUN = {'quirk_leftpad_input': 'released bug: left padding', 'quirk_hole_mask': 'released bug: mask holes'}
# A case that records no inputs of its own has those of another.
INPUTS_OF = {'train_grads': 'image_batch_padded', 'hd_train_grads': 'hd'}
# alt: another image · nolabels: the same ids at inference · plain_lm: the rows without a tag, without images ·
# unpadded: rows without their masked positions · single{i}: row i alone · before: a mask hole before the tag
PARTS = re.compile(r'(alt|nolabels|plain_lm|unpadded|single|before)(\d*)_')
KINDS = {
  'input': r'input_ids|labels|attention_mask|images(_\d+|_is_list)?|num_images|pixel_key'
  r'|tokenizer_(model_max_length|padding_side)',
  'stage': r'(enc\d+_)?(clip_(hidden\d+|features)|compressor_(in|kv_pos|out|attn)|proj_(compressed|global|hd_views)'
  r'|prefusion_(in|allowed|position_ids|out\d+)|fused_(compressed|text))',
  'whole': r'inputs_embeds|lm_(labels|attention_mask|position_ids(_is_none)?|hidden\d+)|logits|loss',
  'generation': r'gen_(ids|logits|margin)',
  'gradient': r'grad(slice|norm|none)?::.+',
}


def case_id(path: Path) -> str:
  return f'{path.parent.name}-{path.stem}'


def kind_of(key: str) -> str | None:
  return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, key)), None)


@functools.cache
def load_model(root: Path, video_stop_grad: bool = False) -> tuple[LlavaMiniConfig, nnx.GraphDef, dict]:
  config, vision = (json.loads((root / name).read_text()) for name in ('config.json', 'vision_config.json'))
  config = LlavaMiniConfig.from_hf(config, vision)
  config = dataclasses.replace(config, dtype='float32', video_stop_grad=video_stop_grad)
  tensors = load_file(root / 'model.safetensors')
  params = from_released(tensors.__getitem__, parameter_shapes(config))
  assert to_released(params).keys() == tensors.keys()
  return config, abstract_model(config)[0], unflatten({k: jnp.asarray(v) for k, v in params.items()})


@dataclasses.dataclass
class Part:
  """One call of the released model: what it was given, and what was recorded of it."""

  name: str
  root: Path  # of the model
  recorded: dict[str, np.ndarray]
  ids: np.ndarray  # int[B T]
  labels: np.ndarray | None  # int[B T]
  keep: np.ndarray  # bool[B T]
  visuals: list[np.ndarray]  # per row [frames V height width 3]
  listed: bool  # one entry per row was passed, not one tensor
  stacked: bool  # one tensor of videos was passed
  limit: int | None  # positions kept of each row
  rows: list[int]  # which rows of the case
  broken: list[int] = dataclasses.field(default_factory=list)  # rows the released code gets wrong

  def __post_init__(self):
    self.config, self.graphdef, self.params = load_model(self.root)

  def keys(self, kind: str) -> set[str]:
    return {key for key in self.recorded if kind_of(key) == kind}

  def select(self, rows: list[int]) -> Part:
    taken = dict(ids=self.ids[rows], keep=self.keep[rows], visuals=[self.visuals[i] for i in rows])
    labels = None if self.labels is None else self.labels[rows]
    return dataclasses.replace(self, **taken, labels=labels, rows=rows, broken=[])

  def compact(self) -> Part:
    """Without masked positions, padded on the right."""
    order = np.argsort(~self.keep, axis=1, kind='stable')[:, : self.keep.sum(1).max()]
    keep = np.take_along_axis(self.keep, order, 1)
    ids = np.where(keep, np.take_along_axis(self.ids, order, 1), 0)
    labels = None if self.labels is None else np.where(keep, np.take_along_axis(self.labels, order, 1), -100)
    return dataclasses.replace(self, ids=ids, labels=labels, keep=keep)

  def batch(self, *, labels: np.ndarray | None) -> Batch:
    """Through our own layout. Rows without a tag are fused with their image, as in released training."""
    most = max(len(v) for v in self.visuals)
    size = self.config.tokens_per_visual
    widest = max(int(keep.sum()) + size * len(v) for keep, v in zip(self.keep, self.visuals, strict=True))
    shape = RowShape.for_model(self.config, length=-(-widest // 8) * 8, visuals=most)  # few lengths: few compilations
    rows = []
    for i, (ids, keep, pixels) in enumerate(zip(self.ids, self.keep, self.visuals, strict=True)):
      tagged = (ids == IMAGE_TOKEN_ID).any()
      row = build_row(
        ids[keep],
        np.zeros(keep.sum(), bool) if labels is None else labels[i][keep] != -100,
        shape,
        where=f'row {i}',
        visuals_per_tag=[len(pixels)] if tagged else [],
        untagged=0 if tagged else len(pixels),
        fuse_token_zero=self.config.prefusion.fuse_token_zero,
      )
      row['pixels'] = np.zeros((most, *pixels.shape[1:]), np.float32)
      row['pixels'][: len(pixels)] = pixels
      rows.append(row)
    return Batch(**{key: np.stack([row[key] for row in rows]) for key in rows[0]})


@dataclasses.dataclass
class Case:
  name: str
  parts: list[Part]
  unknown: list[str]  # keys of no known kind
  why_broken: str | None


def as_frames(images: np.ndarray) -> np.ndarray:
  """(views 3 h w) or (frames views 3 h w) -> [frames views h w 3]."""
  images = images[None] if images.ndim == 4 else images
  return images.transpose(0, 1, 3, 4, 2)


def whole_part(name: str, root: Path, inputs: Mapping[str, np.ndarray], recorded: dict) -> Part:
  """All rows of the inputs."""
  listed = 'num_images' in inputs
  images = [inputs[f'images_{i}'] for i in range(int(inputs['num_images']))] if listed else inputs['images']
  ids, limit = inputs['input_ids'], inputs.get('tokenizer_model_max_length')
  return Part(
    name=name,
    root=root,
    recorded=recorded,
    ids=ids,
    labels=inputs.get('labels'),
    keep=inputs.get('attention_mask', np.ones(ids.shape, bool)).astype(bool),
    visuals=[as_frames(row) for row in images],
    listed=listed,
    stacked=not listed and images.ndim == 6,
    limit=None if limit is None else int(limit),
    rows=list(range(len(ids))),
  )


def special_part(part: Part, kind: str, number: str, own: Mapping[str, np.ndarray], main: Part) -> Part:
  """What the prefix of a part's keys says of its inputs; `own` are inputs it recorded itself."""
  if kind == 'nolabels':
    return part if 'labels' in own else dataclasses.replace(part, labels=None)
  if kind == 'plain_lm':
    part = part.select([i for i, ids in enumerate(part.ids) if not (ids == IMAGE_TOKEN_ID).any()])
    return dataclasses.replace(part, visuals=[v[:0] for v in part.visuals])
  if kind in ('single', 'unpadded'):
    count = {len(value) for value in (part.recorded | own).values() if value.ndim > 1} or {1}
    chosen = [[int(number)]] if number else [rows for rows in (main.rows, main.broken) if {len(rows)} == count]
    assert chosen, f'{part.name}: which rows? recorded {count} of {len(main.ids)}'
    alone = main.select(chosen[0]).compact()
    given = dict(ids='input_ids', keep='attention_mask', labels='labels', visuals='images')
    taken = {field: getattr(part if key in own else alone, field) for field, key in given.items()}
    return dataclasses.replace(part, **taken, rows=alone.rows)
  return part


def load_case(path: Path) -> Case:
  with np.load(path) as stored:
    arrays = {key: stored[key] for key in stored}
  if 'input_ids' not in arrays:
    with np.load(path.with_stem(INPUTS_OF[path.stem])) as stored:
      arrays |= {key: stored[key] for key in stored if kind_of(key) == 'input'}
  golden = path.parents[2]
  if 'pixel_key' in arrays:
    with np.load(golden / 'preprocess' / 'crop56.npz') as crops:
      arrays['images'] = crops[str(arrays['pixel_key'])][None]

  groups: dict[str, dict[str, np.ndarray]] = {'': {}}
  for key, value in arrays.items():
    prefix = match.group() if (match := PARTS.match(key)) else ''
    groups.setdefault(prefix, {})[key.removeprefix(prefix)] = value
  unknown = [prefix + key for prefix, keys in groups.items() for key in keys if kind_of(key) is None]
  shared = {key: value for key, value in groups[''].items() if kind_of(key) == 'input'}
  parts: list[Part] = []
  for prefix, keys in groups.items():
    own = {key: value for key, value in keys.items() if kind_of(key) == 'input'}
    recorded = {key: value for key, value in keys.items() if kind_of(key) not in ('input', None)}
    name = f'{case_id(path)} {prefix}'.strip()
    part = whole_part(name, golden / 'models' / path.parent.name, shared | own, recorded)
    if prefix:
      part = special_part(part, *PARTS.match(prefix).groups(), own, parts[0])
    if path.stem in NOT_RUN:
      holed = (np.diff(part.keep.astype(int), axis=1) > 0).any(1)  # a kept position after a masked one
      if prefix == 'before_' and 'attention_mask' not in own:
        holed[:] = True
      part.broken = np.flatnonzero(holed).tolist()
    parts.append(part)
  return Case(case_id(path), parts, unknown, NOT_RUN.get(path.stem))

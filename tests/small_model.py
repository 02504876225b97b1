"""A model of a few thousand parameters with random weights, and batches of random samples for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from llava_mini_jax.config import (
  CompressorConfig,
  DecoderConfig,
  LlavaMiniConfig,
  PrefusionConfig,
  ScanConfig,
  VisionConfig,
)
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.train.tree import abstract_model, merge, parameter_shapes
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

# Tests compile far longer than they run; without optimising, two to ten times less long.
quick_jit = functools.partial(jax.jit, compiler_options=dict(xla_backend_optimization_level=0))

VISION = VisionConfig(
  hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
DECODER = DecoderConfig(
  vocab_size=64,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
)


def small_config(**changes) -> LlavaMiniConfig:
  """The small model; `changes` are fields of its sections (as mappings) or of the whole."""
  config = LlavaMiniConfig(
    vision=VISION,
    compressor=CompressorConfig(num_heads=4),
    prefusion=PrefusionConfig(num_layers=2),
    decoder=DECODER,
    dtype='float32',
    scan=ScanConfig(remat='none'),
  )
  for name, value in changes.items():
    value = dataclasses.replace(getattr(config, name), **value) if isinstance(value, Mapping) else value
    config = dataclasses.replace(config, **{name: value})
  return config


def random_params(config: LlavaMiniConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Parameters by path, none of them neutral: norm weights around 1, all else around 0, of about unit gain."""
  params = {}
  for i, (path, shape) in enumerate(sorted(parameter_shapes(config).items())):
    noise = np.random.default_rng((seed, i)).normal(size=shape).astype(np.float32)
    params[path] = 0.2 * noise + np.float32(path.endswith('/weight'))
  return params


@functools.cache
def structure(config: LlavaMiniConfig) -> nnx.GraphDef:
  return abstract_model(config)[0]


def with_params(config: LlavaMiniConfig, params: Mapping[str, np.ndarray]) -> LlavaMini:
  """The model with these parameters, by path."""
  return merge(structure(config), params)


@dataclasses.dataclass(frozen=True)
class Sample:
  ids: np.ndarray  # int32[n], IMAGE_TOKEN_ID where visuals stand
  learn: np.ndarray  # bool[n]
  visuals_per_tag: tuple[int, ...]
  pixels: np.ndarray  # float32[visuals V height width 3], normalised


def random_sample(
  config: LlavaMiniConfig, seed: int, *, text: Sequence[int] = (3, 4), answer: int = 3, visuals: Sequence[int] = (1,)
) -> Sample:
  """Pieces of text of these lengths with a tag between each two, then an answer that is learnt.

  visuals: how many each tag stands for; one entry fewer than `text`.
  """
  rng = np.random.default_rng(seed)
  pieces = [rng.integers(1, config.decoder.vocab_size, n) for n in text]
  ids = [pieces[0]]
  for piece in pieces[1:]:
    ids += [[IMAGE_TOKEN_ID], piece]
  ids = np.concatenate([*ids, rng.integers(1, config.decoder.vocab_size, answer)]).astype(np.int32)
  size = config.vision.image_size
  pixels = rng.normal(size=(sum(visuals), 1, size, size, 3)).astype(np.float32)
  return Sample(ids, np.arange(len(ids)) >= len(ids) - answer, tuple(visuals), pixels)


def lay_out(
  config: LlavaMiniConfig, samples: Sequence[Sample], *, length: int, visuals: int, fused_text: int | None = None
) -> Batch:
  """One sample per row; pixels of absent visuals are noise, since nothing may depend on them."""
  shape = RowShape.for_model(config, length=length, visuals=visuals, fused_text=fused_text)
  size = config.vision.image_size
  rows = []
  for i, sample in enumerate(samples):
    row = build_row(sample.ids, sample.learn, shape, where=f'row {i}', visuals_per_tag=sample.visuals_per_tag)
    row['pixels'] = np.random.default_rng(i).normal(size=(visuals, 1, size, size, 3)).astype(np.float32)
    row['pixels'][: len(sample.pixels)] = sample.pixels
    rows.append(row)
  return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

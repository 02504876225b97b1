"""Parameters as plain nested dicts and as flat dicts by path, e.g. `decoder/layers/mlp/up_proj`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.llava_mini import LlavaMini, build


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(tree), sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def abstract_model(config: LlavaMiniConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """Structure and abstract parameters (shapes, dtypes, logical axes) of a model; allocates nothing."""
  return nnx.split(nnx.eval_shape(lambda: build(config, jax.random.key(0))))


def parameter_shapes(config: LlavaMiniConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter by path."""
  return {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(abstract_model(config)[1])).items()}


def merge(graphdef: nnx.GraphDef, *trees: Mapping[str, Any]) -> LlavaMini:
  """A model from parameter dicts that share no path."""
  flat = {}
  for tree in trees:
    flat |= flatten(tree)
  return nnx.merge(graphdef, unflatten(flat))

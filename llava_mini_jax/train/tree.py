"""Parameters as plain nested dicts and as flat dicts by path, e.g. `decoder/layers/mlp/up_proj`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.llava_mini import LlavaMini, build
from llava_mini_jax.sharding import check_parameter, use_mesh


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


def sharded_model(
  config: LlavaMiniConfig, mesh: Mesh, dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
  """Structure of a model, and shape, dtype (the one given) and sharding of every parameter by path; allocates nothing.

  Raises:
    MeshError: a parameter that does not divide over the mesh.
  """
  with use_mesh(mesh):
    graphdef, abstract = abstract_model(config)
    where = flatten(nnx.to_pure_dict(nnx.get_named_sharding(abstract, mesh)))
  leaves = flatten(nnx.to_pure_dict(abstract))
  for path, leaf in leaves.items():
    check_parameter(path, leaf.shape, where[path])
  return graphdef, {p: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where[p]) for p, x in leaves.items()}


def merge(graphdef: nnx.GraphDef, *trees: Mapping[str, Any]) -> LlavaMini:
  """A model from parameter dicts that share no path."""
  flat = {}
  for tree in trees:
    flat |= flatten(tree)
  return nnx.merge(graphdef, unflatten(flat))

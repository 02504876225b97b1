"""The training state, and the one pure step that advances it.

State is nested dicts of arrays: {step, params, frozen, opt}. Only `params`
reach the optimizer; gradients are never formed for `frozen`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.llava_mini import build
from llava_mini_jax.sharding import check_parameter, replicated, use_mesh
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.optimizer import assign_groups, make_optimizer
from llava_mini_jax.train.tree import abstract_model, flatten, merge, unflatten
from llava_mini_jax.types import Batch

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Everything compiled training needs. All functions are to be called under `use_mesh(mesh)`."""

  mesh: Mesh
  graphdef: nnx.GraphDef
  shardings: State  # NamedSharding of every leaf of the state
  abstract: State  # ShapeDtypeStruct with sharding of every leaf
  init: Callable[[jax.Array], State]  # key -> state, created sharded
  # (state, batch) -> (state, metrics {loss, accuracy, target_tokens, grad_norm, learning_rate}); donates the state.
  # grad_norm is before clipping, learning_rate that of the fastest group.
  step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def split_frozen(flat: dict[str, Any], rates: dict[str, float | None]) -> tuple[dict, dict]:
  """Flat parameters -> nested (trainable, frozen)."""
  trainable = {path: leaf for path, leaf in flat.items() if rates[path] is not None}
  return unflatten(trainable), unflatten({path: leaf for path, leaf in flat.items() if path not in trainable})


def make_trainer(
  config: LlavaMiniConfig,
  mesh: Mesh,
  *,
  groups: Sequence[tuple[str, float | str]],
  factor: optax.Schedule,
  **optimizer: float,
) -> Trainer:
  """Builds init and step for a model on a mesh; allocates no parameter.

  Args:
    groups: see `optimizer.assign_groups`. factor: learning-rate schedule of peak 1.
    optimizer: beta1, beta2, eps, weight_decay, max_grad_norm.
  Raises:
    ConfigError: a bad group table. MeshError: a parameter that does not divide over the mesh.
  """
  with use_mesh(mesh):
    graphdef, abstract_params = abstract_model(config)
    param_shardings = flatten(nnx.to_pure_dict(nnx.get_named_sharding(abstract_params, mesh)))
  for path, leaf in flatten(nnx.to_pure_dict(abstract_params)).items():
    check_parameter(path, leaf.shape, param_shardings[path])
  rates = assign_groups(param_shardings, groups)
  tx = make_optimizer(unflatten({p: r for p, r in rates.items() if r is not None}), factor, **optimizer)

  def init(key: jax.Array) -> State:
    flat = flatten(nnx.to_pure_dict(nnx.split(build(config, key))[1]))
    params, frozen = split_frozen(flat, rates)
    return dict(step=jnp.int32(0), params=params, frozen=frozen, opt=tx.init(params))

  peak_rate = max(rate for rate in rates.values() if rate is not None)
  with use_mesh(mesh):
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
  one = replicated(mesh)
  params_sh, frozen_sh = split_frozen(param_shardings, rates)
  opt_sh = optax.tree.map_params(tx, lambda _, s: s, shapes['opt'], params_sh, transform_non_params=lambda _: one)
  shardings = dict(step=one, params=params_sh, frozen=frozen_sh, opt=opt_sh)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, one))
  def step(state: State, batch: Batch):
    def loss_fn(params):
      logits = merge(graphdef, params, state['frozen'])(batch)
      return next_token_loss(logits, batch.targets, batch.loss_mask)

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
    updates, opt = tx.update(grads, state['opt'], state['params'])
    metrics |= dict(loss=loss, grad_norm=optax.tree.norm(grads), learning_rate=peak_rate * factor(state['step']))
    new = dict(state, step=state['step'] + 1, params=optax.apply_updates(state['params'], updates), opt=opt)
    return new, metrics

  return Trainer(mesh, graphdef, shardings, abstract, jax.jit(init, out_shardings=shardings), step)

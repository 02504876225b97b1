"""The training state, and the one pure step that advances it.

State is nested dicts of arrays: {step, params, frozen, opt, guard}. Only `params`
reach the optimizer; gradients are never formed for `frozen`. A step that the
guard skips changes `step` and `guard` alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.models.compressors.mqt import draw_kept
from llava_mini_jax.models.llava_mini import build
from llava_mini_jax.sharding import compiler_options, replicated, use_mesh
from llava_mini_jax.train.accumulation import gradients
from llava_mini_jax.train.guard import Guard, select
from llava_mini_jax.train.lora import Lora, abstract_adapters, abstract_base, attach, check_groups, draw_adapters
from llava_mini_jax.train.loss import head_loss
from llava_mini_jax.train.optimizer import assign_groups, make_optimizer
from llava_mini_jax.train.rounding import apply_updates
from llava_mini_jax.train.tree import flatten, merge, sharded_model, unflatten
from llava_mini_jax.types import Batch

State = dict[str, Any]

_NO_SPIKE_RULE = Guard()


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Everything compiled training needs. All functions are to be called under `use_mesh(mesh)`."""

  mesh: Mesh
  graphdef: nnx.GraphDef
  shardings: State  # NamedSharding of every leaf of the state
  abstract: State  # ShapeDtypeStruct with sharding of every leaf
  lora: Lora | None
  guard: Guard
  # (key, parameters by path) -> state, created sharded; holds the parameters given, and computes only the others.
  init: Callable[..., State]
  # (state, batch) -> (state, metrics {loss, accuracy, target_tokens, grad_norm, learning_rate, skipped}); donates the
  # state. And bad_samples, if the batch has them.
  # grad_norm is before clipping, learning_rate that of the fastest group, skipped 1 if the step changed nothing.
  step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def saved_part(trainer: Trainer, state: State) -> State:
  """What a checkpoint holds of the state (or of its shardings or shapes): with adapters, not what is frozen."""
  return {name: part for name, part in state.items() if name != 'frozen'} if trainer.lora else state


def split_frozen(flat: dict[str, Any], rates: dict[str, float | None]) -> tuple[dict, dict]:
  """Flat parameters -> nested (trainable, frozen)."""
  trainable = {path: leaf for path, leaf in flat.items() if rates[path] is not None}
  return unflatten(trainable), unflatten({path: leaf for path, leaf in flat.items() if path not in trainable})


def _init_optimizer(tx: optax.GradientTransformation, params: Any) -> Any:
  """In float32, whatever the parameters are."""
  return tx.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))


def _abstract_state(
  leaves: Mapping[str, jax.ShapeDtypeStruct],
  rates: dict[str, float | None],
  tx: optax.GradientTransformation,
  guard: Guard,
  mesh: Mesh,
) -> State:
  """Shape, dtype and sharding of every leaf of the state, from those of the parameters by path."""
  params, frozen = split_frozen(dict(leaves), rates)
  with use_mesh(mesh):
    opt = jax.eval_shape(functools.partial(_init_optimizer, tx), params)
  one = replicated(mesh)
  like_params = jax.tree.map(lambda leaf: leaf.sharding, params)
  where = optax.tree.map_params(tx, lambda _, s: s, opt, like_params, transform_non_params=lambda _: one)
  opt = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), opt, where)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
  return dict(step=step, params=params, frozen=frozen, opt=opt, guard=guard.abstract(one))


def _updated(
  tx: optax.GradientTransformation, state: State, grads: Any, ok: jax.Array, taken: jax.Array
) -> tuple[Any, Any]:
  """Parameters and optimizer after the step, or as they are if it is not ok."""
  updates, opt = tx.update(grads, state['opt'], state['params'])
  new = apply_updates(state['params'], updates, taken), opt
  return select(ok, new, (state['params'], state['opt']))


def make_trainer(
  config: LlavaMiniConfig,
  mesh: Mesh,
  *,
  groups: Sequence[tuple[str, float | str]],
  factor: optax.Schedule,
  lora: Lora | None = None,
  accumulate: int = 1,
  param_dtype: str = 'float32',
  guard: Guard = _NO_SPIKE_RULE,
  **optimizer: float,
) -> Trainer:
  """Builds init and step for a model on a mesh; allocates no parameter.

  Args:
    groups: see `optimizer.assign_groups`; adapters are parameters too. factor: learning-rate schedule of peak 1.
    accumulate: micro-steps of a step; see `accumulation.gradients`.
    param_dtype: of the parameters, see `rounding`; adapters and the optimizer's moments are float32.
    guard: what is skipped.
    optimizer: beta1, beta2, eps, weight_decay, max_grad_norm.
  Raises:
    ConfigError: a bad group table, or LoRA targets that cannot be. MeshError: a parameter that does not divide.
  """
  graphdef, leaves = sharded_model(config, mesh, jnp.dtype(param_dtype))
  adapters = abstract_adapters(leaves, lora) if lora else {}
  leaves |= adapters | (abstract_base(leaves, lora) if lora else {})
  rates = assign_groups(leaves, groups)
  check_groups(rates)
  tx = make_optimizer(unflatten({p: r for p, r in rates.items() if r is not None}), factor, **optimizer)

  peak_rate = max(rate for rate in rates.values() if rate is not None)
  abstract = _abstract_state(leaves, rates, tx, guard, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  def init(key: jax.Array, given: Mapping[str, jax.Array] | None = None) -> State:
    given = dict(given or {})
    fresh = {path: leaf.sharding for path, leaf in leaves.items() if path not in given}

    @functools.partial(jax.jit, out_shardings=fresh)
    def draw(key):  # the compiler drops what is not returned
      flat = flatten(nnx.to_pure_dict(nnx.split(build(config, key))[1]))
      flat |= draw_adapters(key, adapters)
      return {path: flat[path].astype(leaves[path].dtype) for path in fresh}

    params, frozen = split_frozen(given | draw(key), rates)
    opt = jax.jit(functools.partial(_init_optimizer, tx), out_shardings=shardings['opt'])(params)
    counters = dict(step=jnp.int32(0), guard=guard.initial())
    counters = jax.device_put(counters, {name: shardings[name] for name in counters})
    return counters | dict(params=params, frozen=frozen, opt=opt)

  @functools.partial(
    jax.jit,
    donate_argnums=0,
    out_shardings=(shardings, replicated(mesh)),
    compiler_options=compiler_options(mesh),
  )
  def step(state: State, batch: Batch):
    batch = draw_kept(config.compressor, batch, state['step'])

    def loss_fn(params, frozen, batch):
      flat = flatten(params) | flatten(frozen)
      model = merge(graphdef, attach(flat, lora.scale) if lora else flat)
      return head_loss(model.hidden(batch), model.decoder.head(), batch.targets, batch.loss_mask)

    parts = state['params'], state['frozen']
    (loss, metrics), grads = gradients(loss_fn, *parts, batch, accumulate, shardings['params'])
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    grad_norm = optax.tree.norm(grads)
    ok, counters = guard.judge(state['guard'], loss, grad_norm, metrics['target_tokens'])
    # Rounding, the schedule and Adam's bias go by the steps that counted: one that is skipped leaves no trace.
    taken = state['step'] - state['guard']['skipped']
    params, opt = _updated(tx, state, grads, ok, taken)
    if batch.bad_samples is not None:
      metrics |= dict(bad_samples=batch.bad_samples.sum())
    metrics |= dict(loss=loss, grad_norm=grad_norm, learning_rate=peak_rate * factor(taken))
    metrics |= dict(skipped=counters['skipped'] - state['guard']['skipped'])
    return dict(state, step=state['step'] + 1, params=params, opt=opt, guard=counters), metrics

  return Trainer(mesh, graphdef, shardings, abstract, lora, guard, init, step)

"""Gradients of a batch in micro-steps: the memory of a few rows, the numbers of all.

The loss is a mean over the target tokens of the whole batch, so each micro-batch counts by the target tokens it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.sharding import constrain
from llava_mini_jax.train.tree import flatten, unflatten
from llava_mini_jax.types import Batch


def gradients(
  loss_fn: Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]],
  params: Any,
  frozen: Any,
  batch: Batch,
  micro_steps: int,
  shardings: Any,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
  """What `jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch)` gives, a micro-batch at a time.

  Args:
    loss_fn: (params, frozen, batch) -> mean over its target tokens, {target_tokens, and other such means}.
    batch: its rows divide by `micro_steps`, and a micro-batch over the mesh. Micro-batch k has rows k, k + micro_steps,
      …: those of a device's share stay on it.
    shardings: of the gradients, as `params`.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if micro_steps == 1:
    return grad_fn(params, frozen, batch)
  total = jnp.maximum(batch.loss_mask.sum(dtype=jnp.float32), 1.0)

  def cut(x: jax.Array) -> jax.Array:
    x = x.reshape(len(x) // micro_steps, micro_steps, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, 'batch')

  def weighed(rows: Batch):
    (loss, metrics), grads = grad_fn(*_anew(params, frozen, rows))
    share = metrics['target_tokens'] / total
    means = {name: value for name, value in metrics.items() if name != 'target_tokens'}
    found = jax.tree.map(lambda x: share * x.astype(jnp.float32), (loss, means, grads))
    return found, metrics['target_tokens']

  def add(sums, rows: Batch):
    sums = jax.tree.map(jnp.add, sums, weighed(rows))
    (loss, means, grads), count = sums
    return ((loss, means, jax.lax.with_sharding_constraint(grads, shardings)), count), None

  micro_batches = jax.tree.map(cut, batch)
  zeros = jax.eval_shape(weighed, jax.tree.map(lambda x: x[0], micro_batches))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
  ((loss, means, grads), count), _ = jax.lax.scan(add, zeros, micro_batches)
  return (loss, means | dict(target_tokens=count)), grads


def _anew(params: Any, frozen: Any, rows: Batch) -> tuple[Any, Any, Batch]:
  """The same, but nothing that is computed of a single parameter alone outlives a micro-step.

  The embedding and the head would be gathered once, and stay in memory whole through all micro-steps. Stacks of layers
  are not held back: they are gathered layer by layer, and without fusion into their loops more of them is in memory.
  """
  parts = [flatten(part) for part in (params, frozen)]
  single = [{path: leaf for path, leaf in part.items() if '/layers/' not in path} for part in parts]
  single, rows = jax.lax.optimization_barrier((single, rows))
  params, frozen = (unflatten(part | held) for part, held in zip(parts, single, strict=True))
  return params, frozen, rows

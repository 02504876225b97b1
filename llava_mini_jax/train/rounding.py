"""bfloat16 parameters that take updates smaller than their resolution: rounded up or down at random, right on average.

A bfloat16 holds 8 significant bits, so that rounding to the nearest loses any update below 1/512 of a parameter. With
the probability of rounding up equal to the part that is lost, the expected value is exact (Gupta et al. 2015,
arXiv:1502.02551, Sec. 3.1).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 -> bfloat16: one of the two neighbours of each element; what is bfloat16, inf or nan already stays."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # a bfloat16 is the upper half of a float32
  rounded = jax.lax.bitcast_convert_type((bits + below) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def apply_updates(params: Any, updates: Any, step: jax.Array) -> Any:
  """params + updates, added in float32; random numbers depend on the step alone, not on the mesh.

  Args:
    params: float32 or bfloat16 leaves; only the latter are rounded. updates: float32, shaped alike. step: int32.
  """
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
  sums = [p.astype(jnp.float32) + u for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
  new = [
    round_at_random(x, key) if p.dtype == jnp.bfloat16 else x for p, x, key in zip(leaves, sums, keys, strict=True)
  ]
  return jax.tree.unflatten(treedef, new)

"""AdamW with one learning rate per parameter group; groups are a table of path patterns in the config.

The paper's Table 9 (LLM 1e-4, multimodal modules 1e-5, cosine, warm-up 0.03)
is such a table; so is which parameters train at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_mini_jax.config import ConfigError

FROZEN = 'frozen'
_VECTORS = ('weight', 'bias', 'class_embedding')  # norms, biases; a matrix is named after its projection


def assign_groups(paths: Iterable[str], groups: Sequence[tuple[str, float | str]]) -> dict[str, float | None]:
  """Learning rate of every parameter path, None = frozen.

  Args:
    paths: e.g. `decoder/layers/mlp/up_proj`.
    groups: (pattern, learning rate or 'frozen'); a pattern is a regular expression that must match the whole path,
      and the first that matches decides.
  Raises:
    ConfigError: a parameter matched by no pattern, a pattern that decides no parameter or is none,
      or a bad learning rate.
  """
  for pattern, rate in groups:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ConfigError(f'groups: {pattern!r} is not a regular expression: {error}') from error
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if rate != FROZEN and not (is_number and 0 < rate < float('inf')):
      raise ConfigError(f'groups: {pattern!r}: expected a positive learning rate or {FROZEN!r}; found {rate!r}')
  rates, used = {}, set()
  for path in paths:
    match = next((i for i, (pattern, _) in enumerate(groups) if re.fullmatch(pattern, path)), None)
    if match is None:
      raise ConfigError(f'groups: parameter {path} is matched by no pattern of {[p for p, _ in groups]}')
    used.add(match)
    rate = groups[match][1]
    rates[path] = None if rate == FROZEN else float(rate)
  idle = [pattern for i, (pattern, _) in enumerate(groups) if i not in used]
  if idle:
    raise ConfigError(f'groups: pattern(s) that decide no parameter: {", ".join(map(repr, idle))}')
  if not any(rate is not None for rate in rates.values()):
    raise ConfigError('groups: every parameter is frozen; nothing would train')
  return rates


def schedule(total_steps: int, warmup_ratio: float) -> optax.Schedule:
  """Linear warm-up over `warmup_ratio` of the steps, then cosine to 0; peak 1. Raises ConfigError for a bad ratio."""
  if not 0 <= warmup_ratio < 1:
    raise ConfigError(f'warmup_ratio: expected 0 <= ratio < 1; found {warmup_ratio}')
  warmup = min(round(total_steps * warmup_ratio), total_steps - 1)
  return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, total_steps)


def scale_by_group_rate(rates: Mapping[str, Any], factor: optax.Schedule) -> optax.GradientTransformation:
  """update -> -rate(path) · factor(step) · update. `rates` is a nested dict shaped like the parameters."""

  def update(updates, state, params=None):
    del params
    scale = factor(state.count)
    updates = jax.tree.map(lambda rate, u: jnp.asarray(-rate * scale, u.dtype) * u, rates, updates)
    return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def _decays(params: Mapping[str, Any]) -> Any:
  """Which parameters decay: by name, because stacked and per-head vectors have several axes too."""

  def decays(path, parameter):
    return parameter.ndim > 1 and not str(path[-1].key).endswith(_VECTORS)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
  rates: Mapping[str, Any],
  factor: optax.Schedule,
  *,
  beta1: float = 0.9,
  beta2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW over the trainable parameters; norms and biases do not decay.

  Args:
    rates: peak learning rate per parameter, a nested dict shaped like the trainable parameters.
    factor: step -> share of the peak.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.scale_by_adam(beta1, beta2, eps),
    optax.add_decayed_weights(weight_decay, mask=_decays),
    scale_by_group_rate(rates, factor),
  )

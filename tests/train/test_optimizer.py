"""Which parameter gets which rate, the shape of the schedule, and updates equal to torch's AdamW."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from small_model import quick_jit, small_config
from torch_parity import close

from llava_mini_jax.config import ConfigError
from llava_mini_jax.train.optimizer import assign_groups, make_optimizer, schedule
from llava_mini_jax.train.tree import flatten, parameter_shapes, unflatten

PATHS = ('decoder/embed_tokens', 'decoder/layers/mlp/up_proj', 'projector/linear_1/kernel', 'vision/class_embedding')


def test_the_first_pattern_that_matches_decides():
  groups = (('vision/.*', 'frozen'), ('decoder/embed_tokens', 3e-5), ('decoder/.*', 1e-4), ('.*', 1))
  assert assign_groups(PATHS, groups) == {PATHS[0]: 3e-5, PATHS[1]: 1e-4, PATHS[2]: 1.0, PATHS[3]: None}


@pytest.mark.parametrize(
  ('groups', 'message'),
  [
    (
      (('decoder/.*', 1e-4), ('vision/.*', 'frozen')),
      "groups: parameter projector/linear_1/kernel is matched by no pattern of ['decoder/.*', 'vision/.*']",
    ),
    # A pattern must match the whole path.
    (
      (('decoder/layers', 1e-4),),
      "groups: parameter decoder/embed_tokens is matched by no pattern of ['decoder/layers']",
    ),
    (
      (('prefuson/.*', 1e-5), ('(compressor|query)/.*', 1e-5), ('.*', 1e-4)),
      "groups: pattern(s) that decide no parameter: 'prefuson/.*', '(compressor|query)/.*'",
    ),
    (
      (('decoder/.*', 1e-4), ('decoder/embed_tokens', 'frozen'), ('.*', 1e-5)),  # shadowed by the first
      "groups: pattern(s) that decide no parameter: 'decoder/embed_tokens'",
    ),
    ((('.*', 'frozen'),), 'groups: every parameter is frozen; nothing would train'),
    *(
      ((('.*', rate),), f"groups: '.*': expected a positive learning rate or 'frozen'; found {rate!r}")
      for rate in (0, -1e-4, float('nan'), float('inf'), 'Frozen', None, True)
    ),
  ],
)
def test_tables_that_cannot_be_meant(groups, message):
  with pytest.raises(ConfigError, match=f'^{re.escape(message)}$'):
    assign_groups(PATHS, groups)


def test_schedule_warms_up_to_its_peak_and_falls_to_zero_along_a_cosine():
  factor = schedule(total_steps=110, warmup_ratio=0.1)  # 11 steps of warm-up
  values = np.asarray([factor(step) for step in range(111)])
  np.testing.assert_allclose(values[:12], np.arange(12) / 11, atol=1e-6)
  expected = (1 + np.cos(np.pi * np.arange(100) / 99)) / 2
  np.testing.assert_allclose(values[11:], expected, atol=1e-6)
  assert values[0] == 0 and values[11] == values.max() == 1 and abs(values[110]) < 1e-7


def test_schedule_without_warm_up_starts_at_its_peak():
  for total, ratio in ((10, 0.0), (10, 0.03)):  # 0.3 of a step rounds to none
    factor = schedule(total, ratio)
    assert factor(0) == 1 and abs(factor(total)) < 1e-7
    assert abs(factor(total // 2) - 0.5) < 1e-6


@pytest.mark.parametrize('ratio', [-0.1, 1.0, float('nan')])
def test_schedule_of_a_bad_ratio(ratio):
  with pytest.raises(ConfigError, match=f'^warmup_ratio: expected 0 <= ratio < 1; found {ratio}$'):
    schedule(10, ratio)


@pytest.mark.parametrize('total', [1, 2, 3])
def test_the_shortest_runs_have_a_schedule(total):
  """Warm-up may round up to the whole run."""
  for ratio in (0.0, 0.03, 0.6, 0.9):
    values = np.asarray([schedule(total, ratio)(step) for step in range(total)])
    assert ((values >= 0) & (values <= 1)).all()


SHAPES = {'fast/kernel': (5, 3), 'fast/bias': (3,), 'slow/kernel': (3, 4), 'slow/scale': (4,)}
RATES = {'fast': 3e-2, 'slow': 5e-3}
STEPS, DECAY, CLIP = 8, 0.1, 1.0


@pytest.fixture(scope='module')
def gradients() -> list[dict[str, np.ndarray]]:
  """Of norms above and below the limit in turn."""
  rng = np.random.default_rng(0)
  return [
    {path: (rng.normal(size=shape) * (3.0 if step % 2 else 0.05)).astype(np.float32) for path, shape in SHAPES.items()}
    for step in range(STEPS)
  ]


def test_updates_equal_torch_adamw(gradients):
  """Two groups, a schedule, clipping of the whole gradient, and decay of matrices only: parameters after each step."""
  rng = np.random.default_rng(1)
  start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
  factor = schedule(STEPS, 0.25)

  theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
  adamw = torch.optim.AdamW(
    [
      dict(params=[p], peak=RATES[path.split('/')[0]], weight_decay=DECAY if p.ndim > 1 else 0.0)
      for path, p in theirs.items()
    ],
    betas=(0.9, 0.95),
    eps=1e-6,
  )
  rates = unflatten({path: RATES[path.split('/')[0]] for path in SHAPES})
  tx = make_optimizer(rates, factor, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=DECAY, max_grad_norm=CLIP)
  params = unflatten({path: jnp.asarray(value) for path, value in start.items()})
  state = tx.init(params)

  @quick_jit
  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  norms = []
  for step, grads in enumerate(gradients):
    for group in adamw.param_groups:
      group['lr'] = group['peak'] * float(factor(step))
    for path, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[path])
    norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), CLIP)))
    adamw.step()
    params, state = update(unflatten(grads), state, params)
    for path, ours in flatten(params).items():
      close(ours, theirs[path].detach().numpy(), f'step {step}: {path}', 1e-6)
  assert min(norms) < CLIP < max(norms)
  assert all(np.abs(np.asarray(ours) - start[path]).max() > 1e-2 for path, ours in flatten(params).items())


def test_every_group_moves_by_its_own_rate(gradients):
  """With the same gradient everywhere, Adam's first step is as long as the rate."""
  rates = unflatten({path: RATES[path.split('/')[0]] for path in SHAPES})
  tx = make_optimizer(rates, optax.constant_schedule(0.5))
  params = unflatten({path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()})
  grads = jax.tree.map(lambda p: np.full(p.shape, 0.01, np.float32), params)
  updates, _ = tx.update(grads, tx.init(params), params)
  for path, step in flatten(updates).items():
    np.testing.assert_allclose(step, -0.5 * RATES[path.split('/')[0]], rtol=1e-5)


def test_no_norm_and_no_bias_of_the_model_decays():
  """Layers are stacked and heads kept apart, so their norms and biases have two axes and more."""
  shapes = parameter_shapes(small_config())
  params = unflatten({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
  tx = make_optimizer(jax.tree.map(lambda _: 1.0, params), lambda step: np.float32(1), weight_decay=0.5)
  updates = quick_jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0])(
    params
  )
  decayed = {path for path, step in flatten(updates).items() if np.asarray(step).any()}
  vectors = {path for path in shapes if path.endswith(('/weight', 'bias', 'class_embedding'))}
  assert len(vectors) > 20 and 'decoder/layers/input_layernorm/weight' in vectors
  assert decayed == shapes.keys() - vectors

"""The last layer of pre-fusion computes what is read, and that is what it would have been."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import quick_jit, random_params, small_config, structure
from torch_parity import close

from llava_mini_jax.config import ScanConfig
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.train.tree import merge, unflatten

ROWS, LENGTH = 2, 21
TOLERANCE = 2e-5


def case(*, layers: int, attention: str = 'jnp', scan: ScanConfig | None = None):
  config = small_config(prefusion=dict(num_layers=layers), attention=attention, scan=scan or ScanConfig(remat='none'))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, LENGTH, config.decoder.hidden_size)).astype(np.float32)
  valid = np.ones((ROWS, LENGTH), bool)
  valid[1, [4, 18]] = False
  branches = np.zeros((ROWS, LENGTH), np.int32)
  branches[:, -4:] = 1, 1, 2, 2
  params = {path: value for path, value in random_params(config).items() if path.startswith('prefusion/')}
  others = {path: value for path, value in random_params(config).items() if path not in params}

  def prefusion(params) -> LlavaMini:
    return merge(structure(config), unflatten({**others, **params})).prefusion

  return prefusion, params, x, valid, branches


@pytest.mark.parametrize('last', [1, 5, LENGTH])
@pytest.mark.parametrize(
  ('layers', 'attention', 'scan', 'branched'),
  [
    (1, 'jnp', None, False),
    (1, 'jnp', ScanConfig(remat='none', unroll=True), False),
    (3, 'jnp', ScanConfig(remat='dots'), True),
    (3, 'jnp', ScanConfig(remat='full', unroll=True), False),
    (2, 'splash', ScanConfig(remat='attention'), False),
  ],
)
def test_the_last_slots_are_those_of_all(layers, attention, scan, branched, last):
  """Values, and gradients of every weight and of the input."""
  prefusion, params, x, valid, branches = case(layers=layers, attention=attention, scan=scan)
  real = valid[:, LENGTH - last :, None]

  def found(**options):
    def loss(params, x):
      y = prefusion(params)(x, valid, branches if branched else None, **options)
      y = y[:, y.shape[1] - last :] * real
      return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    (_, y), grads = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, grads

  (ours, (of_params, of_x)), (theirs, (all_params, all_x)) = found(last=last), found()
  assert ours.shape == (ROWS, last, x.shape[2])
  close(ours, theirs, 'output', TOLERANCE)
  for path, expected in {**all_params, 'x': all_x}.items():
    grad = of_x if path == 'x' else of_params[path]
    close(grad, expected, path, TOLERANCE * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize(
  ('layers', 'attention', 'scan'),
  [(1, 'jnp', None), (3, 'jnp', ScanConfig(remat='none', unroll=True)), (3, 'splash', ScanConfig(remat='full'))],
)
def test_what_is_seen_once_is_what_is_seen_with_text(layers, attention, scan):
  prefusion, params, x, _, _ = case(layers=layers, attention=attention, scan=scan)
  vision, text = x[:, :16], x[:, 16:]

  def apart(params):
    model = prefusion(params)
    last, keys, values = model.see(vision, 3)
    return last, model.read(text, keys, values)

  together = quick_jit(lambda params: prefusion(params)(x, np.ones((ROWS, LENGTH), bool)))(params)
  last, fused = quick_jit(apart)(params)
  close(last, together[:, 13:16], 'vision', TOLERANCE)
  close(fused, together[:, 16:], 'text', TOLERANCE)


def test_nothing_may_be_wanted_but_keys_and_values():
  prefusion, params, x, valid, _ = case(layers=2)
  module = prefusion(params)
  assert module(x, valid, last=0).shape == (ROWS, 0, x.shape[2])
  (none, keys, values), (_, *others) = (module.see(x, last) for last in (0, LENGTH))
  assert none.shape == (ROWS, 0, x.shape[2])
  for ours, theirs in zip((keys, values), others, strict=True):
    close(ours, theirs, 'keys and values', TOLERANCE)
  with pytest.raises(ValueError, match='^pre-fusion: expected all slots with return_hidden; found last=3$'):
    module(x, valid, last=3, return_hidden=True)

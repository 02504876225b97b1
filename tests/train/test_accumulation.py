"""A batch in micro-steps: the numbers of the batch as a whole, on one device and on eight."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config

from llava_mini_jax.config import ConfigError
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.sharding import MeshError, batch_sharding, check_batch, make_mesh, use_mesh
from llava_mini_jax.train.accumulation import gradients
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten, unflatten

CONFIG = small_config(vision=dict(num_hidden_layers=2), prefusion=dict(num_layers=1), decoder=dict(num_hidden_layers=1))
ROWS, LENGTH = 16, 24


@pytest.fixture(scope='module')
def batch():
  """Rows with 0 to 9 target tokens, so that micro-batches have different numbers; images, videos and text."""
  kinds = (dict(), dict(text=(6,), visuals=()), dict(text=(2, 2, 3), visuals=(1, 1)))
  samples = [random_sample(CONFIG, row, answer=row * row % 10, **kinds[row % 3]) for row in range(ROWS)]
  return lay_out(CONFIG, samples, length=LENGTH, visuals=2, fused_text=8)


def loss_fn(params, frozen, batch):
  """A model of two matrices and a number."""
  logits = jnp.tanh(frozen['scale'] * params['embed'][batch.tokens]) @ params['head']
  return next_token_loss(logits, batch.targets, batch.loss_mask)


PARAMS = {name: np.random.default_rng(i).normal(size=(64, 64)).astype('f') for i, name in enumerate(('embed', 'head'))}
FROZEN = dict(scale=np.float32(0.7))


def in_steps(batch, shape, micro_steps: int):
  """Loss, metrics and gradients; and the program."""
  mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
  shardings = dict.fromkeys(PARAMS, where)
  with use_mesh(mesh):
    program = quick_jit(lambda params, batch: gradients(loss_fn, params, FROZEN, batch, micro_steps, shardings))
    arguments = jax.device_put(PARAMS, shardings), jax.device_put(batch, batch_sharding(mesh))
    compiled = program.lower(*arguments).compile()
    return jax.device_get(compiled(*arguments)), compiled


def check(batch, shape, micro_steps: int) -> None:
  """Loss, metrics and gradients are those of the batch at once."""
  (loss, metrics), expected = jax.device_get(jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, FROZEN, batch))
  ((found, others), grads), _ = in_steps(batch, shape, micro_steps)
  assert abs(found - loss) <= 1e-6 * loss
  assert others.keys() == metrics.keys()
  for name, value in metrics.items():
    assert abs(others[name] - value) <= 1e-6 * max(1, value), name
  for name, grad in expected.items():
    assert np.abs(grads[name] - grad).max() <= 1e-6, name


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 4, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize('micro_steps', [1, 2])
def test_the_numbers_of_the_whole_batch(batch, shape, micro_steps):
  """With as many target tokens in one micro-step as in another, and with ten times as many."""
  for few in (False, True):
    rows = batch
    if few:
      mask = batch.loss_mask & ((np.arange(ROWS) % 2 == 0) | (np.arange(ROWS) == 5))[:, None]
      rows = dataclasses.replace(batch, loss_mask=mask)
    check(rows, shape, micro_steps)


def test_every_row_a_step_and_no_target_at_all(batch):
  check(batch, (1, 1, 1), ROWS)


def test_rows_of_text_alone():
  """Whose arrays of images are empty."""
  samples = [random_sample(CONFIG, row, text=(6,), visuals=(), answer=row) for row in range(ROWS)]
  batch = lay_out(CONFIG, samples, length=LENGTH, visuals=0, fused_text=0)
  assert batch.pixels.size == 0
  check(batch, (1, 4, 1), 2)


def test_rows_stay_on_their_device(batch):
  """Nothing of the batch moves: what devices exchange are sums, and parameters where these are sharded."""
  _, compiled = in_steps(batch, (8, 1, 1), 2)
  found = re.findall(r'(all-to-all|collective-permute|all-gather)(?:-start)?\(', compiled.as_text())
  assert not found, found


def test_what_is_gathered_is_not_kept(batch):
  """The one parameter of a loss is needed whole, is gathered by each micro-step, and is not in memory between them."""
  _, compiled = in_steps(batch, (1, 8, 1), 2)
  loops = re.findall(r'^.* while\(', compiled.as_text(), re.M)
  assert loops and not any('[64,64]' in loop for loop in loops), loops


def test_a_step_of_the_model(batch):
  """The whole model, with what varies over its micro-batches."""
  found = []
  for micro_steps in (1, 4):
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    trainer = make_trainer(
      CONFIG,
      mesh,
      groups=(('vision/.*', 'frozen'), ('.*', 1.0)),
      factor=optax.constant_schedule(0.0),
      accumulate=micro_steps,
      beta1=0.0,
      max_grad_norm=1e9,
    )
    flat = random_params(CONFIG)
    with use_mesh(mesh):
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trainer.abstract)
      parts = {part: unflatten({p: flat[p] for p in flatten(zeros[part])}) for part in ('params', 'frozen')}
      compiled = trainer.step.lower(trainer.abstract, batch).compile(dict(xla_backend_optimization_level=0))
      state, metrics = compiled(jax.device_put(zeros | parts, trainer.shardings), batch)
    found.append((jax.device_get(metrics), {p: np.asarray(leaf) for p, leaf in flatten(state['opt'][1].mu).items()}))
  (metrics, expected), (others, grads) = found
  for name, value in metrics.items():
    assert abs(others[name] - value) <= 1e-6 * max(1, abs(value)), name
  norm = np.sqrt(sum(np.square(grad.astype(np.float64)).sum() for grad in expected.values()))
  for path, grad in expected.items():
    assert np.linalg.norm(grads[path] - grad) <= 1e-6 * norm, path


def test_what_does_not_divide():
  mesh = make_mesh((2, 2, 2))
  check_batch(16, mesh, 4)
  with pytest.raises(MeshError, match='^batch size 8 is not a multiple of data × fsdp = 4 times 4 micro-steps$'):
    check_batch(8, mesh, 4)
  with pytest.raises(ConfigError, match='^TrainConfig.accumulate: expected a positive integer; found 0$'):
    TrainConfig(accumulate=0)

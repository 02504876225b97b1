"""Updates below the resolution of bfloat16 are neither lost nor biased, on any mesh."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import experiment, make_dataset

from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.tensor_files import TensorFiles
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.rounding import apply_updates, round_at_random
from llava_mini_jax.train.tree import flatten

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_one_of_the_two_neighbours_in_proportion():
  """Of 1 + k/8 units in the last place: k/8 of the samples round up, within five standard deviations."""
  unit, count = 2.0**-7, 20000
  for sign in (1.0, -1.0):
    for k in range(8):
      found = np.asarray(round_at_random(jnp.full(count, sign * (1 + unit * k / 8)), jax.random.key(k)), np.float32)
      up = abs(found) == 1 + unit
      assert (up | (abs(found) == 1)).all()
      assert abs(up.mean() - k / 8) <= 5 * np.sqrt(k / 8 * (1 - k / 8) / count)


def test_what_is_exact_stays():
  bits = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  found = np.asarray(round_at_random(jnp.asarray(bits.astype(np.float32)), jax.random.key(0)))
  number = ~np.isnan(bits.astype(np.float32))
  normal = number & (np.abs(bits.astype(np.float32)) >= 2.0**-126) | (bits == 0)  # CPUs flush smaller ones to zero
  np.testing.assert_array_equal(found[normal].view(np.uint16), bits[normal].view(np.uint16))
  assert np.isnan(found[~number].astype(np.float32)).all()


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 8, 1)])
def test_tiny_updates_add_up(shape):
  """1,000 updates of 1/40 of the spacing: nearest rounding stays where it was, at random it arrives."""
  count, steps, update = 1024, 1000, 2.0**-7 / 40
  mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
  where = NamedSharding(mesh, PartitionSpec('fsdp'))
  start = {'half': jnp.ones(count, jnp.bfloat16), 'single': jnp.ones(count)}
  start = jax.tree.map(lambda x: jax.device_put(x, where), start)
  updates = jax.tree.map(lambda x: jnp.full(x.shape, update, jnp.float32), start)

  @jax.jit
  def run(params):
    return jax.lax.fori_loop(0, steps, lambda step, params: apply_updates(params, updates, step), params)

  found = jax.tree.map(lambda x: np.asarray(x, np.float32), run(start))
  expected = 1 + steps * update
  assert jnp.ones((), jnp.bfloat16) + jnp.asarray(update, jnp.bfloat16) == 1
  assert found['single'] == pytest.approx(expected, abs=1e-4)
  spread = 2.0**-7 * np.sqrt(steps * (1 / 40) * (39 / 40))  # of one element
  assert abs(found['half'].mean() - expected) <= 5 * spread / np.sqrt(count)
  if shape == (1, 1, 1):
    assert 0.5 * spread < found['half'].std() < 2 * spread


def test_the_mesh_does_not_matter():
  x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
  mesh = make_mesh((1, 4, 2))
  put = jax.device_put(x, NamedSharding(mesh, PartitionSpec('fsdp', 'tensor')))
  step = jax.jit(lambda p, u: apply_updates({'a': p}, {'a': u}, jnp.int32(3))['a'])
  half = step(put.astype(jnp.bfloat16), put * 0.001)
  np.testing.assert_array_equal(half, step(jnp.asarray(x).astype(jnp.bfloat16), jnp.asarray(x) * 0.001))


@pytest.mark.slow
def test_a_run_in_bfloat16(tmp_path, tmp_path_factory):
  """Parameters are bfloat16 in the checkpoint, moments float32; the run goes on exactly; an export says its dtype."""
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  run = experiment(dataset, max_steps=4, param_dtype='bfloat16', save_every=2, log_every=1)
  compressor = dataclasses.replace(run.model.compressor, num_heads=8)  # as the released layout has it
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, compressor=compressor))
  train(run, tmp_path / 'run')
  with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
    stored = checkpoints.stored_parameters()
  assert {leaf.dtype for leaf in stored.values()} == {jnp.dtype(jnp.bfloat16)}
  shutil.copytree(tmp_path / 'run', tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '4')
  train(run, tmp_path / 'again')
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  runs = [flatten(load_run(tmp_path / name, mesh).params) for name in ('run', 'again')]
  for path, leaf in runs[0].items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(leaf, runs[1][path])
  for dtype, code in (('float32', 'F32'), ('bfloat16', 'BF16')):
    config = export_model(tmp_path / 'run', tmp_path / dtype, dtype=dtype)
    files = TensorFiles(tmp_path / dtype)
    assert config['torch_dtype'] == dtype and {stored.dtype for stored in files.tensors.values()} == {code}
    found = np.asarray(files.read('model.norm.weight'), np.float32)
    np.testing.assert_array_equal(found, runs[0]['decoder/norm/weight'])

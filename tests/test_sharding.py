"""Eight emulated devices in any mesh train as one does; what is sharded, frozen, donated and compiled."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from small_model import lay_out, random_params, random_sample, small_config
from torch_parity import close

from llava_mini_jax import sharding
from llava_mini_jax.config import LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.sharding import MeshError, batch_sharding, check_batch, constrain, make_mesh, spec, use_mesh
from llava_mini_jax.train.step import State, Trainer, make_trainer
from llava_mini_jax.train.tree import flatten
from llava_mini_jax.types import Batch

# Every axis that `tensor` may split has a multiple of eight.
CONFIG = small_config(
  vision=dict(num_attention_heads=8),
  compressor=dict(num_heads=8, grid=2),
  prefusion=dict(num_layers=1),
  decoder=dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=8, head_dim=4),
)
GROUPS = (('vision/.*', 'frozen'), ('decoder/embed_tokens', 'frozen'), ('decoder/.*', 3e-3), ('.*', 1e-3))
MESHES = [(2, 2, 2), (1, 2, 4)]
ALONG_ONE_AXIS = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8))]
STEPS, ROWS = 4, 8


pytestmark = pytest.mark.usefixtures('quick_compilation')


def trainer_on(shape: tuple[int, int, int], devices=None, config: LlavaMiniConfig = CONFIG) -> Trainer:
  factor = optax.warmup_cosine_decay_schedule(0.5, 1.0, 2, STEPS + 1)
  return make_trainer(config, make_mesh(shape, devices), groups=GROUPS, factor=factor, weight_decay=0.1)


def initial_state(trainer: Trainer) -> State:
  """Random parameters, the same on every mesh, and an optimizer that has seen nothing."""
  params = random_params(CONFIG)

  def value(path, leaf):
    keys = [key.key for key in path if hasattr(key, 'key')]
    return params['/'.join(keys[1:])] if keys[0] in ('params', 'frozen') else np.zeros(leaf.shape, leaf.dtype)

  return jax.device_put(jax.tree_util.tree_map_with_path(value, trainer.abstract), trainer.shardings)


@pytest.fixture(scope='module')
def batches() -> list[Batch]:
  """Images, videos and text in every batch."""
  kinds = (dict(), dict(text=(6,), visuals=()), dict(text=(2, 2, 3), visuals=(1, 1)), dict(text=(1, 5), visuals=(2,)))
  return [
    lay_out(
      CONFIG,
      [random_sample(CONFIG, ROWS * step + row, **kinds[row % len(kinds)]) for row in range(ROWS)],
      length=20,
      visuals=2,
      fused_text=8,
    )
    for step in range(STEPS)
  ]


@dataclasses.dataclass
class Run:
  trainer: Trainer
  first: State  # its leaves were donated
  before: dict[str, np.ndarray]  # parameters before the first step
  state: State
  metrics: list[dict[str, float]]


def train(trainer: Trainer, batches: list[Batch]) -> Run:
  with use_mesh(trainer.mesh):
    first = state = initial_state(trainer)
    before = jax.tree.map(np.array, parameters(state))
    metrics = []
    for batch in batches:
      state, step = trainer.step(state, jax.device_put(batch, batch_sharding(trainer.mesh)))
      metrics.append({name: float(value) for name, value in step.items()})
  return Run(trainer, first, before, state, metrics)


def parameters(state: State) -> dict[str, jax.Array]:
  return flatten(state['params']) | flatten(state['frozen'])


@pytest.fixture(scope='module')
def one_device(batches) -> Run:
  return train(trainer_on((1, 1, 1), jax.devices()[:1]), batches)


@pytest.fixture(scope='module', params=[*MESHES, *ALONG_ONE_AXIS], ids=lambda shape: 'x'.join(map(str, shape)))
def run(request, batches) -> Run:
  return train(trainer_on(request.param), batches)


def test_training_equals_that_on_one_device(run, one_device):
  assert run.trainer.mesh.size == 8
  for step, (ours, expected) in enumerate(zip(run.metrics, one_device.metrics, strict=True)):
    names = {'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate', 'skipped'}
    assert ours.keys() == expected.keys() == names
    assert abs(ours['loss'] - expected['loss']) <= 1e-5, f'step {step}: {ours["loss"]} != {expected["loss"]}'
    assert abs(ours['grad_norm'] - expected['grad_norm']) <= 1e-4 * expected['grad_norm']
    for name in ('accuracy', 'target_tokens', 'learning_rate'):
      assert ours[name] == pytest.approx(expected[name], rel=1e-6), name


def test_the_run_that_others_are_compared_with_learns(one_device, batches):
  losses = [metrics['loss'] for metrics in one_device.metrics]
  assert len(set(losses)) == STEPS and np.isfinite(losses).all()
  assert [m['target_tokens'] for m in one_device.metrics] == [b.loss_mask.sum() for b in batches]
  np.testing.assert_allclose(
    [m['learning_rate'] for m in one_device.metrics], 3e-3 * np.array([0.5, 0.75, 1.0, 0.75]), rtol=1e-5
  )
  assert int(one_device.state['step']) == STEPS


def test_every_device_holds_its_part_alone(run):
  """Of parameters and of both moments of the optimizer, before and after training."""
  data, fsdp, tensor = (run.trainer.mesh.shape[axis] for axis in sharding.MESH_AXES)
  f, t = fsdp, tensor
  expected = {
    'vision/layers/self_attn/q_proj': (2, 32 // f, 8 // t, 4),
    'vision/layers/fc2/kernel': (2, 48 // t, 32 // f),
    'projector/linear_1/kernel': (32 // f, 32 // t),
    'projector/linear_2/kernel': (32 // t, 32 // f),
    'compressor/query': (4, 32),
    'compressor/out_proj': (8 // t, 4, 32 // f),
    'prefusion/layers/self_attn/o_proj': (1, 8 // t, 4, 32 // f),
    'decoder/embed_tokens': (64 // t, 32 // f),
    'decoder/layers/mlp/up_proj': (2, 32 // f, 40 // t),
    'decoder/layers/input_layernorm/weight': (2, 32),
    'decoder/lm_head': (32 // f, 64 // t),
  }
  with use_mesh(run.trainer.mesh):
    fresh = initial_state(run.trainer)
  for state in (fresh, run.state):
    params = parameters(state)
    for path, shape in expected.items():
      assert {shard.data.shape for shard in params[path].addressable_shards} == {shape}, path
    adam = state['opt'][1]
    for moment in (adam.mu, adam.nu):
      for path, leaf in flatten(moment).items():
        assert leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim), path
  assert data * f * t == 8


def test_what_is_frozen_stays_and_has_no_optimizer_state(run):
  frozen, trained = flatten(run.state['frozen']), flatten(run.state['params'])
  assert set(frozen) == {path for path in run.before if path.startswith('vision/') or path == 'decoder/embed_tokens'}
  assert frozen.keys() | trained.keys() == run.before.keys() and not frozen.keys() & trained.keys()
  for path, leaf in frozen.items():
    np.testing.assert_array_equal(leaf, run.before[path], err_msg=path)
  for path, leaf in trained.items():
    assert np.abs(np.asarray(leaf) - run.before[path]).max() > 1e-6, path
  adam = run.state['opt'][1]
  assert flatten(adam.mu).keys() == flatten(adam.nu).keys() == trained.keys()
  moments = sum(leaf.size for leaf in jax.tree.leaves(run.state['opt']))
  assert moments == 2 * sum(leaf.size for leaf in trained.values()) + 2  # and two counters


def test_the_state_is_donated(run):
  """Nothing of the first state is left: a step needs the memory of one state, not of two."""
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run.first))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))


def test_several_steps_compile_once(run, one_device):
  assert run.trainer.step._cache_size() == one_device.trainer.step._cache_size() == 1


def test_the_state_keeps_its_promised_shapes_and_shardings(run):
  promised = jax.tree.leaves(run.trainer.abstract)
  for leaf, abstract in zip(jax.tree.leaves(run.state), promised, strict=True):
    assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


def test_initial_parameters_do_not_depend_on_the_mesh():
  config = dataclasses.replace(CONFIG, prefusion=PrefusionConfig(num_layers=0))
  states = []
  for trainer in (trainer_on((1, 1, 1), jax.devices()[:1], config), trainer_on((2, 2, 2), None, config)):
    with use_mesh(trainer.mesh):
      states.append(trainer.init(jax.random.key(3)))
  one, many = states
  for path, leaf in parameters(many).items():
    close(leaf, parameters(one)[path], path, 1e-6)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(many['opt']))
  for leaf, abstract in zip(jax.tree.leaves(many), jax.tree.leaves(trainer.abstract), strict=True):
    assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


# ------------------------------------------------------------------------------------------------ meshes and rules


@pytest.mark.parametrize(
  ('shape', 'sizes'), [(None, (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((1, 2, 4), (1, 2, 4))]
)
def test_mesh_sizes(shape, sizes):
  mesh = make_mesh(shape)
  assert mesh.axis_names == ('data', 'fsdp', 'tensor') and mesh.devices.shape == sizes


def test_mesh_of_some_devices():
  mesh = make_mesh((1, -1, 1), jax.devices()[2:5])
  assert mesh.devices.ravel().tolist() == jax.devices()[2:5]


EXPECTED = 'mesh: expected sizes of data × fsdp × tensor, one of which may be -1; found '


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((3, 1, 1), 'mesh 3 × 1 × 1 does not cover 8 device(s)'),
    ((2, 2, 4), 'mesh 2 × 2 × 4 does not cover 8 device(s)'),
    ((3, -1, 1), 'mesh 3 × -1 × 1 does not cover 8 device(s)'),
    ((16, -1, 1), 'mesh 16 × -1 × 1 does not cover 8 device(s)'),
    ((8, 1), EXPECTED + '(8, 1)'),
    ((-1, -1, 2), EXPECTED + '(-1, -1, 2)'),
    ((8, 1, 0), EXPECTED + '(8, 1, 0)'),
    ((-2, 2, 2), EXPECTED + '(-2, 2, 2)'),
    ((), EXPECTED + '()'),
  ],
)
def test_meshes_that_do_not_fit(shape, message):
  with pytest.raises(MeshError, match=f'^{re.escape(message)}$'):
    make_mesh(shape)


def test_parameters_that_do_not_fit():
  config = small_config(compressor=dict(num_heads=4))
  message = (
    "parameter compressor/k_proj: shape (32, 4, 8) does not divide as ('fsdp', 'tensor', None) "
    "over mesh {'data': 1, 'fsdp': 1, 'tensor': 8}"
  )
  with pytest.raises(MeshError) as error:
    make_trainer(config, make_mesh((1, 1, 8)), groups=(('.*', 1.0),), factor=lambda step: 1.0)
  assert str(error.value) == message


def test_batches_that_do_not_fit():
  mesh = make_mesh((2, 2, 2))
  check_batch(8, mesh)
  with pytest.raises(MeshError, match=r'^batch size 6 is not a multiple of data × fsdp = 4$'):
    check_batch(6, mesh)


def test_a_row_lies_on_one_group_of_devices(batches):
  mesh = make_mesh((2, 2, 2))
  tokens = jax.device_put(batches[0], batch_sharding(mesh)).tokens
  rows = [shard.index[0].indices(ROWS)[:2] for shard in tokens.addressable_shards]
  assert sorted(rows) == [(r, r + 2) for r in (0, 2, 4, 6) for _ in range(2)]


def test_logical_axes():
  assert spec('batch', None, 'act_mlp') == PartitionSpec(('data', 'fsdp'), None, 'tensor')
  with pytest.raises(KeyError, match='bach'):
    spec('bach')


def test_constrain_acts_inside_a_mesh_alone():
  x = jnp.ones((8, 4))
  assert constrain(x, 'batch', None) is x
  mesh = make_mesh((2, 2, 2))
  with use_mesh(mesh):
    y = jax.jit(lambda x: constrain(x, 'batch', 'act_mlp'))(x)
  assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}

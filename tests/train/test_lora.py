"""LoRA: what it computes, what trains, what a checkpoint holds, and what everything else makes of such a run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import optax
import pytest
import torch
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, structure
from tiny_run import MODEL, experiment, make_dataset
from torch_parity import close

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.names import RELEASED
from llava_mini_jax.convert.run_parameters import open_parameters
from llava_mini_jax.convert.run_weights import weights_fingerprint
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import batch_sharding, make_mesh, use_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import CheckpointError
from llava_mini_jax.train.fingerprint import fingerprint_on_host, fingerprints
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.lora import Lora, adapted_paths, adapter_names, attach
from llava_mini_jax.train.step import Trainer, make_trainer
from llava_mini_jax.train.tree import flatten, merge, unflatten

# Every axis that `tensor` may split has a multiple of four.
CONFIG = small_config(
  vision=dict(num_attention_heads=4),
  prefusion=dict(num_layers=1),
  decoder=dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=4),
  scan=dict(remat='full'),
)
TARGETS = (
  '(decoder|prefusion)/layers/self_attn/[qkvo]_proj',
  'decoder/layers/mlp/.*_proj',
  'projector/linear_1/kernel',
)
LORA = Lora(rank=3, alpha=6.0, targets=TARGETS)
GROUPS = (('lora/.*', 3e-3), ('(decoder|prefusion|vision|projector/linear_1)/.*', 'frozen'), ('.*', 1e-3))
KERNELS = [
  *(f'{module}/layers/self_attn/{name}_proj' for module in ('decoder', 'prefusion') for name in 'qkvo'),
  *(f'decoder/layers/mlp/{name}_proj' for name in ('gate', 'up', 'down')),
  'projector/linear_1/kernel',
]
ROWS, STEPS = 8, 3


pytestmark = pytest.mark.usefixtures('quick_compilation')


def trainer_on(shape, devices=None, **options) -> Trainer:
  mesh = make_mesh(shape, devices)
  return make_trainer(
    CONFIG, mesh, **{**dict(groups=GROUPS, lora=LORA, factor=optax.constant_schedule(1.0), weight_decay=0.1), **options}
  )


def batches() -> list:
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


def adapters(trainer: Trainer) -> dict[str, np.ndarray]:
  """Random ones, B too."""
  shapes = {p: leaf.shape for p, leaf in flatten(trainer.abstract['params']).items() if p.startswith('lora/')}
  rng = np.random.default_rng(7)
  return {path: 0.3 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def as_matrices(path: str, array: np.ndarray, *, split: int) -> np.ndarray:
  """[layer, in, out] of a stacked array, whose layer axis counts in `split`."""
  stacked = int(RELEASED.rules()[path].stacked)
  shape = array.shape
  return array.reshape(math.prod(shape[:stacked]), math.prod(shape[stacked:split]), math.prod(shape[split:]))


def parts(path: str, base, a, b) -> tuple[torch.Tensor, ...]:
  """W, A, B as torch has them: one matrix for each layer, whatever axes they had."""
  rule = RELEASED.rules()[path]
  split = rule.stacked + (2 if rule.kind == 'linear2' else 1)
  found = (base, split), (a, a.ndim - 1), (b, rule.stacked + 1)
  return tuple(torch.tensor(as_matrices(path, np.asarray(array), split=at), dtype=torch.float64) for array, at in found)


@pytest.fixture(scope='module')
def trainer() -> Trainer:
  return trainer_on((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def flat(trainer) -> dict[str, np.ndarray]:
  return random_params(CONFIG) | adapters(trainer)


def dense(flat) -> dict[str, np.ndarray]:
  """W + alpha / rank · A · B by torch."""
  own = {path: leaf for path, leaf in flat.items() if not path.startswith('lora/')}
  for path in adapted_paths(flat):
    w, a, b = parts(path, own[path], *(flat[name] for name in adapter_names(path)))
    own[path] = (w + 2.0 * a @ b).numpy().astype(np.float32).reshape(own[path].shape)
  return own


def loss(config, flat, batch):
  logits = merge(structure(config), flat)(batch)
  picked = jax.nn.log_softmax(logits)[np.arange(ROWS)[:, None], np.arange(20), batch.targets]
  return -(picked * batch.loss_mask).sum() / batch.loss_mask.sum()


def test_it_computes_the_sum_and_its_gradient(trainer, flat):
  """Every kernel's layout: heads, two input axes, stacked or not. dA = s · dW · Bᵀ and dB = s · Aᵀ · dW, by torch."""
  assert sorted(adapted_paths(flat)) == sorted(KERNELS)
  batch, expected = batches()[0], dense(flat)
  names = [name for path in KERNELS for name in adapter_names(path)]
  whole, of_dense = quick_jit(jax.value_and_grad(lambda p: loss(CONFIG, p, batch)))(expected)
  rest = {path: leaf for path, leaf in flat.items() if path not in names}
  found, grads = quick_jit(jax.value_and_grad(lambda p: loss(CONFIG, attach(rest | p, LORA.scale), batch)))(
    {name: flat[name] for name in names}
  )
  assert abs(found - whole) <= 1e-5
  for path in KERNELS:
    w, a, b = parts(path, flat[path], *(flat[name] for name in adapter_names(path)))
    a.requires_grad_(), b.requires_grad_()
    (gradient,) = parts(path, of_dense[path], *(flat[name] for name in adapter_names(path)))[:1]
    ((w + 2.0 * a @ b) * gradient).sum().backward()
    for name, reference in zip(adapter_names(path), (a, b), strict=True):
      scale = reference.grad.abs().max().item()
      assert scale > 1e-5, name
      close(np.asarray(grads[name]).reshape(reference.grad.shape) / scale, reference.grad.numpy() / scale, name, 2e-4)


def state_of(trainer: Trainer, flat):
  def value(path, leaf):
    keys = [key.key for key in path if hasattr(key, 'key')]
    return flat['/'.join(keys[1:])] if keys[0] in ('params', 'frozen') else np.zeros(leaf.shape, leaf.dtype)

  return jax.device_put(jax.tree_util.tree_map_with_path(value, trainer.abstract), trainer.shardings)


def run(trainer: Trainer, flat) -> tuple[dict, list[dict]]:
  with use_mesh(trainer.mesh):
    state, found = state_of(trainer, flat), []
    for batch in batches():
      state, metrics = trainer.step(state, jax.device_put(batch, batch_sharding(trainer.mesh)))
      found.append({name: float(value) for name, value in metrics.items()})
  return state, found


@pytest.fixture(scope='module')
def one(trainer, flat):
  return run(trainer, flat)


@pytest.mark.parametrize('shape', [pytest.param((1, 8, 1), marks=pytest.mark.slow), (1, 2, 4)], ids=str)
def test_eight_devices_are_as_one(one, flat, shape):
  many = trainer_on(shape)
  state, metrics = run(many, flat)
  for ours, expected in zip(metrics, one[1], strict=True):
    assert abs(ours['loss'] - expected['loss']) <= 1e-5
    assert abs(ours['grad_norm'] - expected['grad_norm']) <= 1e-4 * expected['grad_norm']
  f, t = shape[1:]
  held = {path: leaf.addressable_shards[0].data.shape for path, leaf in flatten(state['params']).items()}
  assert held['lora/decoder/layers/self_attn/q_proj/a'] == (2, 32 // f, 3)
  assert held['lora/decoder/layers/self_attn/q_proj/b'] == (2, 3, 8 // t, 4)
  assert held['lora/decoder/layers/self_attn/o_proj/a'] == (2, 8 // t, 4, 3)
  assert held['lora/decoder/layers/self_attn/o_proj/b'] == (2, 3, 32 // f)
  assert held['lora/projector/linear_1/kernel/b'] == (3, 32 // t)


def test_the_base_stays_and_has_no_optimizer_state(one, trainer, flat):
  state, metrics = one
  frozen, params = flatten(state['frozen']), flatten(state['params'])
  for path, leaf in frozen.items():
    np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
  assert {path for path in frozen if path.startswith('decoder/')} == {p for p in flat if p.startswith('decoder/')}
  for path, leaf in params.items():
    assert np.abs(np.asarray(leaf) - flat[path]).max() > 1e-6, path
  moments = sum(leaf.size for leaf in jax.tree.leaves(state['opt']))
  assert moments == 2 * sum(leaf.size for leaf in params.values()) + 2
  assert metrics[0]['learning_rate'] == pytest.approx(3e-3)


def test_it_starts_as_its_base(trainer):
  """B is zero, A is not; a target more or less changes no other adapter."""
  base = random_params(CONFIG)
  plain = quick_jit(lambda p: loss(CONFIG, p, batches()[0]))(base)
  narrow = trainer_on((1, 1, 1), jax.devices()[:1], lora=dataclasses.replace(LORA, targets=TARGETS[1:]))
  with use_mesh(trainer.mesh):
    state = trainer.init(jax.random.key(5), dict(base))
    fewer = flatten(narrow.init(jax.random.key(5), dict(base))['params'])
    params = {path: np.asarray(leaf) for path, leaf in flatten(state['params']).items()}
    _, metrics = trainer.step(state, jax.device_put(batches()[0], batch_sharding(trainer.mesh)))
  assert float(metrics['loss']) == pytest.approx(float(plain), abs=1e-6)
  for path in KERNELS:
    a, b = (params[name] for name in adapter_names(path))
    inputs = a.size / a.shape[-1] / (a.shape[0] if '/layers/' in path else 1)
    assert not b.any() and 0.6 < a.std() * math.sqrt(inputs) < 1.4, path
  for path, leaf in fewer.items():
    np.testing.assert_array_equal(leaf, params[path], err_msg=path)


@pytest.mark.parametrize(
  ('targets', 'groups', 'message'),
  [
    (('decoder/layer/.*',), GROUPS, "train.lora_targets: 'decoder/layer/.*' matches no parameter, such as compressor/"),
    (('decoder/(',), GROUPS, "train.lora_targets: 'decoder/(' is not a regular expression: "),
    (
      ('decoder/.*',),
      GROUPS,
      "train.lora_targets: 'decoder/.*' matches decoder/embed_tokens; expected kernels",
    ),
    (('decoder/lm_head',), GROUPS, "train.lora_targets: 'decoder/lm_head' matches decoder/lm_head; expected kernels"),
    (
      TARGETS[:1],
      (('.*', 1e-3),),
      "train.groups: decoder/layers/self_attn/k_proj has a LoRA adapter; expected 'frozen', found 0.001",
    ),
    (
      TARGETS[1:2],
      (('projector/.*', 1e-3), ('.*', 'frozen')),
      "train.groups: lora/decoder/layers/mlp/down_proj/a is frozen; begin with a row such as ('lora/.*', 1e-4)",
    ),
  ],
)
def test_what_cannot_be(targets, groups, message):
  with pytest.raises(ConfigError, match=f'^{re.escape(message)}'):
    trainer_on((1, 1, 1), jax.devices()[:1], lora=dataclasses.replace(LORA, targets=targets), groups=groups)


@pytest.mark.parametrize('fields', [dict(lora_rank=4), dict(lora_targets=('.*',)), dict(lora_rank=-1)])
def test_a_rank_and_targets_belong_together(fields):
  with pytest.raises(
    ConfigError, match='^TrainConfig: expected both a positive lora_rank and lora_targets, or neither'
  ):
    TrainConfig(**fields)


def test_fingerprints():
  """The same on every mesh and in parts; another for any flipped bit, and for elements that change places."""
  rng = np.random.default_rng(0)
  array = rng.normal(size=(4, 8, 16)).astype(np.float32)
  mesh = make_mesh((1, 4, 2))
  put = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')))
  expected = fingerprints({'x': array})['x']
  assert re.fullmatch('[0-9a-f]{16}', expected)
  assert fingerprints({'x': put})['x'] == fingerprint_on_host(array) == expected
  seen = {expected}
  for place, bit in zip(rng.integers(0, array.size, 40), rng.integers(0, 32, 40), strict=True):
    other = array.copy()
    other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
    seen.add(fingerprints({'x': other})['x'])
  seen.add(fingerprints({'x': array[::-1]})['x'])
  assert len(seen) == 42


# ------------------------------------------------------------------------------------------------------- whole runs

RUN_LORA = dict(
  lora_rank=2,
  lora_alpha=4.0,
  lora_targets=('decoder/layers/.*_proj',),
  groups=(('lora/.*', 1e-2), ('projector/.*', 1e-2), ('.*', 'frozen')),
  max_steps=6,
  save_every=2,
  log_every=1,
)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.getbasetemp()


@pytest.fixture(scope='module')
def start(root, tmp_path_factory):
  """A run of random parameters, at step 3. Never to be written to."""
  workdir, dataset = tmp_path_factory.mktemp('start') / 'run', make_dataset(root)
  state = dict(params=unflatten(random_params(MODEL)), frozen={}, step=np.array(3, np.int32))
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    checkpoints.save(3, state, dict(config=json.loads(json.dumps(experiment(dataset).to_dict()))))
  shutil.copytree(dataset / 'tokenizer', workdir / 'tokenizer')
  return workdir


def lora_experiment(root, start, **changes):
  return experiment(make_dataset(root), **{'init_from': str(start), **RUN_LORA, **changes})


@pytest.fixture(scope='module')
def adapted(root, start, tmp_path_factory):
  """A run of six steps. Never to be written to."""
  workdir = tmp_path_factory.mktemp('adapted') / 'run'
  train(lora_experiment(root, start), workdir)
  return workdir


def one_device():
  return make_mesh((1, 1, 1), devices=jax.devices()[:1])


def metrics_of(workdir) -> list[dict]:
  kept = ('step', 'loss', 'accuracy', 'grad_norm')
  return [{n: row[n] for n in kept} for row in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())]


def test_a_checkpoint_holds_what_trained_and_names_its_base(adapted, start):
  with Checkpoints(adapted / 'checkpoints') as checkpoints:
    stored, meta = checkpoints.stored_parameters(), checkpoints.meta()
  assert all(path.startswith(('lora/decoder/layers/', 'projector/')) for path in stored)
  assert sum(path.startswith('lora/') for path in stored) == 14
  base = load_run(start, one_device())
  frozen = {path: leaf for path, leaf in flatten(base.params).items() if not path.startswith('projector/')}
  assert meta['base'] == dict(run=str(start), step=base.step, fingerprints=fingerprints(frozen))
  assert meta['start'] == weights_fingerprint(start)


@pytest.mark.slow
def test_a_run_that_goes_on_is_exact(adapted, root, start, tmp_path):
  """From the checkpoint of step 4, and with the base somewhere else."""
  workdir = tmp_path / 'run'
  shutil.copytree(adapted, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  moved = shutil.copytree(start, tmp_path / 'moved')
  train(lora_experiment(root, moved), workdir)
  assert metrics_of(workdir) == metrics_of(adapted)
  found, expected = (load_run(path, one_device()).params for path in (workdir, adapted))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    assert checkpoints.meta()['base']['run'] == str(moved)
    assert checkpoints.meta()['start'] == weights_fingerprint(start)


@pytest.mark.slow
def test_a_run_is_read_merged(adapted, start):
  """On one device and on eight: base + alpha / rank · A · B, and what trained besides."""
  base = flatten(load_run(start, one_device()).params)
  with Checkpoints(adapted / 'checkpoints') as checkpoints:
    where = dict.fromkeys(checkpoints.stored_parameters(), jax.devices()[0])
    own = checkpoints.restore_parameters(
      {path: jax.sharding.SingleDeviceSharding(device) for path, device in where.items()}
    )
  expected = dense({path: np.asarray(leaf) for path, leaf in (base | own).items()})
  on_host = open_parameters(adapted)
  for path, leaf in expected.items():
    close(on_host.read(path), leaf, path, 1e-6)
  for mesh in (one_device(), make_mesh((1, 8, 1))):
    found = flatten(load_run(adapted, mesh).params)
    assert found.keys() == base.keys()
    for path, leaf in found.items():
      close(leaf, expected[path], path, 1e-6)
  assert np.abs(expected['decoder/layers/mlp/up_proj'] - base['decoder/layers/mlp/up_proj']).max() > 1e-4


def test_a_base_that_is_gone_or_another(adapted, start, tmp_path):
  with pytest.raises(CheckpointError, match='^the run that the adapters were trained on: no checkpoint: '):
    load_run(adapted, one_device(), changes=[f'train.init_from={tmp_path}/none'])
  moved = shutil.copytree(start, tmp_path / 'moved')
  load_run(adapted, one_device(), changes=[f'train.init_from={moved}'])
  source = load_run(start, one_device())
  params = flatten(source.params)
  params['decoder/norm/weight'] = params['decoder/norm/weight'].at[3].add(1e-6)
  with Checkpoints(tmp_path / 'other' / 'checkpoints') as checkpoints:
    state = dict(params=unflatten(params), step=np.array(source.step, np.int32))
    checkpoints.save(source.step, state, dict(config=json.loads(json.dumps(source.experiment.to_dict()))))
  message = f'^{tmp_path}/other is not what the adapters were trained on: other numbers in decoder/norm/weight$'
  with pytest.raises(CheckpointError, match=message):
    load_run(adapted, one_device(), changes=[f'train.init_from={tmp_path}/other'])
  with pytest.raises(CheckpointError, match=message):
    open_parameters(adapted, base=str(tmp_path / 'other')).read('decoder/norm/weight')
  with pytest.raises(ConfigError, match='^set: train.init_from is read for runs with LoRA adapters alone'):
    load_run(start, one_device(), changes=['train.init_from=x'])


@pytest.mark.slow
def test_a_run_starts_from_an_adapted_one_but_adapters_do_not(adapted, root, tmp_path):
  again = lora_experiment(root, adapted)
  with pytest.raises(ConfigError, match='adapted0/run has LoRA adapters itself; export it with --merge_lora'):
    train(again, tmp_path / 'again')
  plain = experiment(make_dataset(root), init_from=str(adapted), max_steps=1, groups=(('.*', 1e-9),))
  train(plain, tmp_path / 'plain')
  found, expected = (flatten(load_run(path, one_device()).params) for path in (tmp_path / 'plain', adapted))
  for path, leaf in expected.items():
    close(found[path], leaf, path, 1e-7)

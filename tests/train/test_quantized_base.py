"""LoRA on a base in few bits: what the numbers become, and that training and every reader have the same ones."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import optax
import pytest
from small_model import random_params
from test_lora import CONFIG, GROUPS, KERNELS, LORA, STEPS, adapters, batches
from tiny_run import experiment, make_dataset

from llava_mini_jax.config import QUANTIZED, ConfigError
from llava_mini_jax.convert.names import RELEASED
from llava_mini_jax.convert.run_parameters import open_parameters
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.sharding import batch_sharding, make_mesh, replicated, use_mesh
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.lora import adapter_names, as_kept, as_kept_on_host, kept
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten

pytestmark = pytest.mark.usefixtures('quick_compilation')
# The 16 steps of nf4, between -1 and 1: arXiv:2305.14314, appendix E.
NF4 = [
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
BITS = dict(int8=8, int4=4, nf4=4)


def matrices(path: str, kernel: np.ndarray) -> np.ndarray:
  """[layer, blocks of inputs, inputs of a block, out], float64."""
  rule = RELEASED.rules()[path]
  split = rule.stacked + (2 if rule.kind == 'linear2' else 1)
  layers, last = math.prod(kernel.shape[: rule.stacked]), kernel.shape[split - 1]
  inputs = math.prod(kernel.shape[rule.stacked : split])
  return kernel.astype(np.float64).reshape(layers, inputs // last, last, -1)


def expected(path: str, kernel: np.ndarray, kind: str) -> np.ndarray:
  """By NumPy. Every last input axis here is shorter than a block."""
  w = matrices(path, kernel)
  largest = np.abs(w).max(axis=(1, 2) if kind == 'int8' else 2, keepdims=True)
  if kind == 'nf4':
    steps = np.array(NF4)
    found = steps[np.abs(w[..., None] / largest[..., None] - steps).argmin(-1)] * largest
  else:
    top = 2 ** (BITS[kind] - 1) - 1
    found = np.round(w / largest * top) * largest / top
  return found.reshape(kernel.shape)


@pytest.mark.parametrize('kind', QUANTIZED)
def test_the_numbers(kind):
  lora, params = dataclasses.replace(LORA, base=kind), random_params(CONFIG)
  for path in KERNELS:
    kernel = jax.device_put(params[path], replicated(make_mesh((1, 1, 1), jax.devices()[:1])))
    found = np.asarray(as_kept(path, kernel, lora))
    np.testing.assert_allclose(found, expected(path, params[path], kind), atol=2e-6, err_msg=path)
    np.testing.assert_array_equal(as_kept_on_host(path, params[path], lora), found, err_msg=path)
    assert 0 < np.abs(found - params[path]).max() < 0.5
    small = kept(path, kernel, lora)
    assert small.qvalue.shape == kernel.shape and small.scale.size <= kernel.size
    assert jax.numpy.iinfo(small.qvalue.dtype).bits == BITS[kind]
  assert kept('decoder/norm/weight', jax.numpy.ones(3), lora).dtype == np.float32


def trained_steps(shape, devices, base: str, flat: dict[str, np.ndarray]) -> tuple[list[float], dict[str, np.ndarray]]:
  mesh, lora = make_mesh(shape, devices), dataclasses.replace(LORA, base=base)
  trainer = make_trainer(CONFIG, mesh, groups=GROUPS, lora=lora, factor=optax.constant_schedule(1.0))
  leaves = flatten(trainer.abstract['params']) | flatten(trainer.abstract['frozen'])
  with use_mesh(mesh):
    placed = {}
    for path, array in flat.items():
      leaf = leaves[path]
      where = leaf.qvalue.sharding if base and path in KERNELS else leaf.sharding
      placed[path] = kept(path, jax.device_put(array, where), lora)
      assert jax.tree.map(lambda x: x.sharding, placed[path]) == jax.tree.map(lambda x: x.sharding, leaf), path
    state, losses = trainer.init(jax.random.key(0), placed), []
    for batch in batches():
      state, metrics = trainer.step(state, jax.device_put(batch, batch_sharding(mesh)))
      losses.append(float(metrics['loss']))
  return losses, {path: np.asarray(leaf) for path, leaf in flatten(state['params']).items()}


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_a_step_is_that_on_the_rounded_numbers(kind):
  """On one device and on eight, three steps of everything that trains equal those on a float32 base so rounded."""
  lora, flat = dataclasses.replace(LORA, base=kind), random_params(CONFIG)
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  flat |= adapters(make_trainer(CONFIG, mesh, groups=GROUPS, lora=LORA, factor=optax.constant_schedule(1.0)))
  rounded = {path: as_kept_on_host(path, leaf, lora) for path, leaf in flat.items()}
  losses, params = trained_steps((1, 1, 1), jax.devices()[:1], '', rounded)
  assert len(losses) == STEPS
  for shape, devices in (((1, 1, 1), jax.devices()[:1]), ((2, 2, 2), None)):
    found, ours = trained_steps(shape, devices, kind, flat)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for path in params.keys() - {'compressor/k_proj_bias'}:  # softmax takes no notice of it: its gradient is noise
      np.testing.assert_allclose(ours[path], params[path], atol=2e-4, err_msg=path)


@pytest.mark.slow
def test_a_run_and_its_readers(tmp_path, tmp_path_factory):
  """It resumes exactly; what reads it merged has the adapters on the numbers that they were trained on."""
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  train(experiment(dataset, max_steps=2, save_every=2), tmp_path / 'base')
  fields = dict(
    init_from=str(tmp_path / 'base'),
    lora_rank=2,
    lora_targets=('decoder/layers/.*_proj',),
    lora_base='nf4',
    groups=(('lora/.*', 1e-2), ('.*', 'frozen')),
    save_every=2,
    log_every=1,
  )
  train(experiment(dataset, max_steps=4, **fields), tmp_path / 'run')

  def curve() -> list:
    return [json.loads(line)['loss'] for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]

  whole = curve()
  for path in (tmp_path / 'run' / 'checkpoints').iterdir():
    if path.name == '4':
      path.rename(tmp_path / 'aside')
  train(experiment(dataset, max_steps=4, **fields), tmp_path / 'run')
  assert curve() == whole and len(whole) == 4
  name = 'decoder/layers/mlp/up_proj'
  base, run = open_parameters(tmp_path / 'base'), open_parameters(tmp_path / 'run')
  stored = base.read(name)
  a, b = (run._trained.read(adapter) for adapter in adapter_names(name))
  wanted = expected(name, stored, 'nf4') + 16 / 2 * np.einsum('lir,lro->lio', a, b)
  np.testing.assert_allclose(run.read(name), wanted, atol=1e-5)
  assert np.abs(run.read(name) - stored).max() > 1e-3
  np.testing.assert_array_equal(run.read('projector/linear_1/kernel'), base.read('projector/linear_1/kernel'))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(lora_base='int2', lora_rank=1, lora_targets=('x',)), "expected one of int8, int4, nf4; found 'int2'"),
    (dict(lora_base='int8'), "expected a lora_rank with lora_base='int8'; found none"),
  ],
)
def test_mistakes(fields, message):
  with pytest.raises(ConfigError, match=message):
    TrainConfig(groups=(('.*', 1.0),), batch_size=1, **fields)

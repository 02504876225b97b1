"""What a run begins with: chance, another run, or parts of it; and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_run import MODEL, experiment, make_dataset, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.run_weights import weights_fingerprint
from llava_mini_jax.data.inputs import load_inputs, tokenizer_directory
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train import start as train_start
from llava_mini_jax.train.errors import CheckpointError
from llava_mini_jax.train.start import check_start, initial_state
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten

pytestmark = pytest.mark.usefixtures('quick_compilation')
ALL = (('.*', 1.0),)
REST = (('projector/.*', 1.0), ('.*', 'frozen'))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return tmp_path_factory.getbasetemp()


def start(base, *, groups=ALL, model=MODEL, **train) -> dict[str, np.ndarray]:
  """Parameters that a run begins with, by path."""
  run = experiment(make_dataset(base), groups=groups, mesh=(1, 1, 8), **train)
  run = dataclasses.replace(run, model=model)
  mesh = make_mesh((1, 8, 1))
  trainer = make_trainer(model, mesh, groups=groups, factor=lambda step: 1.0)
  check_start(run, trainer)
  with use_mesh(mesh):
    state, kept = initial_state(run, trainer)
  begins = run.train.init_from
  assert kept == (dict(start=weights_fingerprint(begins)) if begins else {})
  assert int(state['step']) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state['opt']))
  expected = flatten(trainer.shardings['params']) | flatten(trainer.shardings['frozen'])
  found = flatten(state['params']) | flatten(state['frozen'])
  assert all(found[path].sharding.is_equivalent_to(expected[path], found[path].ndim) for path in expected)
  return {path: np.asarray(leaf) for path, leaf in found.items()}


@pytest.fixture(scope='module')
def stored(base) -> dict[str, np.ndarray]:
  loaded = load_run(trained(base), make_mesh((1, 1, 1), jax.devices()[:1]))
  return {path: np.asarray(leaf) for path, leaf in flatten(loaded.params).items()}


@pytest.mark.parametrize('groups', [ALL, REST])
def test_the_parameters_of_another_run(base, stored, groups):
  found = start(base, groups=groups, init_from=str(trained(base)))
  assert found.keys() == stored.keys()
  for path in found:
    np.testing.assert_array_equal(found[path], stored[path], err_msg=path)


@pytest.mark.slow
def test_modules_that_it_does_not_have_start_anew(base, stored, tmp_path):
  """As stage 2 does after stage 1: the same seed gives what a run from chance begins with."""
  bare = dataclasses.replace(
    MODEL,
    compressor=dataclasses.replace(MODEL.compressor, kind='none'),
    prefusion=dataclasses.replace(MODEL.prefusion, num_layers=0),
  )
  from llava_mini_jax.train.checkpoint import Checkpoints
  from llava_mini_jax.train.tree import unflatten

  kept = {path: leaf for path, leaf in stored.items() if path.split('/')[0] in ('vision', 'projector', 'decoder')}
  config = dataclasses.replace(experiment(make_dataset(base)), model=bare)
  with Checkpoints(tmp_path / 'checkpoints', keep=1) as checkpoints:
    state = dict(params=unflatten(kept), frozen={}, step=np.int32(3))
    checkpoints.save(3, jax.tree.map(jax.numpy.asarray, state), dict(config=config.to_dict()))
    checkpoints.wait()

  with pytest.raises(
    ConfigError, match=rf'^{re.escape(str(tmp_path))} does not have compressor/.* and \d+ more; name in'
  ):
    start(base, init_from=str(tmp_path))
  random = start(base)
  found = start(base, init_from=str(tmp_path), init_fresh=('(compressor|prefusion)/.*',))
  for path in found:
    np.testing.assert_array_equal(found[path], kept[path] if path in kept else random[path], err_msg=path)
  copied = dataclasses.replace(MODEL, prefusion=dataclasses.replace(MODEL.prefusion, init='decoder'))
  found = start(base, init_from=str(tmp_path), init_fresh=('compressor/.*',), model=copied)
  for path in found:
    if path.startswith('prefusion/'):
      source = kept[path.replace('prefusion/', 'decoder/')]
      np.testing.assert_array_equal(found[path], source[: MODEL.prefusion.num_layers], err_msg=path)


def test_another_model_is_refused(base):
  wider = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, intermediate_size=48))
  with pytest.raises(CheckpointError, match='vision/layers/fc1/kernel: expected'):
    start(base, init_from=str(trained(base)), model=wider)


def test_no_run_to_start_from(base, tmp_path):
  with pytest.raises(CheckpointError, match='^no checkpoint: '):
    start(base, init_from=str(tmp_path / 'none'))


def test_what_is_frozen_has_to_come_from_somewhere(base):
  with pytest.raises(
    ConfigError, match=r'^train.groups freeze \d+ parameter\(s\), .* would stay random: set train.init_from$'
  ):
    start(base, groups=REST)


def test_the_tokenizer_comes_along(base, tmp_path):
  run = experiment(make_dataset(base))
  shutil.copytree(trained(base) / 'tokenizer', tmp_path / 'tokenizer')
  assert tokenizer_directory(run.data, str(tmp_path)) == tmp_path / 'tokenizer'
  assert load_inputs(run.data, run.model, start=str(tmp_path)).tokenizer.get_vocab()
  named = dataclasses.replace(run.data, tokenizer='elsewhere')
  assert str(tokenizer_directory(named, str(tmp_path))) == 'elsewhere'
  with pytest.raises(ConfigError) as error:
    load_inputs(run.data, run.model, start=str(tmp_path / 'none'))
  expected = 'train.init_from: expected the directory of a run or of an import; found none at'
  assert str(error.value) == f'{expected} {tmp_path / "none"}'


def test_what_is_loaded_is_in_memory_once(base, monkeypatch):
  """The state holds the very buffers that were loaded; only what starts anew is drawn at random."""
  run = experiment(make_dataset(base), init_from='elsewhere', init_fresh=('prefusion/.*',))
  mesh = make_mesh((1, 8, 1))
  trainer = make_trainer(MODEL, mesh, groups=ALL, factor=lambda step: 1.0)
  shardings = flatten(trainer.shardings['params'])
  kept = {
    path: jax.device_put(np.zeros(leaf.shape, leaf.dtype), shardings[path])
    for path, leaf in flatten(trainer.abstract['params']).items()
    if not path.startswith('prefusion/')
  }
  monkeypatch.setattr(train_start, 'newest_step', lambda workdir: None)
  monkeypatch.setattr(train_start, 'weights_fingerprint', lambda workdir, step: '')
  monkeypatch.setattr(train_start, 'starting_parameters', lambda *_, **__: kept)

  def buffers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]

  before = {path: buffers(leaf) for path, leaf in kept.items()}
  with use_mesh(mesh):
    params = flatten(initial_state(run, trainer)[0]['params'])
  assert params.keys() - kept.keys() == {path for path in params if path.startswith('prefusion/')}
  for path, pointers in before.items():
    assert buffers(params[path]) == pointers, path

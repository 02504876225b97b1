"""A run with LoRA adapters over an imported checkpoint: read, or exported merged, it computes the same."""

from __future__ import annotations

import dataclasses
import json
import shutil

import hf_directories as hf
import jax
import numpy as np
import pytest
from small_model import lay_out, quick_jit, random_sample
from torch_parity import close

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.lora import attach
from llava_mini_jax.train.start import check_start, initial_state, trainer_for
from llava_mini_jax.train.step import saved_part
from llava_mini_jax.train.tree import flatten, merge, unflatten


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The run, its experiment, and its parameters with adapters apart. As training leaves it, but for random numbers."""
  root = tmp_path_factory.mktemp('lora')
  hf.released(root / 'hf')
  experiment = import_model(Sources(whole=str(root / 'hf')), root / 'base')
  train = TrainConfig(
    init_from=str(root / 'base'),
    lora_rank=2,
    lora_alpha=3.0,
    lora_targets=('(decoder|prefusion)/layers/.*_proj', 'projector/.*/kernel'),
    groups=(('lora/.*', 1e-3), ('compressor/.*', 1e-3), ('.*', 'frozen')),
  )
  experiment = dataclasses.replace(
    experiment, train=train, model=dataclasses.replace(experiment.model, dtype='float32')
  )
  mesh = make_mesh((1, 1, 1), devices=jax.devices()[:1])
  trainer = trainer_for(experiment, mesh, total_steps=10)
  check_start(experiment, trainer)
  with use_mesh(mesh):
    state, base = initial_state(experiment, trainer)
  rng = np.random.default_rng(0)
  params = {
    path: jax.numpy.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), np.float32)
    for path, leaf in flatten(state['params']).items()
  }
  state['params'] = unflatten(params)
  config = json.loads(json.dumps(experiment.to_dict()))
  with Checkpoints(root / 'run' / 'checkpoints') as checkpoints:
    checkpoints.save(1, saved_part(trainer, state), base | dict(config=config))
  shutil.copytree(root / 'base' / 'tokenizer', root / 'run' / 'tokenizer')
  return root / 'run', experiment, trainer.graphdef, params | flatten(state['frozen'])


def loaded(workdir):
  return load_run(workdir, make_mesh((1, 1, 1), devices=jax.devices()[:1]), changes=['model.dtype=float32'])


def logits(experiment, graphdef, flat) -> np.ndarray:
  batch = lay_out(experiment.model, [random_sample(experiment.model, i) for i in range(2)], length=24, visuals=1)
  return np.asarray(quick_jit(lambda flat: merge(graphdef, flat)(batch))(flat))


def test_a_merged_export_gives_the_same_logits(run, tmp_path):
  """As with adapters apart, which is how it trained; and not as its base."""
  workdir, experiment, graphdef, flat = run
  expected = logits(experiment, graphdef, attach(flat, experiment.train.lora_alpha / experiment.train.lora_rank))
  export_model(workdir, tmp_path / 'hf', merge_lora=True, max_shard_size='300KB')
  import_model(Sources(whole=str(tmp_path / 'hf')), tmp_path / 'again')
  for name in (workdir, tmp_path / 'again'):
    found = logits(experiment, graphdef, flatten(loaded(name).params))
    close(found / np.abs(expected).max(), expected / np.abs(expected).max(), str(name), 1e-5)
  base = logits(experiment, graphdef, flatten(loaded(experiment.train.init_from).params))
  assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()


def test_merging_is_asked_for(run, tmp_path):
  workdir, experiment, *_ = run
  base = experiment.train.init_from
  with pytest.raises(ConfigError) as error:
    export_model(workdir, tmp_path / 'hf')
  assert str(error.value) == f'{workdir} has LoRA adapters for {base}: --merge_lora adds them to it'
  with pytest.raises(ConfigError) as error:
    export_model(base, tmp_path / 'hf', merge_lora=True)
  assert str(error.value) == f'{base} has no LoRA adapters'
  assert not (tmp_path / 'hf').exists()

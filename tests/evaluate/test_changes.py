"""Runs are asked with other input settings than they were made with; what would need other parameters is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from small_model import random_params
from tiny_run import experiment, make_dataset

from llava_mini_jax.config import CompressorConfig, ConfigError
from llava_mini_jax.convert.run_weights import write_run
from llava_mini_jax.convert.tensor_writer import Planned
from llava_mini_jax.evaluate.run import evaluate
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.infer.load import CHANGEABLE, change_experiment, load_run
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.tree import parameter_shapes

BASE = experiment('')
ALLOWED = (
  'data.aspect, data.default_system, data.frame_resize, data.grid, data.grid_order, data.template, data.video_fps, '
  'data.video_frames, data.video_max_frames, data.video_rule, model.compressor.keep, model.dtype, '
  'model.visual_chunk, train.init_from'
)
OTHER = {  # a value that is not the run's, as it is typed and as it is meant
  'data.aspect': ('crop', 'crop'),
  'data.default_system': ('False', False),
  'data.frame_resize': ('aspect', 'aspect'),
  'data.grid': ('2', 2),
  'data.grid_order': ('split_then_pad', 'split_then_pad'),
  'data.template': ('templates/my-own.jinja', 'templates/my-own.jinja'),
  'data.video_fps': ('2', 2),
  'data.video_frames': ('8', 8),
  'data.video_max_frames': ('64', 64),
  'data.video_rule': ('"released"', 'released'),
  'model.compressor.keep': ('4', 4),
  'model.dtype': ('bfloat16', 'bfloat16'),
  'model.visual_chunk': ('16', 16),
  'train.init_from': ('moved/base', 'moved/base'),
}
ADAPTED = dataclasses.replace(
  BASE, train=dataclasses.replace(BASE.train, lora_rank=2, lora_targets=('decoder/layers/.*_proj',))
)
ELASTIC = dataclasses.replace(
  BASE, model=dataclasses.replace(BASE.model, compressor=CompressorConfig(kind='mqt', grid=4, elastic=True))
)
OF = {'train.init_from': ADAPTED, 'model.compressor.keep': ELASTIC}  # who has the field


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> Path:
  """An imported run with random parameters."""
  run = tmp_path_factory.mktemp('changes') / 'run'
  run.mkdir()
  shutil.copytree(make_dataset(tmp_path_factory.getbasetemp()) / 'tokenizer', run / 'tokenizer')
  planned = [
    Planned(path, value.shape, np.dtype(np.float32), lambda value=value: [value])
    for path, value in random_params(BASE.model).items()
  ]
  write_run(run, BASE, planned, max_shard_bytes=2**30, progress=lambda _: None)
  return run


@pytest.fixture(scope='module')
def mesh():
  return make_mesh((1, 1, 1), devices=jax.devices()[:1])


def flat(config: Experiment) -> dict[str, object]:
  return traverse_util.flatten_dict(config.to_dict(), sep='.')


@pytest.mark.parametrize('name', CHANGEABLE)
def test_one_field_changes_and_no_parameter(name):
  typed, meant = OTHER[name]
  run = OF.get(name, BASE)
  changed = change_experiment(run, [f'{name}={typed}'])
  before, after = flat(run), flat(changed)
  assert after == before | {name: meant} and before[name] != meant
  assert type(after[name]) is type(meant)
  assert parameter_shapes(changed.model) == parameter_shapes(run.model)


def test_several_changes():
  changed = change_experiment(BASE, ['data.grid=2', 'data.video_frames=8', 'data.grid=3'])
  assert changed == dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, grid=3, video_frames=8))
  assert change_experiment(BASE, []) == BASE


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('data.gird=2', f"set: expected one of {ALLOWED}; found 'data.gird'"),
    ('model.decoder.num_hidden_layers=1', f"set: expected one of {ALLOWED}; found 'model.decoder.num_hidden_layers'"),
    ('model.text_only=skip', f"set: expected one of {ALLOWED}; found 'model.text_only'"),
    ('train.seed=1', f"set: expected one of {ALLOWED}; found 'train.seed'"),
    ('grid=2', f"set: expected one of {ALLOWED}; found 'grid'"),
    ('=2', f"set: expected one of {ALLOWED}; found ''"),
    (
      'train.init_from=other',
      'set: train.init_from is read for runs with LoRA adapters alone; this one holds all parameters',
    ),
    ('data.grid', "set: expected section.field=value; found 'data.grid'"),
    ('data.grid=two', "data.grid: expected int; found 'two'"),
    ('data.grid=True', 'data.grid: expected int; found True'),
    ('data.grid=', "data.grid: expected int; found ''"),
    ('data.grid={[]: 1}', "data.grid: expected int; found '{[]: 1}'"),
    ('data.grid=' + '(' * 999, f"data.grid: expected int; found '{'(' * 999}'"),
    ('data.default_system=no', "data.default_system: expected bool; found 'no'"),
    ('data.video_fps=1e999', 'data.video_fps: expected float; found inf'),
    ('model.visual_chunk=-1', 'LlavaMiniConfig.visual_chunk: expected 0 or more; found -1'),
    ('model.dtype=float64', "LlavaMiniConfig.dtype: expected one of bfloat16, float32; found 'float64'"),
  ],
)
def test_changes_that_are_refused(workdir, mesh, change, message):
  with pytest.raises(ConfigError) as caught:
    load_run(workdir, mesh, changes=['data.grid=1', change])
  assert str(caught.value) == message


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('data.grid=0', 'ImageProcessor.grid: '),
    ('data.video_fps=0', 'FrameSampler.fps: expected a positive number; found 0'),
    ('data.template=vicuna', 'template: expected one of '),
  ],
)
def test_values_that_the_input_refuses(workdir, mesh, change, message):
  run = load_run(workdir, mesh, changes=[change])
  with pytest.raises(ConfigError) as caught:
    Answerer(run)
  assert str(caught.value).startswith(message)


def test_a_run_is_asked_with_the_changes(workdir, mesh, tmp_path):
  """High resolution, another dtype and template reach the batch and the model; the parameters stay what they are."""
  changes = ('data.grid=2', 'model.dtype=bfloat16', 'data.template=qa')
  plain, run = load_run(workdir, mesh), load_run(workdir, mesh, changes=changes)
  assert (plain.changes, run.changes) == ((), changes)
  assert plain.experiment == BASE and run.experiment == change_experiment(BASE, changes)
  for one, other in zip(jax.tree.leaves(plain.params), jax.tree.leaves(run.params), strict=True):
    np.testing.assert_array_equal(one, other)
  prompt = Prompt([{'role': 'user', 'content': '<image>\ncolor?'}], [[np.zeros((16, 24, 3), np.uint8)]])
  shapes, dtypes = [], []
  for asked in (plain, run):
    engine = Engine(asked, slots=1, max_length=64)
    laid = engine.encoder.lay(prompt)
    shapes.append((laid.media[0][0].shape, len(laid.tokens)))
    dtypes.append(engine.core.state.cache.keys.dtype)
  assert [shape[0] for shape in shapes] == [(1, 16, 16, 3), (5, 16, 16, 3)]
  assert shapes[1][1] < shapes[0][1]  # `qa` writes nothing around a question
  assert dtypes == ['float32', 'bfloat16']


def test_an_evaluation_says_what_was_changed(workdir, mesh, tmp_path, tmp_path_factory):
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  answerer = Answerer(load_run(workdir, mesh, changes=['data.aspect=crop']), max_new_tokens=1)
  answerer._generate = lambda params, batch: np.full((len(batch.tokens), 1), -1)
  summary = evaluate(answerer, dataset, 'train', tmp_path, batch_size=2, limit=2)
  assert summary['changes'] == ['data.aspect=crop']
  assert json.loads((tmp_path / 'answers_real_first_2.json').read_text())['summary'] == summary


def test_the_fields_are_those_that_are_documented():
  assert set(CHANGEABLE) == OTHER.keys() and ', '.join(CHANGEABLE) == ALLOWED

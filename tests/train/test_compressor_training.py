"""Every kind of compressor learns a batch by heart, with pre-fusion and without, and its recipe fits its parameters."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import lay_out, random_sample, small_config

from llava_mini_jax.compressor_recipes import DEFAULTS, compared_stage
from llava_mini_jax.config import COMPRESSORS, CompressorConfig, ConfigError, LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.convert.run_start import starting_paths
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.features import check_reads
from llava_mini_jax.train.optimizer import assign_groups
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten, parameter_shapes

STEPS = 6
CASES = {
  'average': (dict(kind='average', grid=2), 1),
  'average without pre-fusion': (dict(kind='average', grid=2), 0),
  'no token': (dict(kind='query', grid=0), 1),
  'mqt': (dict(kind='mqt', grid=2, elastic=True), 1),
  'prumerge': (dict(kind='prumerge', keep=3, neighbours=4, elastic=True), 1),
  'prumerge_plus': (dict(kind='prumerge_plus', keep=3, neighbours=4), 0),
  'tokenpacker': (dict(kind='tokenpacker', grid=2, layers=(0, 2)), 1),
  'llama_vid': (dict(kind='llama_vid', text_queries=3), 1),
  'voco': (dict(kind='voco', keep=2), 1),
  'voco without pre-fusion': (dict(kind='voco', keep=2), 0),
  'within': (dict(kind='query', space='llm', within=1), 0),
}


@pytest.mark.usefixtures('quick_compilation')
@pytest.mark.parametrize('case', CASES)
def test_the_loss_falls(case):
  compressor, layers = CASES[case]
  config = small_config(compressor=compressor, prefusion=dict(num_layers=layers), detach_text=False)
  samples = [random_sample(config, i, text=(2, 3)) for i in range(4)]
  batch = lay_out(config, samples, length=32, visuals=1)
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  groups = (('vision/.*', 'frozen'), ('.*', 1e-2))
  trainer = make_trainer(config, mesh, groups=groups, factor=lambda step: jnp.float32(1))
  with use_mesh(mesh):
    state = trainer.init(jax.random.key(0))
    before = {path: np.asarray(x) for path, x in flatten(state['params']).items()}
    losses = []
    for _ in range(STEPS):
      state, metrics = trainer.step(state, batch)
      losses.append(float(metrics['loss']))
  assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.5, losses
  learnt = {path for path, x in flatten(state['params']).items() if not np.array_equal(x, before[path])}
  assert {path for path in before if path.startswith(('compressor/', 'prefusion/', 'decoder/'))} <= learnt


@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
@pytest.mark.parametrize('kind', COMPRESSORS)
def test_the_recipe_of_each_kind(kind, stage):
  model = LlavaMiniConfig.preset('vicuna_7b')
  found = compared_stage(model, kind, stage, template='vicuna_v1', name='x')
  shapes = parameter_shapes(found.model)
  if found.train.lora_rank:
    shapes |= {'lora/decoder/layers/mlp/up_proj/a': (1,)}
  rates = assign_groups(shapes, found.train.groups)
  assert all(rate is None for path, rate in rates.items() if path.startswith('vision/'))
  trained = {path.split('/')[0] for path, rate in rates.items() if rate is not None}
  own = {'compressor'} if any(path.startswith('compressor/') for path in shapes) else set()
  if kind not in ('query', 'average'):
    expected = {'projector', *own} if stage == 'stage1' else {'projector', *own, 'decoder'}
    assert trained == ({'lora', 'projector'} if found.train.lora_rank else expected)
    assert found.train.batch_size == (256 if stage == 'stage1' else 128)
  assert found.data.max_turns == (kind == 'llama_vid' and stage == 'stage2')


def imported(model: LlavaMiniConfig) -> LlavaMiniConfig:
  """A whole CLIP tower and a language model."""
  vision = dataclasses.replace(model.vision, keep_unused_layers=True)
  none = dict(compressor=CompressorConfig(kind='none'), prefusion=PrefusionConfig(num_layers=0))
  return dataclasses.replace(model, vision=vision, **none)


@pytest.mark.parametrize('kind', COMPRESSORS)
def test_each_stage_starts_from_the_one_before(kind):
  """What `init_from` names is there, fits, and has whatever may not start anew."""
  model = LlavaMiniConfig.preset('vicuna_7b')
  stages = dict(template='vicuna_v1', name='x')
  runs = {'runs/x_start': imported(model)}
  for other in COMPRESSORS:
    own = '' if other in ('query', 'average') else f'_{other}'
    for stage in ('stage1', 'stage2'):
      runs[f'runs/x{own}_{stage}'] = compared_stage(model, other, stage, **stages).model
  for stage in ('stage1', 'stage2'):
    found = compared_stage(model, kind, stage, **stages)
    start = found.train.init_from
    origin = starting_paths(Path(start), runs[start], found.model)
    absent = parameter_shapes(found.model).keys() - origin.keys()
    assert all(any(re.fullmatch(p, path) for p in found.train.init_fresh) for path in absent), sorted(absent)
    assert {path for path in parameter_shapes(found.model) if path.startswith(('vision/', 'decoder/'))} <= set(origin)


def test_tokens_of_the_systems_that_the_paper_compares_with():
  model = LlavaMiniConfig.preset('vicuna_7b')
  tokens = {kind: dataclasses.replace(model, compressor=DEFAULTS[kind]).new_tokens(1) for kind in DEFAULTS}
  assert set(DEFAULTS) == set(COMPRESSORS)
  assert tokens == dict(
    query=1, average=1, mqt=256, prumerge=32, prumerge_plus=145, tokenpacker=36, llama_vid=2, voco=1, none=0
  )


def test_pre_fusion_may_be_added_to_a_recipe():
  model = LlavaMiniConfig.preset('vicuna_7b')
  found = compared_stage(model, 'tokenpacker', 'stage2', template='vicuna_v1', name='x', prefusion_layers=3)
  assert found.model.prefusion.num_layers == 3
  for kind, layers, expected in (('query', 2, 2), ('average', 0, 0), ('query', None, model.prefusion.num_layers)):
    found = compared_stage(model, kind, 'stage2', template='vicuna_v1', name='x', prefusion_layers=layers)
    assert found.model.prefusion.num_layers == expected
  with pytest.raises(ConfigError, match='^stage: expected one of stage1, stage2; found'):
    compared_stage(model, 'mqt', 'stage3', template='vicuna_v1', name='x')


def test_stored_features_are_not_all_that_some_kinds_read():
  model = LlavaMiniConfig.preset('vicuna_7b')
  for kind in COMPRESSORS:
    found = compared_stage(model, kind, 'stage2', template='vicuna_v1', name='x')
    if kind not in ('prumerge', 'prumerge_plus', 'tokenpacker'):
      check_reads(found)
      continue
    with pytest.raises(ConfigError) as error:
      check_reads(found)
    expected = f'data.features: expected a compressor that reads the selected layer alone; found {kind}'
    assert str(error.value) == expected

"""What a run starts with from another: said in one line, and refused where the same parameters would mean other things.

An imported run stands for any: what is compared are the configs.
"""

from __future__ import annotations

import dataclasses

import hf_directories as hf
import jax
import numpy as np
import pytest

from llava_mini_jax.config import CompressorConfig, LlavaMiniConfig, PrefusionConfig, RopeScaling
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.convert.run_parameters import starting_parameters
from llava_mini_jax.convert.run_start import describe_start
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.checkpoint import CheckpointError


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """The run and its model; rope of Llama 3.1. Never to be written to."""
  root = tmp_path_factory.mktemp('start')
  hf.released(root / 'hf')
  return root / 'run', import_model(Sources(whole=str(root / 'hf')), root / 'run').model


def changed(model: LlavaMiniConfig, **sections) -> LlavaMiniConfig:
  parts = {name: dataclasses.replace(getattr(model, name), **fields) for name, fields in sections.items()}
  return dataclasses.replace(model, **parts)


def faults(run, model: LlavaMiniConfig) -> list[str]:
  with pytest.raises(CheckpointError) as error:
    starting_parameters(run, model, make_mesh((1, 1, 1), devices=jax.devices()[:1]))
  head, *lines = str(error.value).splitlines()
  assert head == f'{run} does not fit this model:'
  return lines


def test_all_that_would_compute_something_else_is_listed(start):
  """Every parameter has its shape; the run would start silently with other numbers."""
  run, model = start
  wanted = changed(
    model,
    vision=dict(select_layer=-1, layer_norm_eps=1e-6),
    compressor=dict(key_position='none'),
    prefusion=dict(fuse_compressed=False),
    decoder=dict(rope_theta=10000.0, rope_scaling=RopeScaling(), rms_norm_eps=1e-6),
  )
  assert faults(run, wanted) == [
    '  model.vision.select_layer: stored -2, wanted -1',
    '  model.vision.layer_norm_eps: stored 1e-05, wanted 1e-06',
    "  model.compressor.key_position: stored 'query_table', wanted 'none'",
    '  model.prefusion.fuse_compressed: stored True, wanted False',
    '  model.decoder.rope_theta: stored 500000.0, wanted 10000.0',
    '  model.decoder.rope_scaling.factor: stored 8.0, wanted 1.0',
    '  model.decoder.rms_norm_eps: stored 1e-05, wanted 1e-06',
  ]


@pytest.mark.parametrize(
  ('section', 'change', 'line'),
  [
    ('compressor', dict(space='llm'), "model.compressor.space: stored 'vision', wanted 'llm'"),
    ('compressor', dict(attention='plain'), "model.compressor.attention: stored 'mha', wanted 'plain'"),
    ('compressor', dict(num_heads=4), 'model.compressor.num_heads: stored 8, wanted 4'),
    ('vision', dict(num_hidden_layers=2), 'model.vision.num_hidden_layers: stored 3, wanted 2'),
    (
      'decoder',
      dict(rope_scaling=RopeScaling(factor=8.0, low_freq_factor=2.0)),
      'model.decoder.rope_scaling.low_freq_factor: stored 1.0, wanted 2.0',
    ),
  ],
)
def test_each_field_counts(start, section, change, line):
  """Also where shapes differ too, and for a shorter tower, whose first layers would fit."""
  run, model = start
  assert faults(run, changed(model, **{section: change}))[0] == f'  {line}'


def test_what_computes_the_same_may_be_written_otherwise(start):
  """The same hidden state, counted from the other end; a number in float32; modules not shared; how it trains."""
  run, model = start
  wanted = changed(
    model,
    vision=dict(select_layer=model.vision.run_layers, keep_unused_layers=False),
    decoder=dict(rms_norm_eps=float(np.float32(model.decoder.rms_norm_eps))),
  )
  wanted = dataclasses.replace(
    wanted,
    compressor=CompressorConfig(kind='none', space='llm', num_heads=2),
    prefusion=PrefusionConfig(num_layers=0, fuse_compressed=False),
    dtype='float32',
    visual_chunk=2,
  )
  found = starting_parameters(run, wanted, make_mesh((1, 1, 1), devices=jax.devices()[:1]))
  assert {path.split('/')[0] for path in found} == {'vision', 'projector', 'decoder'}


def test_the_start_in_one_line(tmp_path, start):
  run, model = start
  bare = dataclasses.replace(model, compressor=CompressorConfig(kind='none'), prefusion=PrefusionConfig(num_layers=0))
  assert describe_start(run, model) == (
    f'from {run}: loaded vision, projector, compressor, prefusion, decoder; left out none; started anew: none'
  )
  assert describe_start(run, bare) == (
    f'from {run}: loaded vision, projector, decoder; left out compressor, prefusion; started anew: none'
  )
  llava = tmp_path / 'llava'
  hf.llava(tmp_path / 'source')
  stage1 = import_model(Sources(whole=str(tmp_path / 'source')), llava).model
  stage2 = dataclasses.replace(stage1, compressor=CompressorConfig(), prefusion=PrefusionConfig(num_layers=2))
  assert describe_start(llava, stage2) == (
    f'from {llava}: loaded vision, projector, decoder; left out none; started anew: compressor, prefusion'
  )
  copied = changed(stage2, prefusion=dict(init='decoder'))
  assert describe_start(llava, copied) == (
    f'from {llava}: loaded vision, projector, decoder; left out none; started anew: compressor; '
    'prefusion copied from the decoder'
  )
  assert describe_start(llava, changed(copied, prefusion=dict(num_layers=0))).endswith('started anew: compressor')

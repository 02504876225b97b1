"""The formulas of each kind of compressor: FLOPs by tracing the model, to the last product; memory by its caches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, structure
from test_flops import abstract_batch

from llava_mini_jax.analyze.cost_report import describe
from llava_mini_jax.analyze.flops import (
  decode_flops,
  forward_flops,
  kept_parts,
  later_question_flops,
  recomputed_flops,
)
from llava_mini_jax.analyze.jaxpr_flops import count
from llava_mini_jax.analyze.memory import image_memory, kept_activation_bytes, session_bytes
from llava_mini_jax.config import ConfigError, LlavaMiniConfig, ScanConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.infer.generate import prefill
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import abstract_model, merge

CASES = {
  'query': dict(kind='query', grid=2, key_position='none'),
  'query without tokens': dict(kind='query', grid=0),
  'average': dict(kind='average', grid=2),
  'average after the projector': dict(kind='average', grid=2, space='llm'),
  'mqt': dict(kind='mqt', grid=3, keep=5),
  'prumerge': dict(kind='prumerge', keep=4, neighbours=5),
  'prumerge_plus': dict(kind='prumerge_plus', keep=3, neighbours=5),
  'tokenpacker': dict(kind='tokenpacker', grid=2, layers=(0, 1, 2)),
  'llama_vid': dict(kind='llama_vid', grid=2, text_queries=3),
  'llama_vid after the projector': dict(kind='llama_vid', grid=1, text_queries=3, space='llm'),
  'voco': dict(kind='voco', keep=2),
  'none': dict(kind='none'),
  'within': dict(kind='query', grid=2, key_position='none', space='llm', within=1),
  'average within': dict(kind='average', grid=1, space='llm', within=1),
}


@pytest.mark.parametrize('views', [1, 5])
@pytest.mark.parametrize('case', CASES)
def test_forward(case, views):
  for fusion in (dict(num_layers=0), dict(num_layers=2), dict(num_layers=1, fuse_compressed=False)):
    if case == 'query without tokens' and not fusion['num_layers']:
      continue
    config = small_config(compressor=CASES[case], prefusion=fusion)
    sizes = dict(rows=2, length=160, visuals=2, fused_text=24, views=views)
    graphdef, params = abstract_model(config)
    program = jax.make_jaxpr(lambda params, batch, graphdef=graphdef: nnx.merge(graphdef, params)(batch))
    found = count(program(params, abstract_batch(config, **sizes)))
    assert forward_flops(config, **sizes).total == found.total


def caches(config: LlavaMiniConfig, text: int, visuals: int) -> list[tuple[int, int]]:
  """(layers, tokens in use) of each cache that reading a prompt leaves: `visuals` images, then text."""
  sample = random_sample(config, 0, text=(0,) * visuals + (text,), answer=0, visuals=(1,) * visuals)
  batch = lay_out(config, [sample], length=80, visuals=2, fused_text=8)
  read = quick_jit(lambda params, batch: prefill(merge(structure(config), params), batch, 96)[1])
  found = read(random_params(config), batch)
  parts = found if isinstance(found, tuple) else (found,)
  return [(part.keys.shape[0], int(part.length[0])) for part in parts]


@pytest.mark.parametrize('case', ['query', 'voco', 'none', 'within', 'average within'])
def test_what_is_kept_of_a_prompt(case):
  """The real caches: what they hold, layer by layer, and so the bytes of an image."""
  config = small_config(compressor=CASES[case], prefusion=dict(num_layers=1))
  two = caches(config, 5, 2)
  assert two == kept_parts(config, visuals=2, text=5)
  none = [(layers, 5) for layers, _ in two]
  more = sum(layers * (a - b) for (layers, a), (_, b) in zip(two, none, strict=True))
  of_token = 2 * config.decoder.num_key_value_heads * config.decoder.head_dim * 2
  assert 2 * image_memory(config).cache == more * of_token


def test_memory_of_an_image_where_the_decoder_compresses():
  model = LlavaMiniConfig.preset('vicuna_7b')
  of_layer = 2 * 4096 * 2
  within = dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, space='llm', within=8))
  assert image_memory(within).cache == (8 * 576 + 24 * 1) * of_layer
  voco = dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, kind='voco', keep=2))
  assert image_memory(voco).cache == 32 * 2 * of_layer
  assert session_bytes(voco) == (4 * 578 + 32 * 2) * of_layer


@pytest.mark.parametrize('remat', ['mlp', 'projections', 'attention', 'full'])
def test_what_is_computed_again_inside_the_decoder(remat):
  """The jaxpr of a training step with remat less that of one without; activations by layers and tokens."""
  config = small_config(compressor=CASES['within'], prefusion=dict(num_layers=0), scan=ScanConfig(remat=remat))
  sizes = dict(rows=2, length=40, visuals=2, fused_text=24)

  def counted(remat):
    changed = dataclasses.replace(config, scan=ScanConfig(remat=remat))
    groups = (('vision/.*', 'frozen'), ('.*', 1e-4))
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    trainer = make_trainer(changed, mesh, groups=groups, factor=lambda step: jnp.float32(1))
    with use_mesh(mesh):
      return count(jax.make_jaxpr(trainer.step)(trainer.abstract, abstract_batch(changed, **sizes, views=1))).total

  trains = ('projector', 'compressor', 'decoder')
  assert recomputed_flops(config, trains=trains, **sizes) == counted(remat) - counted('none')
  d = config.decoder
  width = d.hidden_size + (remat != 'full') * 32 + (remat in ('projections', 'mlp')) * 64
  width += (remat == 'mlp') * 2 * d.intermediate_size
  patches = 2 * config.vision.num_patches
  assert kept_activation_bytes(config, **sizes)['decoder'] == 2 * (1 * (patches + 40) + 1 * 40) * width * 2


def test_a_later_question_where_the_decoder_compresses():
  """Its tokens look at all patches in the layers before the compressor, and at what is kept in the others."""
  config = small_config(compressor=CASES['within'], prefusion=dict(num_layers=0))
  plain = small_config(compressor=CASES['query'] | dict(space='llm'), prefusion=dict(num_layers=0))
  more, patches, c = 4.0 * 7 * 32, config.vision.num_patches, config.tokens_per_visual
  found = [later_question_flops(model, 7, earlier=5, visuals=2).decoder for model in (config, plain)]
  assert found[0] - found[1] == more * 2 * (patches - c)  # of one layer
  voco = small_config(compressor=CASES['voco'], prefusion=dict(num_layers=0))
  found.append(later_question_flops(voco, 7, earlier=5, visuals=2).decoder)
  assert found[1] - found[2] == 2 * more * 2 * (4 - 2)  # of two layers: four tokens of an image against two


def test_what_no_formula_is_right_for():
  asking = small_config(compressor=CASES['llama_vid'])
  message = '^a later question: expected a compressor that does not read the question; found llama_vid$'
  with pytest.raises(ConfigError, match=message):
    later_question_flops(asking, 7, earlier=5)
  with pytest.raises(ConfigError, match=message):
    session_bytes(asking)
  with pytest.raises(ConfigError, match='^decode_flops: expected compressor.within=0; found 1$'):
    decode_flops(small_config(compressor=CASES['within']), rows=1, slots=9)


@pytest.mark.parametrize('case', CASES)
def test_the_costs_of_any_config(case):
  config = small_config(compressor=CASES[case])
  data, train = DataConfig(row_length=64, fused_text=24), TrainConfig(groups=(('.*', 1e-3),), batch_size=4)
  text = describe(Experiment(config, data, train), 9)
  assert ('question 2' in text) == ('second look' in text) == (not case.startswith('llama_vid'))
  cache = image_memory(config).cache / 2**20
  assert f'an image, this model: keys and values {cache:,.3f} MiB' in text and np.isfinite(cache)

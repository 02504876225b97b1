"""config.json ⇄ our config: what goes out comes back, what transformers writes is understood, the rest is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig, RopeScaling
from llava_mini_jax.convert.hf_config import CLIP_DEFAULTS, LLAMA_DEFAULTS, parts_from_hf, to_hf_config
from llava_mini_jax.convert.tensor_writer import parse_size
from llava_mini_jax.experiment import DataConfig


def test_what_the_released_layout_cannot_hold():
  model = LlavaMiniConfig.preset('vicuna_7b')
  model = dataclasses.replace(
    model,
    compressor=CompressorConfig(space='llm', attention='plain'),
    prefusion=dataclasses.replace(model.prefusion, fuse_compressed=False),
  )
  with pytest.raises(ConfigError) as error:
    to_hf_config(model)
  assert str(error.value) == (
    "the released layout cannot hold this model: compressor.space: expected 'vision', found 'llm'; "
    "compressor.attention: expected 'mha', found 'plain'; prefusion.fuse_compressed: expected True, found False"
  )
  with pytest.raises(ConfigError, match="compressor.kind: expected 'query', found 'none'"):
    to_hf_config(dataclasses.replace(model, compressor=CompressorConfig(kind='none')))


@pytest.mark.parametrize('name', ['vicuna_7b', 'vicuna_13b', 'llama31_8b', 'smollm2_135m', 'tiny'])
def test_configs_out_and_in(name):
  """All that the layout holds comes back: sizes, rope, ties; not how it trains."""
  model = LlavaMiniConfig.preset(name)
  vision = dataclasses.replace(model.vision, keep_unused_layers=True)
  expected = dataclasses.replace(
    LlavaMiniConfig(vision=vision, compressor=model.compressor, prefusion=model.prefusion, decoder=model.decoder)
  )
  config, tower = json.loads(json.dumps(to_hf_config(model)))
  assert LlavaMiniConfig.from_hf(config, tower) == expected
  parts = parts_from_hf(config, tower)
  assert (parts.vision, parts.decoder, parts.compressor, parts.prefusion) == (
    expected.vision,
    expected.decoder,
    expected.compressor,
    expected.prefusion,
  )
  if tower['image_size'] == 336:
    assert parts_from_hf(config).vision == expected.vision, 'known by name'


def test_configs_as_transformers_reads_and_writes_them():
  """Defaults are theirs, and so is what the rope settings mean."""
  llama, clip = transformers.LlamaConfig().to_dict(), transformers.CLIPVisionConfig().to_dict()
  assert {name: llama[name] for name in LLAMA_DEFAULTS} == LLAMA_DEFAULTS
  assert {name: clip[name] for name in CLIP_DEFAULTS} == CLIP_DEFAULTS
  assert parts_from_hf(llama) == parts_from_hf(dict(model_type='llama'))
  assert parts_from_hf(clip) == parts_from_hf(dict(model_type='clip_vision_model'))
  model = LlavaMiniConfig.preset('llama31_8b')
  theirs = transformers.LlamaConfig.from_dict(to_hf_config(model)[0]).to_dict()
  assert parts_from_hf({**theirs, 'model_type': 'llama'}).decoder == model.decoder
  assert model.decoder.rope_scaling == RopeScaling(factor=8.0)


LLAVA = dict(
  model_type='llava', text_config=dict(model_type='llama'), vision_config=dict(model_type='clip_vision_model')
)
REFUSED = {
  "vision_feature_select_strategy: expected default; found 'full'": dict(vision_feature_select_strategy='full'),
  'vision_feature_layer: expected one layer; found [-2, -5]': dict(vision_feature_layer=[-2, -5]),
  "projector_hidden_act: expected gelu; found 'relu'": dict(projector_hidden_act='relu'),
  "model_type: expected a llama decoder; found 'mistral'": dict(text_config=dict(model_type='mistral')),
  'mlp_bias: expected False; found True': dict(text_config=dict(mlp_bias=True)),
  'vision_config: missing': dict(vision_config=None),
}


@pytest.mark.parametrize('message', REFUSED)
def test_llavas_that_this_model_is_not(message):
  assert parts_from_hf(LLAVA).select_layer == -2
  with pytest.raises(ConfigError) as error:
    parts_from_hf({**LLAVA, **REFUSED[message]})
  assert str(error.value) == f'config.json {message}'


def test_towers_that_this_model_has_not():
  for change, message in (
    (dict(hidden_act='gelu'), "hidden_act: expected quick_gelu; found 'gelu'"),
    (dict(model_type='siglip_vision_model'), "model_type: expected clip_vision_model; found 'siglip_vision_model'"),
  ):
    with pytest.raises(ConfigError) as error:
      parts_from_hf({**LLAVA, 'vision_config': change})
    assert str(error.value) == f'vision config {message}'


RELEASED = to_hf_config(LlavaMiniConfig.preset('tiny'))[0]
ODD = {
  "rope_scaling: expected an object; found 'linear'": dict(rope_scaling='linear'),
  "rope_scaling.factor: expected float; found '8'": dict(rope_scaling=dict(rope_type='llama3', factor='8')),
  'rope_parameters: expected an object; found [8]': dict(rope_parameters=[8]),
  "rope_parameters.rope_theta: expected float; found 'x'": dict(rope_parameters=dict(rope_theta='x')),
  'rope_theta: expected float; found inf': dict(rope_theta=float('inf')),
  "rms_norm_eps: expected float; found 'x'": dict(rms_norm_eps='x'),
  'hidden_size: expected int; found 96.5': dict(hidden_size=96.5),
  'num_key_value_heads: expected int; found [2]': dict(num_key_value_heads=[2]),
  'tie_word_embeddings: expected bool; found 1': dict(tie_word_embeddings=1),
  'num_hidden_layers: expected int; found True': dict(num_hidden_layers=True),
  'prefusion_layer_num: expected int; found None': dict(prefusion_layer_num=None),
  'compressor_size: expected int; found 1.0': dict(compressor_size=1.0),
  "mm_vision_select_layer: expected int; found '-2'": dict(mm_vision_select_layer='-2'),
  "mm_vision_tower: expected str; found ['a']": dict(mm_vision_tower=['a']),
  "resolution_ratio: expected int; found '2'": dict(resolution_ratio='2'),
  'resolution_ratio: expected a positive integer; found 0': dict(resolution_ratio=0),
  'llava_mini_jax: expected an object; found 7': dict(llava_mini_jax=7),
  'llava_mini_jax: expected template, default_system, grid_order; found workers': dict(llava_mini_jax=dict(workers=1)),
  'llava_mini_jax.template: expected str; found 7': dict(llava_mini_jax=dict(template=7)),
  'text_config: expected an object; found [1]': dict(text_config=[1], vision_config={}),
  "vision_config: expected an object; found 'x'": dict(text_config={}, vision_config='x'),
}


@pytest.mark.parametrize('message', ODD)
def test_values_of_odd_types(message):
  """One line that names the field, instead of a traceback or an import that takes them."""
  with pytest.raises(ConfigError) as error:
    parts_from_hf({**RELEASED, **ODD[message]})
  assert str(error.value).replace('config.json.', 'config.json ') == f'config.json {message}'


def test_odd_towers():
  for change, message in (
    (dict(layer_norm_eps='x'), "layer_norm_eps: expected float; found 'x'"),
    (dict(image_size=[336, 336]), 'image_size: expected int; found [336, 336]'),
  ):
    with pytest.raises(ConfigError) as error:
      parts_from_hf(dict(model_type='clip_vision_model', **change))
    assert str(error.value) == f'vision config {message}'
  with pytest.raises(ConfigError, match=r"^config.json vision_config: expected an object; found 'x'$"):
    parts_from_hf(dict(model_type='clip', vision_config='x'))
  with pytest.raises(ConfigError, match='num_attention_heads: expected a positive integer; found 0$'):
    parts_from_hf(dict(model_type='llama', num_attention_heads=0))


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    (dict(resolution_ratio=2, image_aspect_ratio='pad'), dict(grid=2, aspect='pad')),
    (dict(image_aspect_ratio='square'), dict(grid=1, aspect='crop')),
    (dict(), dict(grid=1, aspect='crop')),
  ],
)
def test_how_images_are_cut(config, expected):
  """As the released package evaluates: ratio 1 if there is none; padded only if it says so; split before padding."""
  assert parts_from_hf({**LLAVA, **config}).data == dict(**expected, grid_order='split_then_pad')


@pytest.mark.parametrize('name', ['template', 'default_system', 'grid_order', 'grid', 'aspect'])
def test_how_images_are_cut_and_prompts_written_comes_back(name):
  other = dict(template='llama_3_1', default_system=False, grid_order='resize', grid=2, aspect='crop')
  data = DataConfig(**{name: other[name]})
  config = json.loads(json.dumps(to_hf_config(LlavaMiniConfig.preset('tiny'), data=data)[0]))
  assert (config['resolution_ratio'], config['image_aspect_ratio']) == (
    2 if name == 'grid' else 1,
    'square' if name == 'aspect' else 'pad',
  )
  assert DataConfig(**parts_from_hf(config).data) == data


def test_a_llava_has_one_view():
  model = LlavaMiniConfig.preset('tiny')
  bare = dataclasses.replace(
    model, compressor=CompressorConfig(kind='none'), prefusion=dataclasses.replace(model.prefusion, num_layers=0)
  )
  to_hf_config(bare, data=DataConfig())
  with pytest.raises(ConfigError) as error:
    to_hf_config(bare, data=DataConfig(grid=2))
  assert str(error.value) == 'the released layout cannot hold this model: data.grid: expected 1, found 2'


@pytest.mark.parametrize(('text', 'size'), [('5GB', 5 * 10**9), ('1.5 mb', 1_500_000), ('200KB', 200_000), ('7', 7)])
def test_sizes(text, size):
  assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', '0', '-1GB', '5 apples', 'GB'])
def test_no_sizes(text):
  with pytest.raises(ConfigError) as error:
    parse_size(text)
  assert str(error.value) == f'max_shard_size: expected a size such as 5GB or 500MB; found {text!r}'

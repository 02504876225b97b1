"""Configs: what every file in configs/ says, what a mistake in one is told, and the released package's own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import ml_collections
import pytest
import qwix

from llava_mini_jax.config import (
  COMPRESSORS,
  CompressorConfig,
  ConfigError,
  DecoderConfig,
  LlavaMiniConfig,
  PrefusionConfig,
  RopeScaling,
  ScanConfig,
  VisionConfig,
)
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.presets import PRESETS
from llava_mini_jax.recipes import STAGES, paper_stage
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.lora import adapter_names, target_paths
from llava_mini_jax.train.optimizer import assign_groups
from llava_mini_jax.train.start import trainer_for
from llava_mini_jax.train.tree import flatten, parameter_shapes

CONFIGS = Path(__file__).parents[1] / 'configs'
PAPER = ('llava_mini_vicuna_7b', 'llava_mini_vicuna_13b', 'llava_mini_llama31_8b')
ARGUMENTS = {
  **{name: [(), *((stage,) for stage in STAGES)] for name in PAPER},
  'tiny_easy_vqa': [(), ('epochs=40',)],
  'smollm2_easy_vqa': [(), ('steps=9',)],
  'tiny_scenes': [(), ('stage2',)],
  'benchmark_7b': [(), ('mini,2048',), ('decoder',), ('v15',)],
}
CASES = [(name, arguments) for name, several in ARGUMENTS.items() for arguments in several]


def load(name: str, *arguments: str) -> ml_collections.ConfigDict:
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


@functools.cache
def rates(name: str, *arguments: str) -> dict[str, float | None]:
  """Learning rate of every parameter; raises ConfigError if the groups do not fit the model."""
  experiment = Experiment.from_dict(load(name, *arguments))
  paths = list(parameter_shapes(experiment.model))
  adapters = [name for path in target_paths(paths, experiment.train.lora_targets) for name in adapter_names(path)]
  return assign_groups([*paths, *adapters], experiment.train.groups)


def test_every_config_is_covered():
  assert sorted(path.stem for path in CONFIGS.glob('*.py')) == sorted(ARGUMENTS)


@pytest.mark.parametrize('preset', PRESETS)
def test_a_preset_round_trip(preset):
  model = LlavaMiniConfig.preset(preset)
  assert LlavaMiniConfig.from_dict(model.to_dict()) == model
  assert LlavaMiniConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize(('name', 'arguments'), CASES)
def test_a_config_round_trip(name, arguments):
  config = load(name, *arguments)
  experiment = Experiment.from_dict(config)
  assert experiment.to_config_dict() == config
  assert Experiment.from_dict(experiment.to_dict()) == experiment
  through_json = Experiment.from_dict(json.loads(json.dumps(experiment.to_dict())))
  assert through_json == experiment
  hash(through_json)  # lists have become tuples again


@pytest.mark.parametrize('name', ARGUMENTS)
def test_the_groups_fit_the_model(name):
  for arguments in ARGUMENTS[name][1:]:
    assert any(rates(name, *arguments).values())


@pytest.mark.parametrize('name', PAPER)
def test_stage_1_trains_the_projector_alone(name):
  """Table 9: 1e-3 for an epoch of batches of 256; every patch goes to the decoder (Sec. 4.3)."""
  experiment = Experiment.from_dict(load(name, 'stage1'))
  found = rates(name, 'stage1')
  assert {path.split('/')[0] for path in found} == {'vision', 'projector', 'decoder'}
  trained = {path: rate for path, rate in found.items() if rate is not None}
  assert set(trained) == {path for path in found if path.startswith('projector/')}
  assert len(trained) == 4 and set(trained.values()) == {1e-3}
  assert experiment.model.tokens_per_visual == 576
  assert (experiment.data.template, experiment.train.epochs) == ('plain', 1.0)
  assert (experiment.train.batch_size, experiment.train.warmup_ratio) == (256, 0.03)


@pytest.mark.parametrize('name', PAPER)
def test_stage_2_trains_all_but_the_vision_tower_and_the_embeddings(name):
  """Table 9: the language model at 1e-4, the multimodal modules at 1e-5, 2 epochs of batches of 256."""
  experiment = Experiment.from_dict(load(name, 'stage2'))
  found = rates(name, 'stage2')
  expected = dict(vision=None, projector=1e-5, compressor=1e-5, prefusion=1e-5, decoder=1e-4)
  assert {path.split('/')[0] for path in found} == set(expected)
  for path, rate in found.items():
    assert rate == (None if path == 'decoder/embed_tokens' else expected[path.split('/')[0]]), path
  assert 'decoder/embed_tokens' in found
  assert (experiment.model.tokens_per_visual, experiment.model.prefusion.num_layers) == (1, 4)
  assert experiment.data.template == ('vicuna_v1' if 'vicuna' in name else 'llama_3_1')
  assert (experiment.train.batch_size, experiment.train.warmup_ratio, experiment.train.epochs) == (256, 0.03, 2.0)
  assert load(name) == load(name, 'stage2')


def test_the_stages_share_the_modules_that_they_hand_on():
  """What stage 1 trained fits stage 2."""
  for name in PAPER:
    first, second = (parameter_shapes(Experiment.from_dict(load(name, stage)).model) for stage in ('stage1', 'stage2'))
    assert first == {path: second[path] for path in first}
    assert {path.split('/')[0] for path in second.keys() - first.keys()} == {'compressor', 'prefusion'}


def test_overrides_from_the_command_line():
  """Every leaf is a field that can be overridden in place, and what comes back is typed and checked."""
  config = load('tiny_easy_vqa', 'epochs=40')
  assert Experiment.from_dict(config).train.epochs == 40.0
  config.train.batch_size = 8
  config.model.decoder.rope_scaling.factor = 2
  config.train.mesh = (2, 2, 2)
  experiment = Experiment.from_dict(config)
  assert (experiment.train.batch_size, experiment.train.mesh) == (8, (2, 2, 2))
  assert experiment.model.decoder.rope_scaling.factor == 2


TINY = LlavaMiniConfig.preset('tiny')
SIZES = dict(
  vocab_size=8,
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=2,
)


def replaced(**changes):
  return lambda: dataclasses.replace(TINY, **changes)


def decoder(**changes):
  return lambda: DecoderConfig(**{**SIZES, **changes})


def model_dict(path: str, value):
  """The tiny model's dict with the field at `path` set, or deleted if value is KeyError."""

  def build():
    values = TINY.to_dict()
    *parents, last = path.split('.')
    section = functools.reduce(lambda part, key: part[key], parents, values)
    if value is KeyError:
      del section[last]
    else:
      section[last] = value
    return LlavaMiniConfig.from_dict(values)

  return build


def experiment_dict(section: str, **changes):
  def build():
    values = Experiment(TINY, DataConfig(), TrainConfig()).to_dict()
    values[section] |= changes
    return Experiment.from_dict(values)

  return build


def sections(**changes):
  def build():
    values = Experiment(TINY, DataConfig(), TrainConfig()).to_dict() | changes
    return Experiment.from_dict({name: value for name, value in values.items() if value is not None})

  return build


NAN, INFINITE = float('nan'), float('inf')
MISTAKES = {
  # one field that is wrong by itself
  'VisionConfig.hidden_size: expected a positive integer; found 0': lambda: VisionConfig(hidden_size=0),
  'VisionConfig.patch_size: expected a positive integer; found -14': lambda: VisionConfig(patch_size=-14),
  'VisionConfig.num_hidden_layers: expected a positive integer; found True': lambda: VisionConfig(
    num_hidden_layers=True
  ),
  'VisionConfig.image_size: expected a positive integer; found 336.0': lambda: VisionConfig(image_size=336.0),
  'VisionConfig.select_layer=-26 is not a hidden state of 24 layers': lambda: VisionConfig(select_layer=-26),
  'VisionConfig.select_layer=25 is not a hidden state of 24 layers': lambda: VisionConfig(select_layer=25),
  f"CompressorConfig.kind: expected one of {', '.join(COMPRESSORS)}; found 'pool'": lambda: CompressorConfig(
    kind='pool'
  ),
  "CompressorConfig.space: expected one of vision, llm; found ''": lambda: CompressorConfig(space=''),
  "CompressorConfig.attention: expected one of mha, plain; found 'MHA'": lambda: CompressorConfig(attention='MHA'),
  "CompressorConfig.key_position: expected one of query_table, native_grid, none; found 'grid'": lambda: (
    CompressorConfig(key_position='grid')
  ),
  'CompressorConfig.grid: expected 0 or more; found -1': lambda: CompressorConfig(grid=-1),
  'CompressorConfig.num_heads: expected a positive integer; found -8': lambda: CompressorConfig(num_heads=-8),
  "PrefusionConfig.init: expected one of random, decoder; found 'zero'": lambda: PrefusionConfig(init='zero'),
  'PrefusionConfig.num_layers: expected 0 or more; found -1': lambda: PrefusionConfig(num_layers=-1),
  'DecoderConfig.vocab_size: expected a positive integer; found 0': decoder(vocab_size=0),
  'DecoderConfig.max_position_embeddings: expected a positive integer; found 0': decoder(max_position_embeddings=0),
  'DecoderConfig.head_dim: rotary embedding needs an even size; found 3': decoder(head_dim=3),
  "ScanConfig.remat: expected one of full, attention, projections, mlp, dots, none; found 'some'": lambda: ScanConfig(
    remat='some'
  ),
  "LlavaMiniConfig.text_only: expected one of skip, zero_image; found 'drop'": replaced(text_only='drop'),
  "LlavaMiniConfig.dtype: expected one of bfloat16, float32; found 'int8'": replaced(dtype='int8'),
  # fields that do not go together
  'VisionConfig.hidden_size=100 is not a multiple of num_attention_heads=16': lambda: VisionConfig(hidden_size=100),
  'VisionConfig.image_size=337 is not a multiple of patch_size=14': lambda: VisionConfig(image_size=337),
  'DecoderConfig.num_attention_heads=4 is not a multiple of num_key_value_heads=3': decoder(num_key_value_heads=3),
  'compressor width 96 is not a multiple of num_heads=7': replaced(compressor=CompressorConfig(num_heads=7)),
  'prefusion.init=decoder needs 3 decoder layers; there are 2': replaced(
    prefusion=PrefusionConfig(num_layers=3, init='decoder')
  ),
  # names
  "unknown preset 'vicuna7b'; did you mean 'vicuna_7b'?": lambda: LlavaMiniConfig.preset('vicuna7b'),
  "unknown preset 'x'; expected one of llama31_8b, smollm2_135m, tiny, vicuna_13b, vicuna_7b": lambda: (
    LlavaMiniConfig.preset('x')
  ),
  "model.decoder.hiden_size: unknown field; did you mean 'hidden_size'?": model_dict('decoder.hiden_size', 8),
  'model.scan.x: unknown field; expected one of prefusion_remat, remat, unroll, vision_remat': model_dict('scan.x', 8),
  "train.batchsize: unknown field; did you mean 'batch_size'?": experiment_dict('train', batchsize=8),
  "data.data_set: unknown field; did you mean 'dataset'?": experiment_dict('data', data_set=''),
  "config: expected the sections model, data, train; missing ['train'], unknown ['trian']": sections(
    train=None, trian={}
  ),
  f"stage: expected one of {', '.join(STAGES)}; found 'stage3'": lambda: load('llava_mini_vicuna_7b', 'stage3'),
  # what is missing
  'model: missing decoder': model_dict('decoder', KeyError),
  'model.decoder: missing vocab_size': model_dict('decoder.vocab_size', KeyError),
  # types
  'model.vision: expected a mapping of fields; found 3': model_dict('vision', 3),
  'model.decoder.rope_scaling: expected a mapping of fields; found None': model_dict('decoder.rope_scaling', None),
  'model.decoder.hidden_size: expected int; found 96.0': model_dict('decoder.hidden_size', 96.0),
  'model.decoder.hidden_size: expected int; found True': model_dict('decoder.hidden_size', True),
  "model.decoder.hidden_size: expected int; found '96'": model_dict('decoder.hidden_size', '96'),
  'model.detach_text: expected bool; found 1': model_dict('detach_text', 1),
  'model.dtype: expected str; found None': model_dict('dtype', None),
  'model.decoder.rope_theta: expected float; found nan': model_dict('decoder.rope_theta', NAN),
  'model.decoder.rope_theta: expected float; found -inf': model_dict('decoder.rope_theta', -INFINITE),
  'model.decoder.rope_theta: expected float; found False': model_dict('decoder.rope_theta', False),
  'train.weight_decay: expected float; found nan': experiment_dict('train', weight_decay=NAN),
  "train.mesh: expected tuple; found '1,8,1'": experiment_dict('train', mesh='1,8,1'),
  # data
  "DataConfig.aspect: expected one of pad, crop; found 'stretch'": experiment_dict('data', aspect='stretch'),
  "DataConfig.bad_sample: expected one of raise, mask; found 'skip'": experiment_dict('data', bad_sample='skip'),
  'DataConfig.bad_sample_share: expected a share from 0 to 1; found 1.5': experiment_dict('data', bad_sample_share=1.5),
  'data.bad_sample_share: expected float; found nan': experiment_dict('data', bad_sample_share=NAN),
  'DataConfig.row_length: expected a positive integer; found 0': experiment_dict('data', row_length=0),
  'DataConfig.row_lengths: expected none without group_by_length': experiment_dict('data', row_lengths=[9]),
  'DataConfig.row_lengths: expected positive integers; found (9, True)': experiment_dict('data', row_lengths=[9, True]),
  "DataConfig.visual_counts: expected positive integers; found ('9',)": experiment_dict('data', visual_counts=['9']),
  'TrainConfig.init_fresh: expected patterns; found (3,)': experiment_dict('train', init_fresh=[3]),
  'data: expected a mapping of fields; found []': sections(data=[]),
  "config: expected the sections model, data, train; found 'x'": lambda: Experiment.from_dict('x'),
  'DataConfig.visual_counts: expected none without group_by_length': experiment_dict('data', visual_counts=[9]),
  **{
    f'DataConfig.{field}: expected 0 or more; found -1': experiment_dict('data', **{field: -1})
    for field in ('visuals_per_row', 'fused_text', 'max_turns', 'shift', 'workers')
  },
  'DataConfig.flip: expected a probability; found 1.5': experiment_dict('data', flip=1.5),
  'DataConfig.flip: expected a probability; found -0.1': experiment_dict('data', flip=-0.1),
  # training
  **{
    f'TrainConfig.{field}: expected a positive integer; found 0': experiment_dict('train', **{field: 0})
    for field in ('batch_size', 'log_every', 'save_every', 'keep')
  },
  **{
    f'TrainConfig.{field}: expected 0 <= value < 1; found {value}': experiment_dict('train', **{field: value})
    for field, value in (('warmup_ratio', 1.0), ('beta1', -0.5), ('beta2', 2))
  },
  **{
    f'TrainConfig.{field}: expected a positive number; found {value}': experiment_dict('train', **{field: value})
    for field, value in (('epochs', 0), ('eps', -1e-8), ('max_grad_norm', 0.0))
  },
  'TrainConfig: weight_decay and max_steps must not be negative': experiment_dict('train', weight_decay=-0.1),
  "TrainConfig.groups: expected (pattern, learning rate or 'frozen'); found ('.*',)": experiment_dict(
    'train', groups=[['.*']]
  ),
  "TrainConfig.groups: expected (pattern, learning rate or 'frozen'); found (1, 2)": experiment_dict(
    'train', groups=[['.*', 1e-4], [1, 2]]
  ),
  "TrainConfig.groups: expected (pattern, learning rate or 'frozen'); found '.*'": experiment_dict(
    'train', groups=['.*', 1e-4]
  ),
  '7 row(s) in 1 epochs do not fill one batch of 8': lambda: Experiment(
    TINY, DataConfig(), TrainConfig(batch_size=8)
  ).total_steps(7),
}


@pytest.mark.parametrize('message', MISTAKES)
def test_mistakes(message):
  with pytest.raises(ConfigError) as error:
    MISTAKES[message]()
  assert str(error.value) == message


def test_a_negative_max_steps_too():
  with pytest.raises(ConfigError, match='^TrainConfig: weight_decay and max_steps must not be negative$'):
    TrainConfig(max_steps=-1)


def test_whole_numbers_are_numbers():
  assert Experiment.from_dict(Experiment(TINY, DataConfig(flip=1), TrainConfig(epochs=2)).to_dict()).train.epochs == 2


@pytest.mark.parametrize(
  ('rows', 'train', 'steps'),
  [
    (16, dict(batch_size=8), 2),
    (23, dict(batch_size=8), 2),
    (160, dict(batch_size=8, max_steps=3), 3),
    (16, dict(batch_size=8, max_steps=30), 2),
  ],
)
def test_steps_of_a_run(rows, train, steps):
  assert Experiment(TINY, DataConfig(), TrainConfig(**train)).total_steps(rows) == steps


def test_a_stage_replaces_only_what_it_says():
  model = LlavaMiniConfig.preset('smollm2_135m')
  first = paper_stage(model, 'stage1', template='chatml', name='x').model
  assert first.to_dict() | {'compressor': None, 'prefusion': None} == model.to_dict() | {
    'compressor': None,
    'prefusion': None,
  }
  assert paper_stage(model, 'stage2', template='chatml', name='x').model == model
  assert paper_stage(model, 'stage1_full', template='chatml', name='x').model == model


def test_a_tied_table_trains_as_the_head_that_it_is():
  experiment = paper_stage(LlavaMiniConfig.preset('smollm2_135m'), 'stage2', template='chatml', name='x')
  found = assign_groups(parameter_shapes(experiment.model), experiment.train.groups)
  assert found['decoder/embed_tokens'] == 1e-4 and 'decoder/lm_head' not in found


@pytest.mark.parametrize('name', PAPER)
def test_the_released_stage_1(name):
  """All modules but the pretrained ones, on the compressed token."""
  experiment = Experiment.from_dict(load(name, 'stage1_full'))
  trained = {path.split('/')[0] for path, rate in rates(name, 'stage1_full').items() if rate is not None}
  assert trained == {'projector', 'compressor', 'prefusion'}
  assert experiment.model == Experiment.from_dict(load(name, 'stage2')).model


@pytest.mark.parametrize('name', PAPER)
def test_high_resolution_and_video(name):
  hd, video, plain = (Experiment.from_dict(load(name, stage)) for stage in ('stage2_hd', 'stage2_video', 'stage2'))
  assert (hd.model.compressor.grid, hd.model.tokens_per_visual, hd.data.grid) == (8, 64, 2)
  assert (video.model.tokens_per_visual, video.data.visuals_per_row, video.data.video_fps) == (1, 60, 1.0)
  assert video.data.group_by_length and video.data.visual_counts == (1, 8, 60)
  assert [row[0] for row in video.data.mixture] == ['data/llava_instructions', 'data/video_instructions']
  assert hd.train == video.train == plain.train


@pytest.mark.parametrize('name', PAPER)
def test_stage_2_with_lora(name):
  """Nothing of the decoder trains but its adapters: 2 · 128 · (inputs + outputs) numbers for seven kernels a layer."""
  experiment = Experiment.from_dict(load(name, 'stage2_lora'))
  trainer = trainer_for(experiment, make_mesh((1, 1, 1), devices=jax.devices()[:1]), total_steps=10)
  trained = flatten(trainer.abstract['params'])
  assert {path.split('/')[0] for path in trained} == {'lora', 'projector', 'compressor', 'prefusion'}
  c = experiment.model.decoder
  d, f, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
  each = 2 * (d + d) + 2 * (d + kv) + 3 * (d + f)
  adapters = [leaf.size for path, leaf in trained.items() if path.startswith('lora/')]
  assert sum(adapters) == c.num_hidden_layers * 128 * each
  optimizer = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract['opt']))
  assert optimizer == 2 * sum(leaf.size for leaf in trained.values()) + 2


def test_fine_tuning_in_four_bits():
  """Every kernel of decoder and pre-fusion is kept in int4, and only its adapter trains."""
  experiment = Experiment.from_dict(load('llava_mini_vicuna_7b', 'finetune_qlora'))
  trainer = trainer_for(experiment, make_mesh((1, 1, 1), devices=jax.devices()[:1]), total_steps=10)
  trained, kept = flatten(trainer.abstract['params']), flatten(trainer.abstract['frozen'])
  assert {path.split('/')[0] for path in trained} == {'lora', 'projector', 'compressor'}
  kernels = {path for path in parameter_shapes(experiment.model) if re.fullmatch('(prefusion|decoder)/.*_proj', path)}
  assert {path for path, leaf in kept.items() if isinstance(leaf, qwix.QArray)} == kernels
  assert {path for path in trained if path.startswith('lora/')} == {n for path in kernels for n in adapter_names(path)}
  assert (experiment.train.init_from, experiment.train.init_fresh) == ('runs/vicuna_7b_stage2', ())


@pytest.mark.parametrize('name', PAPER)
def test_the_stages_start_from_each_other(name):
  first, second = (Experiment.from_dict(load(name, stage)).train for stage in ('stage1', 'stage2'))
  short = name.removeprefix('llava_mini_')
  assert (first.init_from, second.init_from) == (f'runs/{short}_start', f'runs/{short}_stage1')
  text = (CONFIGS / f'{name}.py').read_text()
  assert f'--to={first.init_from}' in text and f'--workdir={second.init_from}\n' in text
  fresh = [path for path in rates(name, 'stage2') if path not in rates(name, 'stage1')]
  assert all(any(re.fullmatch(pattern, path) for pattern in second.init_fresh) for path in fresh)


# What the released llava-mini-llama-3.1-8b says, and CLIP-ViT-L/14-336; keys that nothing reads are left out.
RELEASED = {
  'compressor_size': 1,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mm_projector_type': 'mlp2x_gelu',
  'mm_vision_select_layer': -2,
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'prefusion_layer_num': 4,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'high_freq_factor': 4.0,
    'low_freq_factor': 1.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'vocab_size': 128256,
}
CLIP = {
  'hidden_act': 'quick_gelu',
  'hidden_size': 1024,
  'image_size': 336,
  'intermediate_size': 4096,
  'layer_norm_eps': 1e-05,
  'num_attention_heads': 16,
  'num_hidden_layers': 24,
  'patch_size': 14,
}


def unused_layers_kept(model: LlavaMiniConfig) -> LlavaMiniConfig:
  return dataclasses.replace(model, vision=dataclasses.replace(model.vision, keep_unused_layers=True))


def test_the_released_config_is_the_preset():
  assert LlavaMiniConfig.from_hf(RELEASED, CLIP) == unused_layers_kept(LlavaMiniConfig.preset('llama31_8b'))


def test_a_vicuna_config_is_the_preset():
  """No rope scaling, and what older files leave out."""
  config = {key: value for key, value in RELEASED.items() if key not in ('num_key_value_heads', 'rope_theta')}
  config |= {'rope_scaling': None, 'vocab_size': 32000, 'intermediate_size': 11008, 'max_position_embeddings': 4096}
  assert LlavaMiniConfig.from_hf(config, CLIP) == unused_layers_kept(LlavaMiniConfig.preset('vicuna_7b'))


@pytest.mark.parametrize(
  ('change', 'read'),
  [
    ({'compressor_size': 2}, lambda model: (model.tokens_per_visual, 4)),
    ({'prefusion_layer_num': 2}, lambda model: (model.prefusion.num_layers, 2)),
    ({'mm_vision_select_layer': -1}, lambda model: (model.vision.run_layers, 24)),
    ({'head_dim': 64}, lambda model: (model.decoder.head_dim, 64)),
    ({'tie_word_embeddings': True}, lambda model: (model.decoder.tie_word_embeddings, True)),
    (
      {'rope_scaling': {'type': 'llama3', 'factor': 4.0}},
      lambda model: (dataclasses.astuple(model.decoder.rope_scaling), (4.0, 1.0, 4.0, 8192)),
    ),
    # as transformers 5 writes it
    (
      {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 3e5, 'factor': 2.0}, 'rope_theta': None},
      lambda model: (
        (model.decoder.rope_theta, *dataclasses.astuple(model.decoder.rope_scaling)),
        (3e5, 2.0, 1.0, 4.0, 8192),
      ),
    ),
    (
      {'rope_parameters': {'rope_type': 'default', 'rope_theta': 3e5}},
      lambda model: ((model.decoder.rope_theta, model.decoder.rope_scaling), (3e5, RopeScaling())),
    ),
  ],
)
def test_each_released_field_is_read(change, read):
  found, expected = read(LlavaMiniConfig.from_hf({**RELEASED, **change}, CLIP))
  assert found == expected


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}},
      "config.json rope_scaling: expected type llama3 or null; found 'yarn'",
    ),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
      "config.json rope_scaling: expected type llama3 or null; found 'linear'",
    ),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}},
      "config.json rope_parameters: expected type llama3 or null; found 'yarn'",
    ),
    ({'mm_projector_type': 'linear'}, "config.json mm_projector_type: expected mlp2x_gelu; found 'linear'"),
    ({'num_key_value_heads': 5}, 'DecoderConfig.num_attention_heads=32 is not a multiple of num_key_value_heads=5'),
  ],
)
def test_released_configs_that_this_model_is_not(change, message):
  with pytest.raises(ConfigError) as error:
    LlavaMiniConfig.from_hf({**RELEASED, **change}, CLIP)
  assert str(error.value) == message

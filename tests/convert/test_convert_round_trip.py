"""In, out and in again without a changed bit; exports that `transformers` reads; weights straight to any mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tracemalloc

import hf_directories as hf
import jax
import numpy as np
import pytest
import torch
import transformers
from small_model import quick_jit, random_params
from torch_parity import close

from llava_mini_jax.config import (
  CompressorConfig,
  LlavaMiniConfig,
  PrefusionConfig,
)
from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.convert.released import from_released
from llava_mini_jax.convert.run_parameters import open_parameters, starting_parameters
from llava_mini_jax.convert.tensor_files import TensorFiles
from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.checkpoint import CheckpointError, Checkpoints
from llava_mini_jax.train.tree import abstract_model, flatten, merge, parameter_shapes, sharded_model, unflatten

MESHES = {'fsdp': (1, 8, 1), 'tensor': (1, 4, 2), 'one': (1, 1, 1)}


def mesh_of(name: str) -> jax.sharding.Mesh:
  shape = MESHES[name]
  return make_mesh(shape, devices=jax.devices()[: math.prod(shape)])


def shardings_of(config: LlavaMiniConfig, mesh: jax.sharding.Mesh) -> dict:
  return {path: leaf.sharding for path, leaf in sharded_model(config, mesh)[1].items()}


@pytest.fixture(scope='module')
def released(tmp_path_factory):
  """A released checkpoint and the run it was imported to, in several shards. Never to be written to."""
  root = tmp_path_factory.mktemp('released')
  hf.released(root / 'hf')
  import_model(Sources(whole=str(root / 'hf')), root / 'run', max_shard_size='500KB')
  return root


def weights_of(run) -> dict[str, np.ndarray]:
  files = TensorFiles(run / 'weights')
  return {name: np.array(files.read(name)) for name in files.tensors}


def same_bits(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  for name in expected:
    a, b = np.asarray(found[name]), np.asarray(expected[name])
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    assert a.tobytes() == b.tobytes(), f'{name}: the bytes differ'


@pytest.mark.parametrize('variant', ['llama3_c1', 'llama3_c2'])
def test_a_released_model_in_out_and_in(tmp_path, variant):
  """The tensors are those of the package's own file; every parameter is what the parity tests run on."""
  source = hf.released(tmp_path / 'source', variant)
  experiment = import_model(Sources(whole=str(source)), tmp_path / 'run')
  original = hf.tensors_of(source)
  same_bits(weights_of(tmp_path / 'run'), from_released(original.__getitem__, parameter_shapes(experiment.model)))
  config = export_model(tmp_path / 'run', tmp_path / 'out', max_shard_size='300KB')
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 5
  same_bits(hf.tensors_of(tmp_path / 'out'), original)
  read = {name: json.loads((tmp_path / 'out' / name).read_text()) for name in ('config.json', 'vision_config.json')}
  assert read['config.json'] == config
  theirs = json.loads((source / 'config.json').read_text())
  # What names other things: the tokenizer beside it, the tower, who wrote it.
  own = {'bos_token_id', 'eos_token_id', 'pad_token_id', 'mm_vision_tower', 'transformers_version'}
  own |= {'tokenizer_model_max_length', 'tokenizer_padding_side', 'tune_mm_mlp_adapter', 'pretraining_tp'}
  assert {name: config.get(name) for name in theirs.keys() - own} == {
    name: value for name, value in theirs.items() if name not in own
  }
  name = 'preprocessor_config.json'
  assert json.loads((tmp_path / 'out' / name).read_text()) == json.loads((source / name).read_text())
  assert LlavaMiniConfig.from_hf(*read.values()) == experiment.model
  again = import_model(Sources(whole=str(tmp_path / 'out')), tmp_path / 'again')
  assert again == experiment
  same_bits(weights_of(tmp_path / 'again'), weights_of(tmp_path / 'run'))


def test_shards_hold_what_the_index_says(tmp_path, released):
  export_model(released / 'run', tmp_path / 'out', max_shard_size='200KB')
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  sizes = {path.name: path.stat().st_size for path in (tmp_path / 'out').glob('*.safetensors')}
  assert set(index['weight_map'].values()) == set(sizes)
  assert max(sizes.values()) < 200_000 + 10_000, 'payload and header'
  assert index['metadata']['total_size'] == sum(t.nbytes for t in hf.tensors_of(released / 'hf').values())
  TensorFiles(tmp_path / 'out').verify()


def test_the_exported_decoder_in_transformers(tmp_path, released):
  export_model(released / 'run', tmp_path / 'out', max_shard_size='300KB')
  theirs, info = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True, attn_implementation='eager'
  )
  assert not info['missing_keys'] and not info['mismatched_keys']
  ids = np.random.default_rng(0).integers(1, 320, (2, 50))
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
  run = load_run(released / 'run', mesh_of('one'))
  model = merge(run.graphdef, run.params)

  @quick_jit
  def logits(ids):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    hidden = model.decoder(model.decoder.embed(ids), positions, np.ones(ids.shape, np.int32))
    return model.decoder.logits(hidden)

  close(logits(ids), expected, 'logits', 1e-4)


def test_bfloat16(tmp_path, released):
  """Rounded once; what is imported from it and exported again is the same."""
  export_model(released / 'run', tmp_path / 'out', dtype='bfloat16')
  original = hf.tensors_of(released / 'hf')
  found = TensorFiles(tmp_path / 'out')
  assert {stored.dtype for stored in found.tensors.values()} == {'BF16'}
  for name, tensor in original.items():
    expected = torch.tensor(tensor).to(torch.bfloat16).float().numpy()
    assert np.array_equal(found.read(name).astype(np.float32), expected), name
  import_model(Sources(whole=str(tmp_path / 'out')), tmp_path / 'run')
  export_model(tmp_path / 'run', tmp_path / 'again', dtype='bfloat16')
  for name in ('model.safetensors', 'config.json', 'SHA256SUMS', 'tokenizer.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'out' / name).read_bytes(), name


def test_a_llava_in_out_and_in(tmp_path):
  """Without compressor and pre-fusion it is a LLaVA-v1.5, which comes back under the original names."""
  source = hf.llava(tmp_path / 'source')
  experiment = import_model(Sources(whole=str(source)), tmp_path / 'run')
  config = export_model(tmp_path / 'run', tmp_path / 'out')
  assert config['model_type'] == 'llava_llama' and 'compressor_size' not in config
  assert import_model(Sources(whole=str(tmp_path / 'out')), tmp_path / 'again').model == experiment.model
  same_bits(weights_of(tmp_path / 'again'), weights_of(tmp_path / 'run'))


@pytest.mark.parametrize('name', MESHES)
def test_straight_to_the_mesh(released, name):
  """Every device gets its slice; together they are what is on disk."""
  run = load_run(released / 'run', mesh_of(name))
  same_bits(flatten(run.params), weights_of(released / 'run'))
  wanted = shardings_of(run.experiment.model, run.mesh)
  split = 0
  for path, leaf in flatten(run.params).items():
    assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    split += leaf.addressable_shards[0].data.size < leaf.size
  assert (split > 20) == (name != 'one')
  assert run.step == 0


def test_an_imported_run_answers(released):
  """About an image; and about none as transformers does, since then pre-fusion has no part in it."""
  run = load_run(released / 'run', mesh_of('fsdp'))
  config = dataclasses.replace(run.experiment.model, dtype='float32')
  answerer = Answerer(dataclasses.replace(run, graphdef=abstract_model(config)[0]), max_new_tokens=5)
  picture = np.full((40, 30, 3), 200, np.uint8)
  seen = Prompt([{'role': 'user', 'content': f'{IMAGE_TAG}\nwhat color is the square?'}], [picture], 'seen')
  text = Prompt([{'role': 'user', 'content': 'a square'}], [], 'text')
  answers = list(answerer.answers([seen, text], batch_size=8))
  theirs = transformers.LlamaForCausalLM.from_pretrained(released / 'hf', attn_implementation='eager').eval()
  ids = torch.tensor(answerer.encoder.encode(text).ids)[None].long()
  out = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=run.tokenizer.eos_token_id, pad_token_id=0)
  assert answers[1] == run.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
  assert answers[0] and answers[1] and answers[0] != answers[1]


def test_damaged_runs(tmp_path, released):
  run = shutil.copytree(released / 'run', tmp_path / 'run')
  with pytest.raises(CheckpointError, match='^no checkpoint of step 7 in .*: it was imported, and is at step 0$'):
    load_run(run, mesh_of('one'), 7)
  file = sorted((run / 'weights').glob('*.safetensors'))[1]
  data = bytearray(file.read_bytes())
  data[-9] ^= 1
  file.write_bytes(data)
  with pytest.raises(DataError, match=f'^E_CHECKSUM: {file}: '):
    load_run(run, mesh_of('one'))

  run = shutil.copytree(released / 'run', tmp_path / 'other')
  experiment = json.loads((run / 'weights' / 'experiment.json').read_text())
  experiment['model']['decoder']['tie_word_embeddings'] = True
  experiment['model']['compressor']['grid'] = 1
  (run / 'weights' / 'experiment.json').write_text(json.dumps(experiment))
  with pytest.raises(CheckpointError) as error:
    load_run(run, mesh_of('one'))
  assert str(error.value).splitlines() == [
    f'{run}/weights does not fit its experiment.json:',
    '  decoder/lm_head: unexpected',
    '  compressor/pos_embed: expected F32[1, 64], found F32[4, 64]',
    '  compressor/query: expected F32[1, 64], found F32[4, 64]',
  ]


def trained_run(directory, model: LlavaMiniConfig) -> dict[str, np.ndarray]:
  """A run as training leaves it, of random parameters, some of them frozen."""
  params = random_params(model)
  frozen = {path for path in params if path.startswith('vision/')}
  state = dict(
    step=np.array(5, np.int32),
    params=unflatten({path: value for path, value in params.items() if path not in frozen}),
    frozen=unflatten({path: params[path] for path in frozen}),
  )
  experiment = Experiment(model, DataConfig(template='chatml'), TrainConfig())
  with Checkpoints(directory / 'checkpoints') as checkpoints:
    checkpoints.save(5, state, dict(config=json.loads(json.dumps(experiment.to_dict()))))
  hf.add_tokenizer(directory / 'tokenizer')
  return params


def read_model(released) -> LlavaMiniConfig:
  return Experiment.from_dict(json.loads((released / 'run' / 'weights' / 'experiment.json').read_text())).model


@pytest.mark.slow
def test_a_trained_run_out_and_in(tmp_path, released):
  """With and without the layers of the tower that never run."""
  for keep in (True, False):
    root = tmp_path / str(keep)
    model = read_model(released)
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, keep_unused_layers=keep))
    params = trained_run(root / 'run', model)
    export_model(root / 'run', root / 'out')
    assert import_model(Sources(whole=str(root / 'out')), root / 'again').model == model
    same_bits(weights_of(root / 'again'), params)
    same_bits(open_parameters(root / 'run').load(sharded_model(model, mesh_of('fsdp'))[1]), params)


def test_a_start_for_training(tmp_path, released):
  """Stage 1 takes tower and decoder as far as it has them; stage 2 adds modules, and copies pre-fusion if asked to."""
  stored, model, mesh = weights_of(released / 'run'), read_model(released), mesh_of('fsdp')
  tower = dataclasses.replace(model.vision, keep_unused_layers=False)
  bare = dict(vision=tower, compressor=CompressorConfig(kind='none'), prefusion=PrefusionConfig(num_layers=0))
  stage1 = dataclasses.replace(model, **bare)
  wanted = shardings_of(stage1, mesh)
  found = starting_parameters(released / 'run', stage1, mesh)
  assert found.keys() == parameter_shapes(stage1).keys()
  for path, leaf in found.items():
    expected = stored[path][:2] if path.startswith('vision/layers/') else stored[path]
    assert np.array_equal(leaf, expected), path
    assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path

  trained = trained_run(tmp_path / 'stage1', stage1)
  stage2 = dataclasses.replace(model, vision=tower, prefusion=PrefusionConfig(num_layers=2, init='decoder'))
  found = starting_parameters(tmp_path / 'stage1', stage2, mesh)
  wanted = flatten(shardings_of(stage2, mesh))
  shapes = {path: shape for path, shape in parameter_shapes(stage2).items() if not path.startswith('compressor/')}
  assert {path: leaf.shape for path, leaf in found.items()} == shapes
  for path, leaf in found.items():
    copied = path.startswith('prefusion/')
    expected = trained[path.replace('prefusion/', 'decoder/')][:2] if copied else trained[path]
    assert np.array_equal(leaf, expected), path
    assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
  fresh = dataclasses.replace(stage2, prefusion=PrefusionConfig(num_layers=2))
  assert not any(path.startswith('prefusion/') for path in starting_parameters(tmp_path / 'stage1', fresh, mesh))


def test_a_start_that_does_not_fit(released):
  model = read_model(released)
  other = dataclasses.replace(
    model,
    compressor=dataclasses.replace(model.compressor, grid=1),
    decoder=dataclasses.replace(model.decoder, num_hidden_layers=3, tie_word_embeddings=True),
  )
  with pytest.raises(CheckpointError) as error:
    starting_parameters(released / 'run', other, mesh_of('one'))
  lines = str(error.value).splitlines()
  assert lines[0] == f'{released}/run does not fit this model:'
  assert '  compressor/query: expected [1, 64], found [4, 64]' in lines
  assert '  decoder/layers/mlp/up_proj: expected [3, 96, 192], found [4, 96, 192]' in lines
  assert lines[-1] == '  decoder/lm_head: unexpected'


def test_only_a_tensor_at_a_time_is_in_memory(tmp_path):
  """The peak of both directions is less than three times the largest tensor, not the model, nor a stack of layers."""
  sizes = dict(vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
  hf.llama(tmp_path / 'llama', **sizes, save_options=dict(max_shard_size='10MB'))
  hf.clip(tmp_path / 'clip')
  largest = 4 * 256 * 1024  # an MLP matrix; the embeddings are about as large
  sources = Sources(
    vision=str(tmp_path / 'clip'), decoder=str(tmp_path / 'llama'), prefusion_layers=4, prefusion_init='decoder'
  )
  import_model(dataclasses.replace(sources, prefusion_layers=1), tmp_path / 'warm')  # imports and compiles
  for convert in (
    lambda: import_model(sources, tmp_path / 'run'),
    lambda: export_model(tmp_path / 'run', tmp_path / 'out'),
  ):
    tracemalloc.start()
    convert()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest, f'{peak / largest:.1f} tensors'
  whole = sum(path.stat().st_size for path in (tmp_path / 'run' / 'weights').glob('*.safetensors'))
  assert whole > 90 * largest

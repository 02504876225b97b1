"""Every family of checkpoints, imported, computes what `transformers` computes from the same directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import hf_directories as hf
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_model import quick_jit
from torch_parity import close

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.tree import flatten, merge
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch

pytestmark = pytest.mark.usefixtures('quick_compilation')
IDS = np.array([5, 17, 300, 4, 99, 23, 42, 7])


def one_device():
  return make_mesh((1, 1, 1), devices=jax.devices()[:1])


@pytest.fixture(scope='session')
def sources(tmp_path_factory):
  """Made once; never to be written to."""
  root = tmp_path_factory.mktemp('sources')
  hf.llava(root / 'llava')
  hf.llama(root / 'llama')
  hf.clip(root / 'clip')
  return root


def imported(tmp_path, **sources) -> tuple[LlavaMini, LlavaMiniConfig, dict[str, np.ndarray]]:
  options = {name: sources.pop(name) for name in ('tokenizer', 'template') if name in sources}
  import_model(
    Sources(**{name: value if isinstance(value, int) else str(value) for name, value in sources.items()}),
    tmp_path / 'run',
    **options,
  )
  run = load_run(tmp_path / 'run', one_device())
  config = dataclasses.replace(run.experiment.model, dtype='float32')
  return merge(run.graphdef, run.params), config, {k: np.asarray(v) for k, v in flatten(run.params).items()}


@quick_jit
def text_logits(model: LlavaMini, ids: jax.Array) -> jax.Array:
  positions = np.arange(ids.shape[1])[None]
  hidden = model.decoder(model.decoder.embed(ids), positions, np.ones(ids.shape, np.int32))
  return model.decoder.logits(hidden)


def torch_logits(directory) -> np.ndarray:
  model = transformers.LlamaForCausalLM.from_pretrained(
    directory, attn_implementation='eager', dtype=torch.float32
  ).eval()
  with torch.no_grad():
    return model(torch.tensor(IDS)[None]).logits[0].numpy()


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('tied', [False, True])
def test_llama(tmp_path, sources, dtype, tied):
  """Sharded and not, tied and not, in every dtype that is read: the logits, and each value to the bit."""
  directory = hf.llama(tmp_path / 'llama', tie_word_embeddings=tied, save_options=dict(max_shard_size='20KB'))
  if dtype != 'float32':
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    shutil.rmtree(directory)
    hf.add_tokenizer(directory)
    model.save_pretrained(directory)
  model, config, params = imported(tmp_path, vision=sources / 'clip', decoder=directory, prefusion_layers=1)
  assert config.decoder.tie_word_embeddings == tied and ('decoder/lm_head' in params) != tied
  expected = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
  close(text_logits(model, IDS[None])[0], torch_logits(directory), 'logits')
  table = expected.model.embed_tokens.weight.detach().numpy()
  assert np.array_equal(params['decoder/embed_tokens'], table)
  down = expected.model.layers[2].mlp.down_proj.weight.detach().numpy()
  assert np.array_equal(params['decoder/layers/mlp/down_proj'][2], down.T)
  assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}


def features(model: LlavaMini, pixels: np.ndarray) -> np.ndarray:
  return quick_jit(lambda pixels: model.vision(pixels))(pixels.transpose(0, 2, 3, 1))


def random_pixels() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize('kind', ['tower', 'whole', 'old names'])
def test_clip(tmp_path, sources, kind):
  """A tower alone, the tower of a whole CLIP, and the names of transformers 4 with the buffers it kept."""
  if kind == 'tower':
    directory = sources / 'clip'
  elif kind == 'whole':
    directory = hf.whole_clip(tmp_path / 'clip')
  else:
    directory = hf.renamed(sources / 'clip', tmp_path / 'clip', {'': 'vision_model.'})
    tensors = load_file(directory / 'model.safetensors')
    tensors['vision_model.embeddings.position_ids'] = torch.arange(17)[None]
    save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
  model, config, _ = imported(tmp_path, vision=directory, decoder=sources / 'llama', prefusion_layers=1)
  assert config.vision.keep_unused_layers and config.vision.run_layers == 2
  tower = (
    transformers.CLIPModel.from_pretrained(directory).vision_model
    if kind == 'whole'
    else transformers.CLIPVisionModel.from_pretrained(sources / 'clip')
  )
  pixels = random_pixels()
  with torch.no_grad():
    expected = tower.eval()(torch.tensor(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
  close(features(model, pixels), expected.numpy(), 'features')


NAMINGS = {
  'as saved': {},
  'transformers 4': {'vision_tower.': 'vision_tower.vision_model.'},
  'transformers 5': {
    'vision_tower.': 'model.vision_tower.',
    'multi_modal_projector.': 'model.multi_modal_projector.',
    'language_model.model.': 'model.language_model.',
    'language_model.lm_head': 'lm_head',
  },
  'transformers 4.5x': {
    'vision_tower.': 'model.vision_tower.vision_model.',
    'multi_modal_projector.': 'model.multi_modal_projector.',
    'language_model.model.': 'model.language_model.',
    'language_model.lm_head': 'lm_head',
  },
}


def llava_logits(directory, pixels: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
  """Of the text after the image, from LlavaForConditionalGeneration."""
  model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation='eager').eval()
  slots = np.full(16, model.config.image_token_index)
  ids = np.concatenate([before, slots, after])
  with torch.no_grad():
    return model(torch.tensor(ids)[None], pixel_values=torch.tensor(pixels[:1])).logits[0, -len(after) :].numpy()


def our_logits(model: LlavaMini, config: LlavaMiniConfig, pixels, before, after) -> np.ndarray:
  ids = np.concatenate([before, [IMAGE_TOKEN_ID], after]).astype(np.int32)
  row = build_row(
    ids, np.zeros(len(ids), bool), RowShape.for_model(config, length=24, visuals=1), where='row', visuals_per_tag=[1]
  )
  row['pixels'] = pixels[:1, None].transpose(0, 1, 3, 4, 2)
  batch = Batch(**{key: value[None] for key, value in row.items()})
  count = len(before) + 16 + len(after)
  return np.asarray(quick_jit(lambda batch: model(batch))(batch))[0, count - len(after) : count]


@pytest.mark.parametrize('naming', [*NAMINGS, 'original', 'original, tower apart'])
def test_llava(tmp_path, sources, naming):
  """LLaVA-v1.5 in every naming in use becomes the same model: every patch to the decoder, nothing in between."""
  directory, options = tmp_path / 'source', {}
  if naming in NAMINGS:
    hf.renamed(sources / 'llava', directory, NAMINGS[naming])
  else:
    hf.original_llava(sources / 'llava', directory, vision=naming == 'original')
  if naming == 'original, tower apart':
    tower = hf.renamed(sources / 'llava', tmp_path / 'tower', {'vision_tower.': 'vision_model.', '': 'drop.'})
    config = json.loads((tower / 'config.json').read_text())['vision_config']
    tensors = {k: v for k, v in load_file(tower / 'model.safetensors').items() if not k.startswith('drop.')}
    save_file(tensors, tower / 'model.safetensors', {'format': 'pt'})
    (tower / 'config.json').write_text(json.dumps(config))
    options = dict(vision=tower)
  model, config, _ = imported(tmp_path, whole=directory, **options)
  assert (config.compressor.kind, config.prefusion.num_layers) == ('none', 0)
  model.config = config
  pixels = random_pixels()
  before, after = IDS[:2], IDS[2:]
  expected = llava_logits(sources / 'llava', pixels, before, after)
  close(our_logits(model, config, pixels, before, after), expected, 'logits')


def test_parts(tmp_path, sources):
  """Pre-fusion that begins as the decoder does; the projector of a LLaVA, from its directory or a file of its own."""
  original = hf.original_llava(sources / 'llava', tmp_path / 'original')
  tensors = load_file(sources / 'llava' / 'model.safetensors')
  prefix = 'multi_modal_projector.linear_'
  alone = {
    f'model.mm_projector.{2 * (int(k[len(prefix)]) - 1)}.{k.rsplit(".", 1)[1]}': v
    for k, v in tensors.items()
    if k.startswith(prefix)
  }
  torch.save(alone, tmp_path / 'mm_projector.bin')
  parts = dict(vision=sources / 'clip', decoder=sources / 'llama', prefusion_layers=2, prefusion_init='decoder')
  found = []
  for i, projector in enumerate([original, sources / 'llava', tmp_path / 'mm_projector.bin']):
    (tmp_path / str(i)).mkdir()
    _, config, params = imported(tmp_path / str(i), projector=projector, **parts)
    found.append(params)
    for path in params:
      if path.startswith('prefusion/'):
        assert np.array_equal(params[path], params[path.replace('prefusion', 'decoder')][:2]), path
    assert (config.compressor.grid, config.prefusion.num_layers, config.prefusion.init) == (1, 2, 'decoder')
  kernel = tensors['multi_modal_projector.linear_1.weight'].numpy().T
  for params in found:
    assert np.array_equal(params['projector/linear_1/kernel'], kernel)


def test_random_parts_depend_on_the_seed_alone(tmp_path, sources):
  parts = dict(vision=sources / 'clip', decoder=sources / 'llama', prefusion_layers=1, compressor_grid=2)
  found = []
  for i, seed in enumerate((0, 0, 1)):
    (tmp_path / str(i)).mkdir()
    found.append(imported(tmp_path / str(i), seed=seed, **parts)[2])
  for path in found[0]:
    same = found[0][path].tobytes() == found[1][path].tobytes()
    assert same, path
  for path in ('projector/linear_1/kernel', 'compressor/query', 'prefusion/layers/mlp/up_proj'):
    assert not np.array_equal(found[0][path], found[2][path]), path
    assert 0.005 < found[0][path].std() < 1
  assert found[0]['compressor/query'].shape == (4, 24)
  assert np.array_equal(found[0]['decoder/embed_tokens'], found[2]['decoder/embed_tokens'])


def test_random_layers_are_drawn_one_by_one(tmp_path, sources, monkeypatch):
  """Never a stack of layers in memory, and each layer other values."""
  planned = {}
  monkeypatch.setattr(
    'llava_mini_jax.convert.import_model.write_run',
    lambda directory, experiment, tensors, **_: planned.update({tensor.name: tensor for tensor in tensors}),
  )
  parts = Sources(vision=str(sources / 'clip'), decoder=str(sources / 'llama'), prefusion_layers=3)
  import_model(parts, tmp_path / 'run')
  for name in ('mlp/up_proj', 'self_attn/k_proj', 'input_layernorm/weight'):
    tensor = planned[f'prefusion/layers/{name}']
    layers = list(tensor.pieces())
    assert [layer.shape for layer in layers] == [tensor.shape[1:]] * 3
    assert len({layer.tobytes() for layer in layers}) == (1 if 'norm' in name else 3)


def test_the_template_follows_the_tokenizer(tmp_path, sources):
  experiment = import_model(
    Sources(vision=str(sources / 'clip'), decoder=str(sources / 'llama'), prefusion_layers=0), tmp_path / 'a'
  )
  assert experiment.data.template == 'chatml'
  experiment = import_model(
    Sources(vision=str(sources / 'clip'), decoder=str(sources / 'llama'), prefusion_layers=0),
    tmp_path / 'b',
    template='vicuna_v1',
  )
  assert experiment.data.template == 'vicuna_v1'


OTHERS = {
  'qwen2': (
    lambda c: c.update(model_type='qwen2'),
    DataError,
    'E_FAMILY: {dir}/config.json: expected model_type clip, clip_vision_model, llama, llava, llava_llama, llava_mini, '
    "llava_mini_llama; found 'qwen2'",
  ),
  'clip names under llama': (
    lambda c: c.update(model_type='clip'),
    DataError,
    'E_FAMILY: {dir}: model_type clip means CLIP, whose names are not there: 30 tensors, such as lm_head.weight, '
    'model.embed_tokens.weight, model.layers.0.input_layernorm.weight',
  ),
  'gelu': (
    lambda c: c.update(hidden_act='gelu'),
    ConfigError,
    "{dir}: config.json hidden_act: expected silu; found 'gelu'",
  ),
  'bias': (
    lambda c: c.update(attention_bias=True),
    ConfigError,
    '{dir}: config.json attention_bias: expected False; found True',
  ),
  'yarn': (
    lambda c: c.update(rope_parameters=dict(rope_type='yarn')),
    ConfigError,
    "{dir}: config.json rope_parameters: expected type llama3 or null; found 'yarn'",
  ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_models_are_refused(tmp_path, sources, name):
  change, kind, message = OTHERS[name]
  directory = hf.edited(sources / 'llama', tmp_path / 'source', change)
  with pytest.raises(kind) as error:
    import_model(Sources(vision=str(sources / 'clip'), decoder=directory), tmp_path / 'run')
  assert str(error.value) == message.format(dir=directory)
  assert not (tmp_path / 'run').exists()


def test_what_is_missing_is_asked_for(tmp_path, sources):
  original = hf.original_llava(sources / 'llava', tmp_path / 'original', vision=False)
  for given, message in (
    (dict(), 'expected --vision and --decoder: without --from they are needed'),
    (dict(vision=sources / 'clip'), 'expected --decoder: without --from they are needed'),
    (dict(whole=sources / 'llama'), f'expected --vision and --projector: {sources}/llama (Llama) has only decoder'),
    (dict(whole=original), f'expected --vision: {original} (LLaVA-v1.5) has only projector, decoder'),
  ):
    with pytest.raises(ConfigError) as error:
      import_model(Sources(**{name: str(value) for name, value in given.items()}), tmp_path / 'run')
    assert str(error.value) == message
  with pytest.raises(DataError) as error:
    import_model(Sources(vision=str(sources / 'llama'), decoder=str(sources / 'llama')), tmp_path / 'run')
  assert str(error.value) == f'E_FAMILY: {sources}/llama: expected a vision; found decoder'


def test_tokenizers(tmp_path, sources, monkeypatch):
  with pytest.raises(DataError) as error:
    import_model(
      Sources(vision=str(sources / 'clip'), decoder=str(hf.released(tmp_path / 'x'))),
      tmp_path / 'run',
      tokenizer=str(sources / 'clip'),
    )
  assert error.value.code == 'E_NO_TOKENIZER'
  vicuna = shutil.copytree(sources / 'llama', tmp_path / 'vicuna', ignore=shutil.ignore_patterns('tokenizer*'))
  (vicuna / 'tokenizer.model').write_bytes(b'sentencepiece')
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(DataError) as error:
    import_model(Sources(vision=str(sources / 'clip'), decoder=str(vicuna)), tmp_path / 'run')
  assert str(error.value) == (
    f'E_NO_TOKENIZER: {vicuna}: expected the package sentencepiece to read tokenizer.model; '
    'pip install llava_mini_jax[convert]'
  )
  small = hf.llama(tmp_path / 'small', vocab_size=64)
  with pytest.raises(ConfigError, match=r'^tokenizer: expected at most 64 tokens; found \d+$'):
    import_model(Sources(vision=str(sources / 'clip'), decoder=str(small)), tmp_path / 'run')

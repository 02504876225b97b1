"""Damaged, hostile and ill-fitting checkpoints: one clear error that names the file and the tensors, and no run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile

import hf_directories as hf
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.convert.tensor_files import TensorFiles
from llava_mini_jax.convert.tensor_writer import new_directory
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.train.checkpoint import CheckpointError


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  """A tower, and a decoder in several shards. Never to be written to."""
  root = tmp_path_factory.mktemp('parts')
  hf.clip(root / 'clip')
  hf.llama(root / 'llama', save_options=dict(max_shard_size='40KB'))
  hf.llama(root / 'single')
  return root


def header_of(data: bytes) -> tuple[dict, bytes]:
  size = int.from_bytes(data[:8], 'little')
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict | str, payload: bytes) -> bytes:
  text = (header if isinstance(header, str) else json.dumps(header)).encode()
  return len(text).to_bytes(8, 'little') + text + payload


def overlap(data: bytes) -> bytes:
  header, payload = header_of(data)
  start, end = header['model.layers.1.input_layernorm.weight']['data_offsets']
  header['model.layers.1.input_layernorm.weight']['data_offsets'] = [start - 4, end - 4]
  return with_header(header, payload)


def hole(data: bytes) -> bytes:
  """Four bytes before the last tensor that no tensor claims."""
  header, payload = header_of(data)
  last = max((entry for name, entry in header.items() if name != '__metadata__'), key=lambda e: e['data_offsets'])
  start, end = last['data_offsets']
  last['data_offsets'] = [start + 4, end + 4]
  return with_header(header, payload[:start] + bytes(4) + payload[start:])


def overflow(data: bytes) -> bytes:
  header, payload = header_of(data)
  header['model.norm.weight']['shape'] = [2**62, 2**62]
  return with_header(header, payload)


def unknown_dtype(data: bytes) -> bytes:
  header, payload = header_of(data)
  header['model.norm.weight']['dtype'] = 'F33'
  return with_header(header, payload)


def duplicate(data: bytes) -> bytes:
  header, payload = header_of(data)
  again = json.dumps(header['model.norm.weight'])
  return with_header(json.dumps(header)[:-1] + f', "model.norm.weight": {again}}}', payload)


class Canary:
  """Unpickled, it makes a directory."""

  def __init__(self, directory):
    self.directory = str(directory)

  def __reduce__(self):
    return os.mkdir, (self.directory,)


DAMAGE = {
  'cut short': lambda data: data[: len(data) // 2],
  'empty': lambda data: b'',
  'bytes too many': lambda data: data + b'\0' * 8,
  'overlap': overlap,
  'hole': hole,
  'overflow': overflow,
  'unknown dtype': unknown_dtype,
  'header longer than the file': lambda data: (10**6).to_bytes(8, 'little') + data[8:],
  'huge header': lambda data: (2**63).to_bytes(8, 'little') + data[8:],
  'header is no JSON': lambda data: with_header('{"a": ', b''),
  'deep header': lambda data: with_header('{"a":' + '[' * 100_000, b''),
  'HTML': lambda data: b'<!DOCTYPE html><html>sign in</html>',
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_safetensors(tmp_path, parts, name):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(DAMAGE[name]((parts / 'single' / file.name).read_bytes()))
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  message = str(error.value)
  assert message.startswith(f'E_WEIGHTS: {file}: is damaged or no safetensors file (') and '\n' not in message


def test_a_name_that_occurs_twice(tmp_path, parts):
  """The safetensors library keeps the last one silently."""
  file = tmp_path / 'model.safetensors'
  file.write_bytes(duplicate((parts / 'single' / file.name).read_bytes()))
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  assert str(error.value) == f'E_WEIGHTS: {file}: is damaged: its header names model.norm.weight twice'


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
@pytest.mark.parametrize('form', ['pickle', 'zip'])
def test_no_pickled_code_runs(tmp_path, name, form):
  """A pickle that would make a directory, in torch's old and new format, under either name."""
  canary = tmp_path / 'canary'
  torch.save({'a': Canary(canary)}, tmp_path / name, _use_new_zipfile_serialization=form == 'zip')
  assert zipfile.is_zipfile(tmp_path / name) == (form == 'zip')
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  assert error.value.code == 'E_WEIGHTS' and error.value.where == str(tmp_path / name)
  assert '\n' not in str(error.value)
  assert not canary.exists()
  torch.load((tmp_path / name).rename(tmp_path / 'pickle.pt'), weights_only=False)
  assert canary.exists(), 'the canary itself does not work'


def test_a_pickle_of_something_else(tmp_path):
  torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  message = f'E_WEIGHTS: {tmp_path}/pytorch_model.bin: expected a dictionary of tensors by name'
  assert str(error.value) == message


def test_no_weights(tmp_path):
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  assert str(error.value) == (
    f'E_NO_WEIGHTS: {tmp_path}: expected one of model.safetensors.index.json, model.safetensors, '
    'pytorch_model.bin.index.json, pytorch_model.bin in it; found none'
  )
  with pytest.raises(DataError, match='^E_NO_WEIGHTS: .*/none: no such file or directory$'):
    TensorFiles(tmp_path / 'none')


def edit_index(directory, change) -> None:
  file = directory / 'model.safetensors.index.json'
  index = json.loads(file.read_text())
  change(index['weight_map'])
  file.write_text(json.dumps(index))


NORM = 'model.norm.weight'


@pytest.mark.parametrize(
  'name',
  [
    '../x.safetensors',
    '/etc/x.safetensors',
    'a/b.safetensors',
    '..',
    'x.bin',
    '',
    'a\\b.safetensors',
    'x\0.safetensors',
    'link/../../x.safetensors',
  ],
)
def test_an_index_that_leads_elsewhere(tmp_path, parts, name):
  """Even to a file that exists, and even if the tensor is in it."""
  directory = shutil.copytree(parts / 'llama', tmp_path / 'deep' / 'llama')
  save_file({NORM: torch.ones(32)}, tmp_path / 'deep' / 'x.safetensors')
  edit_index(directory, lambda index: index.update({NORM: name}))
  with pytest.raises(DataError) as error:
    TensorFiles(directory)
  assert str(error.value) == (
    f'E_INDEX: {directory}/model.safetensors.index.json: expected names of .safetensors files beside it; found {name!r}'
  )


def test_an_index_that_is_wrong(tmp_path, parts):
  shards = sorted(path.name for path in (parts / 'llama').glob('*.safetensors'))
  index = json.loads((parts / 'llama' / 'model.safetensors.index.json').read_text())['weight_map']
  other = next(name for name in shards if name != index[NORM])
  for i, (change, expected) in enumerate(
    [
      (lambda index: index.update({NORM: other}), f'{NORM}: expected in {other}, found in {index[NORM]}'),
      (lambda index: index.pop(NORM), f'{NORM}: in {index[NORM]}, not in the index'),
      (lambda index: index.update(new=other), f'new: not in {other} nor another shard'),
    ]
  ):
    directory = shutil.copytree(parts / 'llama', tmp_path / str(i))
    edit_index(directory, change)
    with pytest.raises(DataError) as error:
      TensorFiles(directory)
    assert str(error.value) == f'E_INDEX: {directory}: the index does not describe its shards: {expected}'

  directory = shutil.copytree(parts / 'llama', tmp_path / 'missing')
  (directory / shards[1]).unlink()
  with pytest.raises(DataError) as error:
    TensorFiles(directory)
  index_file = directory / 'model.safetensors.index.json'
  assert str(error.value) == f'E_INDEX: {index_file}: shard {shards[1]} is missing'

  directory = shutil.copytree(parts / 'llama', tmp_path / 'twice')
  tensors = load_file(directory / other)
  save_file({**tensors, NORM: torch.ones(32)}, directory / other)
  with pytest.raises(DataError, match=f'^E_INDEX: .*: {NORM} is also in '):
    TensorFiles(directory)


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('{"weight_map": {"a": "b", "a": "c"}}', "cannot be parsed: duplicate key 'a'"),
    ('[]', 'expected an object; found list'),
    ('{', 'cannot be parsed: Expecting property name'),
    ('[' * 100_000, 'cannot be parsed: '),
  ],
)
def test_an_index_that_is_no_object(tmp_path, text, reason):
  file = tmp_path / 'model.safetensors.index.json'
  file.write_text(text)
  with pytest.raises(DataError) as error:
    TensorFiles(tmp_path)
  assert str(error.value).startswith(f'E_JSON: {file}: {reason}') and '\n' not in str(error.value)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path, parts):
  """Of every checkpoint that takes part."""
  clip, llama = (shutil.copytree(parts / name, tmp_path / name) for name in ('clip', 'single'))
  tensors = load_file(llama / 'model.safetensors')
  del tensors['model.layers.2.mlp.up_proj.weight']
  tensors['model.layers.3.mlp.up_proj.weight'] = torch.ones(56, 32)
  tensors['model.embed_tokens.weight'] = torch.ones(64, 32)
  tensors['model.norm.weight'] = torch.ones(32, dtype=torch.int8)
  tensors['model.layers.0.self_attn.q_proj.weight'] = torch.ones(32, 32, dtype=torch.float64)
  tensors['model.layers.0.self_attn.q_proj.bias'] = torch.ones(32)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
  save_file(tensors, llama / 'model.safetensors')
  tensors = load_file(clip / 'model.safetensors')
  tensors['embeddings.patch_embedding.weight'] = torch.ones(24, 1, 8, 8)
  save_file(tensors, clip / 'model.safetensors')
  with pytest.raises(CheckpointError) as error:
    import_model(Sources(vision=str(clip), decoder=str(llama)), tmp_path / 'run')
  assert str(error.value).splitlines() == [
    f'{clip} (CLIP) does not fit its config:',
    '  embeddings.patch_embedding.weight: expected [24, 3, 8, 8], found F32[24, 1, 8, 8]',
    f'{llama} (Llama) does not fit its config:',
    '  model.embed_tokens.weight: expected [320, 32], found F32[64, 32]',
    '  model.layers.0.self_attn.q_proj.bias: unexpected, found F32[32]',
    '  model.layers.0.self_attn.q_proj.weight: expected F32, F16, BF16, found F64[32, 32]',
    '  model.layers.2.mlp.up_proj.weight: missing, expected [56, 32]',
    '  model.layers.3.mlp.up_proj.weight: unexpected, found F32[56, 32]',
    '  model.norm.weight: expected F32, F16, BF16, found I8[32]',
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['clip', 'single']


def test_a_tied_head_may_be_there_if_it_is_the_same(tmp_path, parts):
  directory = hf.llama(tmp_path / 'llama', tie_word_embeddings=True)
  tensors = load_file(directory / 'model.safetensors')
  sources = Sources(vision=str(parts / 'clip'), decoder=str(directory), prefusion_layers=0)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()
  save_file(tensors, directory / 'model.safetensors')
  import_model(sources, tmp_path / 'run')
  tensors['lm_head.weight'][3, 3] += 1e-3
  save_file(tensors, directory / 'model.safetensors')
  with pytest.raises(CheckpointError) as error:
    import_model(sources, tmp_path / 'other')
  assert str(error.value).splitlines()[1:] == [
    '  lm_head.weight: config.json ties it to the embeddings, found another F32[320, 32]'
  ]


def test_a_flipped_bit_in_the_payload(tmp_path, parts):
  """Only a checksum can see it; what we write has one, and so may any checkpoint."""
  directory = shutil.copytree(parts / 'single', tmp_path / 'llama')
  file = directory / 'model.safetensors'
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  (directory / 'SHA256SUMS').write_text(f'{digest}  model.safetensors\n')
  sources = Sources(vision=str(parts / 'clip'), decoder=str(directory), prefusion_layers=0)
  import_model(sources, tmp_path / 'run')
  data = bytearray(file.read_bytes())
  data[-100] ^= 4
  file.write_bytes(data)
  with pytest.raises(DataError) as error:
    import_model(sources, tmp_path / 'other')
  assert str(error.value).startswith(f'E_CHECKSUM: {file}: expected sha256 {digest} (SHA256SUMS); found ')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['llama', 'run']
  (directory / 'SHA256SUMS').write_bytes(b'\xff\xfe' * 40)
  with pytest.raises(DataError, match=r'^E_CHECKSUM: .*: expected sha256 no such line \(SHA256SUMS\); found '):
    import_model(sources, tmp_path / 'other')


def test_what_is_there_is_not_overwritten(tmp_path, parts):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'precious').write_text('data')
  with pytest.raises(DataError) as error:
    import_model(Sources(vision=str(parts / 'clip'), decoder=str(parts / 'single')), tmp_path / 'run')
  assert str(error.value) == f'E_EXISTS: {tmp_path}/run: expected no such file or directory, or an empty one'
  assert (tmp_path / 'run' / 'precious').read_text() == 'data'


def test_nothing_beside_it_is_overwritten(tmp_path):
  """Neither what another process is writing there, nor what it has written meanwhile."""
  (tmp_path / 'run.partial').mkdir()
  (tmp_path / 'run.partial' / 'precious').write_text('data')
  with new_directory(tmp_path / 'run') as first:
    (first / 'a').write_text('first')
    with pytest.raises(DataError) as error, new_directory(tmp_path / 'run') as second:
      assert (first / 'a').read_text() == 'first' and not any(second.iterdir())
      (tmp_path / 'run').mkdir()
      (tmp_path / 'run' / 'a').write_text('third')
    (tmp_path / 'run' / 'a').unlink()
  assert str(error.value) == f'E_EXISTS: {tmp_path}/run: expected no such file or directory, or an empty one'
  assert (tmp_path / 'run' / 'a').read_text() == 'first'
  assert (tmp_path / 'run.partial' / 'precious').read_text() == 'data'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['run', 'run.partial']

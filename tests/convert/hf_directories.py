"""Tiny Hugging Face checkpoints with random weights, as `transformers` and LLaVA's own code write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from torch_parity import randomize

from llava_mini_jax.data.tokenizer import save_tokenizer, train_tokenizer

GOLDEN_MODELS = Path(__file__).parents[1] / 'golden' / 'models'
LLAMA = dict(
  vocab_size=320,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  initializer_range=0.1,
  max_position_embeddings=128,
)
CLIP = dict(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=32,
  patch_size=8,
  projection_dim=16,
)


def add_tokenizer(directory: Path) -> Path:
  tokenizer = train_tokenizer(['what color is the square? the square is red.', 'a square'], vocab_size=280)
  save_tokenizer(tokenizer, directory)
  return directory


def save(model: transformers.PreTrainedModel, directory: Path, **options) -> Path:
  randomize(model, seed=0)
  model.eval().save_pretrained(directory, **options)
  return directory


def llama(directory: Path, *, save_options: Mapping = {}, **changes) -> Path:  # noqa: B006  never written to
  config = transformers.LlamaConfig(**{**LLAMA, **changes}, attn_implementation='eager')
  return add_tokenizer(save(transformers.LlamaForCausalLM(config), directory, **save_options))


def clip(directory: Path, **changes) -> Path:
  return save(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**CLIP, **changes})), directory)


def whole_clip(directory: Path) -> Path:
  """With the text tower, as openai/clip-vit-large-patch14-336 comes."""
  text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, intermediate_size=16)
  return save(transformers.CLIPModel(transformers.CLIPConfig(vision_config=CLIP, text_config=text)), directory)


def llava(directory: Path) -> Path:
  """As transformers saves it."""
  config = transformers.LlavaConfig(
    text_config=transformers.LlamaConfig(**LLAMA),
    vision_config=transformers.CLIPVisionConfig(**CLIP),
    image_token_index=LLAMA['vocab_size'] - 1,
  )
  return add_tokenizer(save(transformers.LlavaForConditionalGeneration(config), directory))


def renamed(source: Path, directory: Path, names: Mapping[str, str], config: Mapping | None = None) -> Path:
  """A copy whose tensors' names begin otherwise: the first of `names` that a name begins with is replaced."""
  shutil.copytree(source, directory)
  tensors = load_torch(source / 'model.safetensors')
  for name in list(tensors):
    old, new = next(((old, new) for old, new in names.items() if name.startswith(old)), ('', ''))
    tensors[new + name.removeprefix(old)] = tensors.pop(name)
  save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
  if config is not None:
    (directory / 'config.json').write_text(json.dumps(config))
  return directory


def original_llava(source: Path, directory: Path, *, vision: bool = True) -> Path:
  """What LLaVA's own code writes: its names, sharded pickles, the decoder's fields at the top of config.json."""
  config = json.loads((source / 'config.json').read_text())
  text = config['text_config'] | dict(
    model_type='llava',
    architectures=['LlavaLlamaForCausalLM'],
    mm_projector_type='mlp2x_gelu',
    mm_vision_select_layer=-2,
    mm_vision_select_feature='patch',
    mm_vision_tower='somewhere/clip-tiny',
    rope_theta=10000.0,
    torch_dtype='float16',
  )
  del text['rope_parameters']
  names = {
    'vision_tower.': 'model.vision_tower.vision_tower.vision_model.',
    'multi_modal_projector.linear_1': 'model.mm_projector.0',
    'multi_modal_projector.linear_2': 'model.mm_projector.2',
    'language_model.': '',
  }
  renamed(source, directory, names, text)
  tensors = load_torch(directory / 'model.safetensors')
  (directory / 'model.safetensors').unlink()
  if vision:
    (directory / 'vision_config.json').write_text(json.dumps(config['vision_config']))
  else:
    tensors = {name: tensor for name, tensor in tensors.items() if 'vision_tower' not in name}
  for i in range(LLAMA['num_hidden_layers']):
    tensors[f'model.layers.{i}.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
  shards = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)]
  index = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
  for shard in shards:
    torch.save({name: tensors[name] for name in index if index[name] == shard}, directory / shard)
  (directory / 'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
  return directory


def released(directory: Path, variant: str = 'llama3_c2') -> Path:
  shutil.copytree(GOLDEN_MODELS / variant, directory)
  return add_tokenizer(directory)


def edited(source: Path, directory: Path, change: Callable[[dict], None]) -> str:
  """A copy whose config.json is changed."""
  shutil.copytree(source, directory)
  config = json.loads((directory / 'config.json').read_text())
  change(config)
  (directory / 'config.json').write_text(json.dumps(config))
  return str(directory)


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
  found = {}
  for file in directory.glob('*.safetensors'):
    found |= load_file(file)
  return found

"""Tensor names of the released LLaVA-Mini checkpoints ⇄ our parameter paths.

A parameter path is the nested dict's keys joined by `/`. Ours stack layers on
a leading axis and keep heads apart; torch keeps one matrix per layer, [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one parameter is stored.

  kind: same · flat (bias of heads) · linear (torch [out, in]) · linear2 (two input axes) · conv ([out, in, h, w]).
  name: `{i}` stands for the layer number. part: third of a packed q, k, v tensor.
  """

  name: str
  kind: str
  part: int | None = None


_VISION = 'model.vision_tower.vision_tower.vision_model'


def _attention(path: str, name: str, out: str) -> dict[str, Rule]:
  return {
    **{f'{path}/{p}': Rule(f'{name}.{p}.weight', 'linear') for p in ('q_proj', 'k_proj', 'v_proj')},
    f'{path}/{out}': Rule(f'{name}.{out}.weight', 'linear2'),
  }


def _norm(path: str, name: str) -> dict[str, Rule]:
  return {f'{path}/{leaf}': Rule(f'{name}.{leaf}', 'same') for leaf in ('weight', 'bias')}


def _linear(path: str, name: str) -> dict[str, Rule]:
  return {f'{path}/kernel': Rule(f'{name}.weight', 'linear'), f'{path}/bias': Rule(f'{name}.bias', 'same')}


def _llama_layers(path: str, name: str) -> dict[str, Rule]:
  norms = ('input_layernorm', 'post_attention_layernorm')
  return {
    **_attention(f'{path}/self_attn', f'{name}.{{i}}.self_attn', 'o_proj'),
    **{
      f'{path}/mlp/{p}': Rule(f'{name}.{{i}}.mlp.{p}.weight', 'linear') for p in ('gate_proj', 'up_proj', 'down_proj')
    },
    **{f'{path}/{n}/weight': Rule(f'{name}.{{i}}.{n}.weight', 'same') for n in norms},
  }


def _vision() -> dict[str, Rule]:
  path, name = 'vision/layers', f'{_VISION}.encoder.layers.{{i}}'
  return {
    'vision/patch_embedding': Rule(f'{_VISION}.embeddings.patch_embedding.weight', 'conv'),
    'vision/class_embedding': Rule(f'{_VISION}.embeddings.class_embedding', 'same'),
    'vision/position_embedding': Rule(f'{_VISION}.embeddings.position_embedding.weight', 'same'),
    **_norm('vision/pre_layernorm', f'{_VISION}.pre_layrnorm'),  # the spelling is CLIP's
    **_norm('vision/post_layernorm', f'{_VISION}.post_layernorm'),
    **_attention(f'{path}/self_attn', f'{name}.self_attn', 'out_proj'),
    **{
      f'{path}/self_attn/{p}_bias': Rule(f'{name}.self_attn.{p}.bias', 'flat') for p in ('q_proj', 'k_proj', 'v_proj')
    },
    f'{path}/self_attn/out_proj_bias': Rule(f'{name}.self_attn.out_proj.bias', 'same'),
    **_norm(f'{path}/layer_norm1', f'{name}.layer_norm1'),
    **_norm(f'{path}/layer_norm2', f'{name}.layer_norm2'),
    **_linear(f'{path}/fc1', f'{name}.mlp.fc1'),
    **_linear(f'{path}/fc2', f'{name}.mlp.fc2'),
  }


def _compressor() -> dict[str, Rule]:
  packed = enumerate(('q_proj', 'k_proj', 'v_proj'))
  name = 'model.compressor'
  return {
    'compressor/query': Rule(f'{name}.query', 'same'),
    'compressor/pos_embed': Rule(f'{name}.pos_embed', 'same'),
    **_norm('compressor/ln_q', f'{name}.ln_q'),
    **_norm('compressor/ln_kv', f'{name}.ln_kv'),
    **{
      key: rule
      for part, p in packed
      for key, rule in (
        (f'compressor/{p}', Rule(f'{name}.attn.in_proj_weight', 'linear', part)),
        (f'compressor/{p}_bias', Rule(f'{name}.attn.in_proj_bias', 'flat', part)),
      )
    },
    'compressor/out_proj': Rule(f'{name}.attn.out_proj.weight', 'linear2'),
    'compressor/out_proj_bias': Rule(f'{name}.attn.out_proj.bias', 'same'),
  }


RULES: dict[str, Rule] = {
  **_vision(),
  **_linear('projector/linear_1', 'model.mm_projector.0'),
  **_linear('projector/linear_2', 'model.mm_projector.2'),
  **_compressor(),
  **_llama_layers('prefusion/layers', 'model.prefusion_layers'),
  'decoder/embed_tokens': Rule('model.embed_tokens.weight', 'same'),
  **_llama_layers('decoder/layers', 'model.layers'),
  'decoder/norm/weight': Rule('model.norm.weight', 'same'),
  'decoder/lm_head': Rule('lm_head.weight', 'linear'),
}


def _from_torch(tensor: np.ndarray, rule: Rule, shape: tuple[int, ...]) -> np.ndarray:
  if rule.part is not None:
    tensor = np.split(tensor, 3)[rule.part]
  if rule.kind == 'conv':
    tensor = tensor.transpose(2, 3, 1, 0)
  elif rule.kind.startswith('linear'):
    tensor = tensor.T
  if tensor.size != np.prod(shape):
    raise ValueError(f'{rule.name}: expected {np.prod(shape)} values for shape {shape}; found shape {tensor.shape}')
  return tensor.reshape(shape)


def _to_torch(array: np.ndarray, kind: str) -> np.ndarray:
  if kind == 'conv':
    return array.transpose(3, 2, 0, 1)
  if kind == 'flat':
    return array.reshape(-1)
  if kind.startswith('linear'):
    inputs = np.prod(array.shape[: 2 if kind == 'linear2' else 1])
    return array.reshape(int(inputs), -1).T
  return array


def from_released(read: Callable[[str], np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Parameters by path, from a reader of torch tensors by name.

  Args:
    read: gives the tensor of a name (raising KeyError if there is none).
    shapes: the shape of every parameter path of the model.
  Raises:
    ValueError: a tensor's size does not fit; the message has its name, the expected shape and the one found.
  """
  params = {}
  for path, shape in shapes.items():
    rule = RULES[path]
    if '{i}' in rule.name:
      layers = (_from_torch(read(rule.name.format(i=i)), rule, shape[1:]) for i in range(shape[0]))
      params[path] = np.stack(list(layers))
    else:
      params[path] = _from_torch(read(rule.name), rule, shape)
  return params


def to_released(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Torch tensors by released name, from parameters (or gradients) by path; the exact inverse."""
  tensors: dict[str, np.ndarray] = {}
  packed: dict[str, dict[int, np.ndarray]] = {}
  for path, array in params.items():
    rule = RULES[path]
    array = np.asarray(array)
    if '{i}' in rule.name:
      tensors.update({rule.name.format(i=i): _to_torch(layer, rule.kind) for i, layer in enumerate(array)})
    elif rule.part is None:
      tensors[rule.name] = _to_torch(array, rule.kind)
    else:
      packed.setdefault(rule.name, {})[rule.part] = _to_torch(array, rule.kind)
  tensors.update({name: np.concatenate([parts[i] for i in range(3)]) for name, parts in packed.items()})
  return tensors

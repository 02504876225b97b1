"""Tensor names of the PyTorch world ⇄ our parameter paths: one table, to which each family gives its prefixes.

A parameter path is the nested dict's keys joined by `/`. Ours stack layers on
a leading axis and keep heads apart; torch keeps one matrix per layer, [out, in].
Enters a tensor of torch's shape, leaves an array of ours, and the reverse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

MODULES = ('vision', 'projector', 'compressor', 'prefusion', 'decoder')


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one parameter is stored.

  kind: same · flat (bias of heads) · linear (torch [out, in]) · linear2 (two input axes) · conv ([out, in, h, w]).
  name: `{i}` stands for the layer number. part: third of a packed q, k, v tensor.
  """

  name: str
  kind: str
  part: int | None = None

  @property
  def stacked(self) -> bool:
    return '{i}' in self.name


@dataclasses.dataclass(frozen=True)
class Names:
  """What a family of checkpoints puts before the names of each module; None = it has no such module.

  Prefixes end with their dot. `head` is the whole name. `model_types` are those of config.json. `optional` modules may
  be left to another directory that the config names. `ignored` matches the names of tensors that are not needed.
  """

  family: str
  model_types: tuple[str, ...]
  vision: str | None = None
  projector: tuple[str, str] | None = None
  compressor: str | None = None
  prefusion: str | None = None
  decoder: str | None = None
  head: str | None = None
  optional: tuple[str, ...] = ()
  ignored: str = r'(?!)'

  def anchors(self) -> dict[str, str]:
    """One tensor per module without which the module is not there."""
    found = {}
    if self.vision is not None:
      found['vision'] = f'{self.vision}embeddings.class_embedding'
    if self.projector is not None:
      found['projector'] = f'{self.projector[0]}weight'
    if self.compressor is not None:
      found['compressor'] = f'{self.compressor}query'
    if self.prefusion is not None:
      found['prefusion'] = f'{self.prefusion}0.input_layernorm.weight'
    if self.decoder is not None:
      found['decoder'] = f'{self.decoder}embed_tokens.weight'
    return found

  def rules(self) -> dict[str, Rule]:
    """Rule of every parameter path that the family can hold."""
    rules: dict[str, Rule] = {}
    if self.vision is not None:
      rules |= _vision(self.vision)
    if self.projector is not None:
      for i, name in enumerate(self.projector, start=1):
        rules |= _linear(f'projector/linear_{i}', name)
    if self.compressor is not None:
      rules |= _compressor(self.compressor)
    if self.prefusion is not None:
      rules |= _llama_layers('prefusion/layers', self.prefusion)
    if self.decoder is not None:
      rules['decoder/embed_tokens'] = Rule(f'{self.decoder}embed_tokens.weight', 'same')
      rules |= _llama_layers('decoder/layers', f'{self.decoder}layers.')
      rules['decoder/norm/weight'] = Rule(f'{self.decoder}norm.weight', 'same')
    if self.head is not None:
      rules['decoder/lm_head'] = Rule(self.head, 'linear')
    return rules


def _attention(path: str, name: str, out: str) -> dict[str, Rule]:
  return {
    **{f'{path}/{p}': Rule(f'{name}{p}.weight', 'linear') for p in ('q_proj', 'k_proj', 'v_proj')},
    f'{path}/{out}': Rule(f'{name}{out}.weight', 'linear2'),
  }


def _norm(path: str, name: str) -> dict[str, Rule]:
  return {f'{path}/{leaf}': Rule(f'{name}{leaf}', 'same') for leaf in ('weight', 'bias')}


def _linear(path: str, name: str) -> dict[str, Rule]:
  return {f'{path}/kernel': Rule(f'{name}weight', 'linear'), f'{path}/bias': Rule(f'{name}bias', 'same')}


def _llama_layers(path: str, name: str) -> dict[str, Rule]:
  layer = f'{name}{{i}}.'
  return {
    **_attention(f'{path}/self_attn', f'{layer}self_attn.', 'o_proj'),
    **{f'{path}/mlp/{p}': Rule(f'{layer}mlp.{p}.weight', 'linear') for p in ('gate_proj', 'up_proj', 'down_proj')},
    **{
      f'{path}/{n}/weight': Rule(f'{layer}{n}.weight', 'same') for n in ('input_layernorm', 'post_attention_layernorm')
    },
  }


def _vision(name: str) -> dict[str, Rule]:
  path, layer = 'vision/layers', f'{name}encoder.layers.{{i}}.'
  return {
    'vision/patch_embedding': Rule(f'{name}embeddings.patch_embedding.weight', 'conv'),
    'vision/class_embedding': Rule(f'{name}embeddings.class_embedding', 'same'),
    'vision/position_embedding': Rule(f'{name}embeddings.position_embedding.weight', 'same'),
    **_norm('vision/pre_layernorm', f'{name}pre_layrnorm.'),  # the spelling is CLIP's
    **_norm('vision/post_layernorm', f'{name}post_layernorm.'),
    **_attention(f'{path}/self_attn', f'{layer}self_attn.', 'out_proj'),
    **{
      f'{path}/self_attn/{p}_bias': Rule(f'{layer}self_attn.{p}.bias', 'flat') for p in ('q_proj', 'k_proj', 'v_proj')
    },
    f'{path}/self_attn/out_proj_bias': Rule(f'{layer}self_attn.out_proj.bias', 'same'),
    **_norm(f'{path}/layer_norm1', f'{layer}layer_norm1.'),
    **_norm(f'{path}/layer_norm2', f'{layer}layer_norm2.'),
    **_linear(f'{path}/fc1', f'{layer}mlp.fc1.'),
    **_linear(f'{path}/fc2', f'{layer}mlp.fc2.'),
  }


def _compressor(name: str) -> dict[str, Rule]:
  rules = {
    'compressor/query': Rule(f'{name}query', 'same'),
    'compressor/pos_embed': Rule(f'{name}pos_embed', 'same'),
    **_norm('compressor/ln_q', f'{name}ln_q.'),
    **_norm('compressor/ln_kv', f'{name}ln_kv.'),
    'compressor/out_proj': Rule(f'{name}attn.out_proj.weight', 'linear2'),
    'compressor/out_proj_bias': Rule(f'{name}attn.out_proj.bias', 'same'),
  }
  for part, p in enumerate(('q_proj', 'k_proj', 'v_proj')):
    rules[f'compressor/{p}'] = Rule(f'{name}attn.in_proj_weight', 'linear', part)
    rules[f'compressor/{p}_bias'] = Rule(f'{name}attn.in_proj_bias', 'flat', part)
  return rules


def torch_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor (of one layer) that holds a parameter of our shape (without its layer axis)."""
  if rule.kind == 'conv':
    shape = (shape[3], shape[2], shape[0], shape[1])
  elif rule.kind == 'flat':
    shape = (math.prod(shape),)
  elif rule.kind.startswith('linear'):
    inputs = 2 if rule.kind == 'linear2' else 1
    shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
  return shape if rule.part is None else (3 * shape[0], *shape[1:])


def from_torch(tensor: np.ndarray, rule: Rule, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor (of one layer) as our parameter of that shape (without its layer axis); a view where numpy can.

  Raises:
    ValueError: its size does not fit; the message has its name, the expected shape and the one found.
  """
  if rule.part is not None:
    tensor = np.split(tensor, 3)[rule.part]
  if rule.kind == 'conv':
    tensor = tensor.transpose(2, 3, 1, 0)
  elif rule.kind.startswith('linear'):
    tensor = tensor.T
  if tensor.size != math.prod(shape):
    raise ValueError(f'{rule.name}: expected {math.prod(shape)} values for shape {shape}; found shape {tensor.shape}')
  return tensor.reshape(shape)


def to_torch(array: np.ndarray, rule: Rule) -> np.ndarray:
  """The exact inverse, of one layer; a third of the tensor where the rule names a part."""
  if rule.kind == 'conv':
    return array.transpose(3, 2, 0, 1)
  if rule.kind == 'flat':
    return array.reshape(-1)
  if rule.kind.startswith('linear'):
    inputs = math.prod(array.shape[: 2 if rule.kind == 'linear2' else 1])
    return array.reshape(inputs, -1).T
  return array


def wanted_tensors(rules: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """Name and torch shape of every tensor that parameters of these shapes are made of."""
  tensors = {}
  for path, shape in shapes.items():
    rule = rules[path]
    if rule.stacked:
      tensors |= {rule.name.format(i=i): torch_shape(rule, shape[1:]) for i in range(shape[0])}
    else:
      tensors[rule.name] = torch_shape(rule, shape)
  return tensors


_LLAVA = dict(
  vision='model.vision_tower.vision_tower.vision_model.',
  projector=('model.mm_projector.0.', 'model.mm_projector.2.'),
  decoder='model.',
  head='lm_head.weight',
  optional=('vision',),
)
_HF_PROJECTOR = ('multi_modal_projector.linear_1.', 'multi_modal_projector.linear_2.')
_ROTARY = r'(.*\.)?rotary_emb\.inv_freq'  # recomputed from config.json
_POSITION_IDS = r'(.*\.)?position_ids'  # 0, 1, 2, …

RELEASED = Names(
  'LLaVA-Mini',
  ('llava_mini_llama', 'llava_mini'),
  **_LLAVA,
  compressor='model.compressor.',
  prefusion='model.prefusion_layers.',
  ignored=f'{_ROTARY}|{_POSITION_IDS}',
)
LLAVA = Names('LLaVA-v1.5', ('llava', 'llava_llama'), **_LLAVA, ignored=RELEASED.ignored)


def _llava_hf(vision: str, projector: str, decoder: str, head: str) -> Names:
  names = tuple(f'{projector}{name}' for name in _HF_PROJECTOR)
  return Names(
    'LLaVA-v1.5 of transformers',
    ('llava',),
    vision=vision,
    projector=names,
    decoder=decoder,
    head=head,
    ignored=RELEASED.ignored,
  )


# Newer transformers drop `vision_model.`; what version 5 holds in memory begins with `model.`.
LLAVA_HF = (
  _llava_hf('vision_tower.vision_model.', '', 'language_model.model.', 'language_model.lm_head.weight'),
  _llava_hf('vision_tower.', '', 'language_model.model.', 'language_model.lm_head.weight'),
  _llava_hf('model.vision_tower.vision_model.', 'model.', 'model.language_model.', 'lm_head.weight'),
  _llava_hf('model.vision_tower.', 'model.', 'model.language_model.', 'lm_head.weight'),
)
CLIP = tuple(
  Names(
    'CLIP',
    ('clip', 'clip_vision_model'),
    vision=prefix,
    ignored=rf'text_model\..*|(text|visual)_projection\.weight|logit_scale|{_POSITION_IDS}',
  )
  for prefix in ('vision_model.', '')
)
LLAMA = Names('Llama', ('llama',), decoder='model.', head='lm_head.weight', ignored=_ROTARY)
PROJECTOR = tuple(
  Names('LLaVA projector', (), projector=(f'{prefix}0.', f'{prefix}2.'))
  for prefix in ('model.mm_projector.', 'mm_projector.')
)
FAMILIES = (RELEASED, *LLAVA_HF, LLAVA, *CLIP, LLAMA)

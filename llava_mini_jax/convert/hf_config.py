"""The `config.json` of Hugging Face checkpoints ⇄ our config: released LLaVA-Mini, LLaVA-v1.5, Llama and CLIP.

What a file leaves out has the default that `transformers` gives it. Fields that would change what the model computes,
and that ours does not have, are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llava_mini_jax.config import (
  IMAGE_MEAN,
  IMAGE_STD,
  CompressorConfig,
  ConfigError,
  DecoderConfig,
  LlavaMiniConfig,
  PrefusionConfig,
  RopeScaling,
  VisionConfig,
  build_dataclass,
)
from llava_mini_jax.experiment import DataConfig

# Checkpoints that name their vision tower, and do not bring its config, mean one of these.
KNOWN_TOWERS = {'openai/clip-vit-large-patch14-336': VisionConfig()}

LLAMA_DEFAULTS = dict(
  vocab_size=32000,
  hidden_size=4096,
  intermediate_size=11008,
  num_hidden_layers=32,
  num_attention_heads=32,
  rms_norm_eps=1e-6,
  max_position_embeddings=2048,
  initializer_range=0.02,
)
CLIP_DEFAULTS = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  image_size=224,
  patch_size=32,
  layer_norm_eps=1e-5,
)
_LLAMA_FIXED = dict(hidden_act='silu', attention_bias=False, mlp_bias=False)
_CLIP_FIXED = dict(hidden_act='quick_gelu', num_channels=3)
_LLAVA_FIXED = dict(
  mm_projector_type='mlp2x_gelu',
  mm_vision_select_feature='patch',
  mm_use_im_start_end=False,
  projector_hidden_act='gelu',
  vision_feature_select_strategy='default',
  multimodal_projector_bias=True,
)
_LLAMA_TYPES = {name: type(value) for name, value in LLAMA_DEFAULTS.items()} | dict(
  num_key_value_heads=int, head_dim=int, rope_theta=float, tie_word_embeddings=bool
)
_CLIP_TYPES = {name: type(value) for name, value in CLIP_DEFAULTS.items()}
_ROPE_TYPES = {field.name: type(field.default) for field in dataclasses.fields(RopeScaling)} | dict(rope_theta=float)
# Fields of ours that the format has no name for, kept under `llava_mini_jax` in config.json: how prompts are written.
OURS, _OUR_FIELDS = 'llava_mini_jax', ('template', 'default_system', 'grid_order')
# What a released checkpoint always is; other values compute something else.
_RELEASED_FIXED = dict(
  compressor=dict(kind='query', within=0, num_heads=8, space='vision', attention='mha', key_position='query_table'),
  prefusion=dict(fuse_compressed=True),
)


def decoder_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
  """From the fields of a Llama's config. Raises ConfigError for another architecture."""
  _require('config.json', config, _LLAMA_FIXED)
  if (kind := config.get('model_type', 'llama')) not in ('llama', 'llava', 'llava_llama', 'llava_mini_llama'):
    raise ConfigError(f'config.json model_type: expected a llama decoder; found {kind!r}')
  _require_types('config.json', config, _LLAMA_TYPES)
  sizes = _with_defaults(config, LLAMA_DEFAULTS)
  heads = sizes['num_attention_heads']
  theta, scaling = _rope_from_hf(config)
  return DecoderConfig(
    num_key_value_heads=config.get('num_key_value_heads') or heads,
    head_dim=config.get('head_dim') or sizes['hidden_size'] // (heads or 1),  # 0 heads: DecoderConfig refuses them
    rope_theta=theta,
    rope_scaling=scaling,
    tie_word_embeddings=config.get('tie_word_embeddings') or False,
    **sizes,
  )


def vision_from_hf(config: Mapping[str, Any], select_layer: int = -2) -> VisionConfig:
  """From the fields of a CLIP vision tower's config. Raises ConfigError for another architecture."""
  _require('vision config', config, _CLIP_FIXED)
  if (kind := config.get('model_type', 'clip_vision_model')) not in ('clip', 'clip_vision_model'):
    raise ConfigError(f'vision config model_type: expected clip_vision_model; found {kind!r}')
  _require_types('vision config', config, _CLIP_TYPES)
  return VisionConfig(select_layer=select_layer, keep_unused_layers=True, **_with_defaults(config, CLIP_DEFAULTS))


def released_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any]) -> LlavaMiniConfig:
  """From the released `config.json` and its CLIP tower's. Raises ConfigError."""
  _require('config.json', config, _LLAVA_FIXED)
  missing = [name for name in ('compressor_size', 'prefusion_layer_num') if name not in config]
  if missing:
    raise ConfigError(f'config.json: missing {", ".join(missing)}')
  return LlavaMiniConfig(
    vision=vision_from_hf(vision, _integer(config, 'mm_vision_select_layer', -2)),
    compressor=CompressorConfig(grid=_integer(config, 'compressor_size')),
    prefusion=PrefusionConfig(num_layers=_integer(config, 'prefusion_layer_num')),
    decoder=decoder_from_hf(config),
  )


def data_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of DataConfig: how a LLaVA's images are cut as in released evaluation, and what an export of ours adds.

  Raises:
    ConfigError.
  """
  grid = _integer(config, 'resolution_ratio', 1)
  if grid < 1:
    raise ConfigError(f'config.json resolution_ratio: expected a positive integer; found {grid}')
  aspect = 'pad' if config.get('image_aspect_ratio') == 'pad' else 'crop'
  ours = _section('config.json', config, OURS)
  if unknown := sorted(ours.keys() - set(_OUR_FIELDS)):
    raise ConfigError(f'config.json {OURS}: expected {", ".join(_OUR_FIELDS)}; found {", ".join(unknown)}')
  found = dict(grid=grid, aspect=aspect, grid_order='split_then_pad') | ours
  build_dataclass(DataConfig, found, f'config.json {OURS}')
  return found


@dataclasses.dataclass(frozen=True)
class HfParts:
  """What a checkpoint's config says of each module; None = it has none, or does not say. data: of DataConfig."""

  decoder: DecoderConfig | None = None
  vision: VisionConfig | None = None
  select_layer: int = -2
  compressor: CompressorConfig | None = None
  prefusion: PrefusionConfig | None = None
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parts_from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None = None) -> HfParts:
  """What any of the known `config.json` describes.

  Args:
    vision: the content of a `vision_config.json` beside it.
  Raises:
    ConfigError.
  """
  kind = config.get('model_type')
  if kind == 'clip_vision_model':
    return HfParts(vision=vision_from_hf(config))
  if kind == 'clip':
    return HfParts(vision=vision_from_hf(_section('config.json', config, 'vision_config')))
  if kind == 'llama':
    return HfParts(decoder=decoder_from_hf(config))
  _require('config.json', config, _LLAVA_FIXED)
  data = data_from_hf(config)
  if 'text_config' in config:
    select = config.get('vision_feature_layer', -2)
    if not isinstance(select, int) or isinstance(select, bool):
      raise ConfigError(f'config.json vision_feature_layer: expected one layer; found {select!r}')
    if config.get('vision_config') is None:
      raise ConfigError('config.json vision_config: missing')
    decoder = decoder_from_hf(_section('config.json', config, 'text_config'))
    tower = vision_from_hf(_section('config.json', config, 'vision_config'), select)
    return HfParts(decoder=decoder, vision=tower, select_layer=select, data=data)
  _require_types('config.json', config, dict(mm_vision_tower=str))
  select = _integer(config, 'mm_vision_select_layer', -2)
  tower = None
  if vision is not None:
    tower = vision_from_hf(vision, select)
  elif config.get('mm_vision_tower') in KNOWN_TOWERS:
    known = KNOWN_TOWERS[config['mm_vision_tower']]
    tower = dataclasses.replace(known, select_layer=select, keep_unused_layers=True)
  parts = HfParts(decoder_from_hf(config), tower, select, data=data)
  if 'compressor_size' not in config:
    return parts
  return dataclasses.replace(
    parts,
    compressor=CompressorConfig(grid=_integer(config, 'compressor_size')),
    prefusion=PrefusionConfig(num_layers=_integer(config, 'prefusion_layer_num', 4)),
  )


def to_hf_config(
  model: LlavaMiniConfig, dtype: str = 'float32', data: DataConfig | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The released `config.json` and `vision_config.json`; `LlavaMiniConfig.from_hf` is the inverse.

  A model without compressor and pre-fusion becomes a LLaVA-v1.5. How it trains and runs (dtype, remat, what is fused
  at inference) is not part of the format.

  Args:
    data: how images are cut and prompts written, which `data_from_hf` reads again; None = the defaults.
  Raises:
    ConfigError: the model computes something that the released package cannot, naming every such field.
  """
  decoder, vision, data = model.decoder, model.vision, data or DataConfig()
  bare = model.compressor.kind == 'none' and not model.prefusion.num_layers
  _require_released(model, data, bare)
  config = dict(
    architectures=['LlavaLlamaForCausalLM' if bare else 'LlavaMiniLlamaForCausalLM'],
    model_type='llava_llama' if bare else 'llava_mini_llama',
    **{name: getattr(decoder, name) for name in LLAMA_DEFAULTS},
    num_key_value_heads=decoder.num_key_value_heads,
    head_dim=decoder.head_dim,
    rope_theta=decoder.rope_theta,
    rope_scaling=_rope_to_hf(decoder.rope_scaling),
    tie_word_embeddings=decoder.tie_word_embeddings,
    **_LLAMA_FIXED,
    attention_dropout=0.0,
    use_cache=True,
    image_aspect_ratio='pad' if data.aspect == 'pad' else 'square',
    mm_hidden_size=vision.hidden_size,
    mm_patch_merge_type='flat',
    mm_projector_type='mlp2x_gelu',
    mm_use_im_patch_token=False,
    mm_use_im_start_end=False,
    mm_vision_select_feature='patch',
    mm_vision_select_layer=vision.select_layer,
    mm_vision_tower=_tower_name(vision),
    unfreeze_mm_vision_tower=True,  # else the released package takes the tower of that name, not the exported one
    use_mm_proj=True,
    torch_dtype=dtype,
    **{OURS: {name: getattr(data, name) for name in _OUR_FIELDS}},
  )
  if not bare:
    config |= dict(
      compressor_size=model.compressor.grid,
      prefusion_layer_num=model.prefusion.num_layers,
      resolution_ratio=data.grid,
    )
  tower = dict(
    architectures=['CLIPVisionModel'],
    model_type='clip_vision_model',
    **{name: getattr(vision, name) for name in CLIP_DEFAULTS},
    **_CLIP_FIXED,
    torch_dtype=dtype,
  )
  return config, tower


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
  """`preprocessor_config.json` of the tower's images: shorter side to size, centre crop, CLIP's mean and deviation."""
  size = vision.image_size
  return dict(
    image_processor_type='CLIPImageProcessor',
    do_convert_rgb=True,
    do_resize=True,
    size=dict(shortest_edge=size),
    resample=3,  # bicubic
    do_center_crop=True,
    crop_size=dict(height=size, width=size),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(IMAGE_MEAN),
    image_std=list(IMAGE_STD),
  )


def _require(where: str, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
  for name, value in fixed.items():
    if config.get(name, value) != value:
      raise ConfigError(
        f'{where} {name}: expected {value if isinstance(value, str) else repr(value)}; found {config[name]!r}'
      )


def _section(where: str, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """The object under that name; an empty one for null or none. Raises ConfigError."""
  value = config.get(name)
  if value is not None and not isinstance(value, Mapping):
    raise ConfigError(f'{where} {name}: expected an object; found {value!r}')
  return value or {}


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
  value = config.get(name, default)
  if not _is(value, int):
    raise ConfigError(f'config.json {name}: expected int; found {value!r}')
  return value


def _require_types(where: str, config: Mapping[str, Any], types: Mapping[str, type], prefix: str = '') -> None:
  """Raises ConfigError for the first field of another type; null and absent ones have a default."""
  for name, kind in types.items():
    value = config.get(name)
    if value is not None and not _is(value, kind):
      raise ConfigError(f'{where} {prefix}{name}: expected {kind.__name__}; found {value!r}')


def _is(value: Any, kind: type) -> bool:
  if isinstance(value, bool):
    return kind is bool
  if kind is float:
    return isinstance(value, int | float) and math.isfinite(value)
  return isinstance(value, kind)


def _require_released(model: LlavaMiniConfig, data: DataConfig, bare: bool) -> None:
  faults = [f'data.grid: expected 1, found {data.grid}'] if bare and data.grid != 1 else []
  for section, fields in ({} if bare else _RELEASED_FIXED).items():
    for name, value in fields.items():
      found = getattr(getattr(model, section), name)
      if found != value:
        faults.append(f'{section}.{name}: expected {value!r}, found {found!r}')
  if not bare and not model.compressor.grid:
    faults.append('compressor.grid: expected 1 or more, found 0')
  if faults:
    raise ConfigError(f'the released layout cannot hold this model: {"; ".join(faults)}')


def _with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value if config.get(name) is None else config[name] for name, value in defaults.items()}


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
  """From `rope_parameters` (transformers 5), else from `rope_theta` and `rope_scaling` (before). Raises ConfigError."""
  field = 'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'
  rope = _section('config.json', config, field)
  _require_types('config.json', rope, _ROPE_TYPES, f'{field}.')
  kind = rope.get('rope_type', rope.get('type', 'default' if field == 'rope_parameters' else 'llama3'))
  if kind not in ('llama3', 'default'):
    raise ConfigError(f'config.json {field}: expected type llama3 or null; found {kind!r}')
  names = [f.name for f in dataclasses.fields(RopeScaling)] if kind == 'llama3' else []
  scaling = RopeScaling(**{name: rope[name] for name in names if rope.get(name) is not None})
  return rope.get('rope_theta') or config.get('rope_theta') or 10000.0, scaling


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
  return None if scaling.factor == 1.0 else dict(rope_type='llama3', **dataclasses.asdict(scaling))


def _tower_name(vision: VisionConfig) -> str:
  """The known tower of this shape, which the released package asks for by name."""
  sizes = {name: getattr(vision, name) for name in CLIP_DEFAULTS}
  for name, known in KNOWN_TOWERS.items():
    if all(getattr(known, field) == value for field, value in sizes.items()):
      return name
  return 'vision_config.json'

"""The model's configuration: frozen dataclasses, presets, and the HF `config.json` they come from.

Every field that names a difference between the paper and the released package
defaults to what the released package does, so that its checkpoints load and
run unchanged; `docs/fidelity.md` lists those switches.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
QUANTIZED = ('int8', 'int4', 'nf4')  # what kernels may be kept in: `models.quantized`
# `models.compressors` has a class for each; none = every patch goes to the decoder (LLaVA-v1.5, and stage 1)
COMPRESSORS = ('query', 'average', 'mqt', 'prumerge', 'prumerge_plus', 'tokenpacker', 'llama_vid', 'voco', 'none')


class ConfigError(ValueError):
  """A configuration that cannot be built; the message names the field, what was found and what is allowed."""


def require_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises ConfigError unless `value` is one of `allowed`."""
  if value not in allowed:
    raise ConfigError(f'{field}: expected one of {", ".join(allowed)}; found {value!r}')


def _positive(config: Any, *fields: str) -> None:
  for field in fields:
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ConfigError(f'{type(config).__name__}.{field}: expected a positive integer; found {value!r}')


def _divides(config: Any, part: str, whole: str) -> None:
  if getattr(config, whole) % getattr(config, part):
    raise ConfigError(
      f'{type(config).__name__}.{whole}={getattr(config, whole)} is not a multiple of {part}={getattr(config, part)}'
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """CLIP vision tower (defaults: ViT-L/14-336)."""

  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  image_size: int = 336
  patch_size: int = 14
  layer_norm_eps: float = 1e-5
  select_layer: int = -2  # index into the num_hidden_layers + 1 hidden states (HF `mm_vision_select_layer`)
  keep_unused_layers: bool = False  # hold (never run) the weights after the selected layer, for export

  def __post_init__(self):
    _positive(self, 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
    _positive(self, 'image_size', 'patch_size')
    _divides(self, 'num_attention_heads', 'hidden_size')
    _divides(self, 'patch_size', 'image_size')
    if not -self.num_hidden_layers - 1 <= self.select_layer <= self.num_hidden_layers:
      raise ConfigError(
        f'VisionConfig.select_layer={self.select_layer} is not a hidden state of {self.num_hidden_layers} layers'
      )

  @property
  def grid(self) -> int:
    """Patches per side."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid**2

  @property
  def run_layers(self) -> int:
    """Layers that produce the selected hidden state; the ones after it never run."""
    return self.select_layer % (self.num_hidden_layers + 1)


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
  """Compression of P patch tokens to C; docs/compressors.md says which kind reads which field, and refuses which."""

  kind: str = 'query'  # one of COMPRESSORS
  grid: int = 1  # C = grid²; mqt: of its queries. 0 = no vision token, the fused text alone knows the image
  keep: int = 0  # mqt: C, the first so many queries (0 = all); voco: C; prumerge: patches that stay
  # mqt: each training step draws its number of tokens, 2, 4, … up to C; prumerge: `keep` at most, each image its own
  elastic: bool = False
  within: int = 0  # L > 0: inside the decoder, after its first L layers (paper Table 12); 0 = before it
  neighbours: int = 32  # prumerge: patches that are merged into each one that stays
  layers: tuple = (12, 16, 22, 23)  # tokenpacker: hidden states of the tower that keys and values are made of
  text_queries: int = 32  # llama_vid: that read the question
  num_heads: int = 8
  space: str = 'vision'  # vision = before the projector (released); llm = after it (paper)
  attention: str = 'mha'  # query: LayerNorms, projections, heads (released); plain = Eq. 2 as written
  key_position: str = 'query_table'  # query: query_table = resized bicubically (released); native_grid; none
  init_std: float = 0.02

  def __post_init__(self):
    require_choice('CompressorConfig.kind', self.kind, COMPRESSORS)
    require_choice('CompressorConfig.space', self.space, ('vision', 'llm'))
    require_choice('CompressorConfig.attention', self.attention, ('mha', 'plain'))
    require_choice('CompressorConfig.key_position', self.key_position, ('query_table', 'native_grid', 'none'))
    _positive(self, 'num_heads', 'neighbours', 'text_queries')
    for field in ('grid', 'keep', 'within'):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f'CompressorConfig.{field}: expected 0 or more; found {value!r}')


@dataclasses.dataclass(frozen=True)
class PrefusionConfig:
  """Modality pre-fusion: Llama layers over [patches; compressed; text] (paper Sec. 4.1, Eq. 3)."""

  num_layers: int = 4
  fuse_compressed: bool = True  # the decoder gets the *fused* compressed tokens (released); False = Eq. 3 as written
  fuse_token_zero: bool = False  # the released code masks token id 0 ("!" in Llama-3) out of pre-fusion
  fuse_history_answers: bool = True  # at inference the answers of earlier turns are fused (released); training never
  init: str = 'random'  # random; decoder = copies of the decoder's first layers

  def __post_init__(self):
    require_choice('PrefusionConfig.init', self.init, ('random', 'decoder'))
    if self.num_layers < 0:
      raise ConfigError(f'PrefusionConfig.num_layers: expected 0 or more; found {self.num_layers}')


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama-3 frequency scaling, as in HF `rope_scaling` of type `llama3`. factor 1 = off."""

  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Llama decoder; pre-fusion layers have its shape too."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling = RopeScaling()
  rms_norm_eps: float = 1e-5
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 4096
  initializer_range: float = 0.02

  def __post_init__(self):
    _positive(self, 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers')
    _positive(self, 'num_attention_heads', 'num_key_value_heads', 'head_dim', 'max_position_embeddings')
    _divides(self, 'num_key_value_heads', 'num_attention_heads')
    if self.head_dim % 2:
      raise ConfigError(f'DecoderConfig.head_dim: rotary embedding needs an even size; found {self.head_dim}')


REMAT = ('full', 'attention', 'projections', 'mlp', 'dots', 'none')


@dataclasses.dataclass(frozen=True)
class ScanConfig:
  """How stacks of layers run."""

  # What a layer keeps for the backward pass: full = nothing, all is computed again; attention = what attention leaves;
  # projections = that, queries, keys and values; mlp = those, and what goes into the activation of the feed-forward
  # part; dots = every matrix product; none = every activation
  remat: str = 'full'
  vision_remat: str = ''  # of the tower, if it trains (frozen, it keeps nothing whatever this says); '' = remat
  prefusion_remat: str = ''  # of pre-fusion; '' = remat
  unroll: bool = False  # True writes the loop out: faster for small models on CPUs, slower to compile

  def __post_init__(self):
    require_choice('ScanConfig.remat', self.remat, REMAT)
    for name in ('vision_remat', 'prefusion_remat'):
      require_choice(f'ScanConfig.{name}', getattr(self, name), ('', *REMAT))

  def of(self, stage: str) -> ScanConfig:
    """How the layers of `vision`, `prefusion` or `decoder` run."""
    return dataclasses.replace(self, remat=getattr(self, f'{stage}_remat', '') or self.remat)


@dataclasses.dataclass(frozen=True)
class LlavaMiniConfig:
  """The whole model."""

  vision: VisionConfig
  compressor: CompressorConfig
  prefusion: PrefusionConfig
  decoder: DecoderConfig
  detach_text: bool = True  # text embeddings enter without gradient, so embed_tokens never trains (released)
  # rows without an image: skip = plain decoder; zero_image = fused with pixels of zero (released training)
  text_only: str = 'skip'
  # True: no gradient through any visual of a batch whose rows hold several (released: of videos stacked to 6-D)
  video_stop_grad: bool = False
  visual_chunk: int = 0  # most visuals of a row in memory at a time: memory flat in a video's length; 0 = all
  dtype: str = 'bfloat16'  # compute; parameters are f32
  attention: str = 'auto'  # jnp; splash = the TPU kernel; auto = splash on TPUs where it pays (`models/attention.py`)
  scan: ScanConfig = ScanConfig()

  def __post_init__(self):
    require_choice('LlavaMiniConfig.text_only', self.text_only, ('skip', 'zero_image'))
    require_choice('LlavaMiniConfig.dtype', self.dtype, ('bfloat16', 'float32'))
    require_choice('LlavaMiniConfig.attention', self.attention, ('auto', 'jnp', 'splash'))
    if isinstance(self.visual_chunk, bool) or self.visual_chunk < 0:
      raise ConfigError(f'LlavaMiniConfig.visual_chunk: expected 0 or more; found {self.visual_chunk!r}')
    self._check_compressor()
    if self.prefusion.init == 'decoder' and self.prefusion.num_layers > self.decoder.num_hidden_layers:
      raise ConfigError(
        f'prefusion.init=decoder needs {self.prefusion.num_layers} decoder layers; '
        f'there are {self.decoder.num_hidden_layers}'
      )

  def _check_compressor(self) -> None:
    from llava_mini_jax.models.compressors.checks import check_compressor  # which builds on this file

    check_compressor(self)

  @property
  def compressor_width(self) -> int:
    return self.vision.hidden_size if self.compressor.space == 'vision' else self.decoder.hidden_size

  @property
  def compressor_class(self) -> Any:
    """The class in `models.compressors`; None = no compressor."""
    from llava_mini_jax.models.compressors import KINDS  # which builds on this file

    return KINDS.get(self.compressor.kind)

  def compressor_reads(self, what: str) -> bool:
    """Whether its compressor takes one of `Compressor.reads`."""
    return bool(self.compressor_class) and what in self.compressor_class.reads

  @property
  def compressor_attends(self) -> bool:
    """Whether `LlavaMini.compress` can say where the compressor looked."""
    kind = self.compressor_class
    return bool(kind and kind.gives_attention and self.new_tokens(1) and not self.compressor.within)

  @property
  def reads_visuals_plainly(self) -> bool:
    """Whether what the decoder gets of a visual depends on that visual alone, is as long for every one, and is read
    there like any other token."""
    kind, config = self.compressor_class, self.compressor
    special = kind and (kind.in_decoder or kind.varies(config) or 'text' in kind.reads)
    return not (config.within or special)

  def require_plain_visuals(self, who: str, advice: str = '') -> None:
    """Raises ConfigError unless `reads_visuals_plainly`; `advice` ends the message."""
    if not self.reads_visuals_plainly:
      config = self.compressor
      raise ConfigError(
        f'{who}: expected a compressor whose tokens are the same for every question, all of them, outside the decoder; '
        f'found kind={config.kind!r}, within={config.within}, elastic={config.elastic}{advice}'
      )

  def without_compression(self) -> LlavaMiniConfig:
    """LLaVA-v1.5's way with the same parts: every patch goes to the decoder, and there is no pre-fusion."""
    parts = dict(compressor=CompressorConfig(kind='none'), prefusion=PrefusionConfig(num_layers=0))
    return dataclasses.replace(self, **parts)

  @property
  def tokens_per_visual(self) -> int:
    """C: what one image, or one frame, of a single view costs in the decoder."""
    return self.slots_per_visual(1)

  def slots_per_visual(self, views: int) -> int:
    """C of an image or a frame of so many views; without a compressor every patch of every view."""
    compressor = self.compressor_class
    patches = views * self.vision.num_patches if compressor is None or compressor.keeps_patches else 0
    return patches + self.new_tokens(views)

  def new_tokens(self, views: int) -> int:
    """What the compressor makes of an image of so many views: of its crops, if it has any."""
    compressor = self.compressor_class
    patches = self.vision.num_patches * (views - 1 or 1)
    return compressor.tokens(self.compressor, patches) if compressor else 0

  @classmethod
  def preset(cls, name: str) -> LlavaMiniConfig:
    """One of `vicuna_7b`, `vicuna_13b`, `llama31_8b`, `smollm2_135m`, `tiny`. Raises ConfigError for another name."""
    from llava_mini_jax.presets import PRESETS  # which builds on this file

    if name not in PRESETS:
      raise ConfigError(f'unknown preset {name!r}{_suggest(name, PRESETS)}')
    return PRESETS[name]()

  def to_dict(self) -> dict[str, Any]:
    """Plain nested dict, one key per field: what a checkpoint stores and what `--config.model.…` overrides."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> LlavaMiniConfig:
    """Inverse of `to_dict`. Raises ConfigError naming an unknown, missing or wrongly typed field."""
    return build_dataclass(cls, values, 'model')

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], vision: Mapping[str, Any]) -> LlavaMiniConfig:
    """From the released `config.json` and its CLIP tower's (`vision_config.json`); see `convert.hf_config`."""
    from llava_mini_jax.convert.hf_config import released_from_hf  # which builds on this file

    return released_from_hf(config, vision)


_NESTED = {
  'vision': VisionConfig,
  'compressor': CompressorConfig,
  'prefusion': PrefusionConfig,
  'decoder': DecoderConfig,
  'rope_scaling': RopeScaling,
  'scan': ScanConfig,
}
_TYPES = {'int': int, 'float': (int, float), 'bool': bool, 'str': str, 'tuple': (tuple, list)}


def _suggest(name: str, names) -> str:
  close = difflib.get_close_matches(name, names, n=1)
  return f'; did you mean {close[0]!r}?' if close else f'; expected one of {", ".join(sorted(names))}'


def build_dataclass(cls, values: Mapping[str, Any], path: str):
  """A config dataclass from a mapping of its fields.

  Raises:
    ConfigError: an unknown field (with the closest name), a missing one, or a value of the wrong type.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f'{path}: expected a mapping of fields; found {values!r}')
  fields = {f.name: f for f in dataclasses.fields(cls)}
  arguments = {}
  for name, value in values.items():
    where = f'{path}.{name}'
    if name not in fields:
      raise ConfigError(f'{where}: unknown field{_suggest(name, fields)}')
    if name in _NESTED:
      arguments[name] = build_dataclass(_NESTED[name], value, where)
      continue
    expected = fields[name].type
    is_number = not isinstance(value, bool) and not (isinstance(value, float) and not math.isfinite(value))
    if not isinstance(value, _TYPES[expected]) or (expected in ('int', 'float') and not is_number):
      raise ConfigError(f'{where}: expected {expected}; found {value!r}')
    arguments[name] = _tuples(value) if expected == 'tuple' else value
  required = [
    n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
  ]
  missing = [n for n in required if n not in arguments]
  if missing:
    raise ConfigError(f'{path}: missing {", ".join(missing)}')
  return cls(**arguments)


def _tuples(value: Any) -> Any:
  return tuple(_tuples(v) for v in value) if isinstance(value, tuple | list) else value

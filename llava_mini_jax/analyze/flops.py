"""Matrix-multiply FLOPs (2 per multiply-add) of a step, by component, from the config alone.

Counts every matmul including attention; the embedding lookup is free. The
unembedding is counted on all positions. Beside this `full` convention stands
the one of the paper's numbers, `calflops`: what calflops 0.3.2 counts of the
released modules, that is no product of attention, every layer of the tower and
all of the last layer of pre-fusion (whose patches nobody reads: they run there,
unused), and 5 FLOPs per element of a LayerNorm. The released pre-fusion also
has a slot for the `<image>` placeholder. With 43 text tokens this gives the
paper's Table 6 to the digit. In the backward pass a product with a weight costs
once its forward FLOPs for the gradient of the weight, if it trains, and once for
that of its input, if anything before it trains; a product of attention costs
twice, if anything before it trains.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError, DecoderConfig, LlavaMiniConfig, require_choice

CONVENTIONS = ('full', 'calflops')
_LAYER_NORM = 5.0  # FLOPs per element that calflops counts

PEAK_FLOPS = {  # bf16, per device, as published by the makers
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'TPU7x': 1153.5e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one forward pass, by component."""

  vision: float
  projector: float
  compressor: float
  prefusion: float
  decoder: float

  @property
  def total(self) -> float:
    return self.vision + self.projector + self.compressor + self.prefusion + self.decoder


def _llama_layers(config: DecoderConfig, layers: int, tokens: int, asks: int | None = None) -> np.ndarray:
  """asks: so many of the tokens alone are more than keys and values; None = all."""
  d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
  n, k = config.num_attention_heads, config.num_key_value_heads
  asks = tokens if asks is None else asks
  weights = tokens * 2 * d * h * k + asks * (2 * d * h * n + 3 * d * f)
  return layers * np.array([2.0 * weights, 4.0 * asks * tokens * n * h])


def _vision(model: LlavaMiniConfig) -> np.ndarray:
  config = model.vision
  w, f, tokens = config.hidden_size, config.intermediate_size, config.num_patches + 1
  layers = config.run_layers * np.array([2.0 * tokens * (4 * w * w + 2 * w * f), 4.0 * tokens**2 * w])
  if model.compressor_reads('class_attention'):
    layers += 2.0 * (tokens + 1) * w * w, 2.0 * tokens * w
  return layers + (2 * config.num_patches * 3 * config.patch_size**2 * w, 0)


def _parts(
  config: LlavaMiniConfig, *, rows: int, length: int, visuals: int, fused_text: int, views: int = 1
) -> dict[str, np.ndarray]:
  """Forward FLOPs [products with weights, products of attention] of each field of Flops."""
  w, d = config.vision.hidden_size, config.decoder.hidden_size
  images, patches, c = rows * visuals, config.vision.num_patches * views, config.new_tokens(views)
  keys = config.vision.num_patches * (views - 1 or 1)
  kind = config.compressor_class if c else None
  projected = patches + (c if kind and config.compressor.space == 'vision' and not kind.projects else 0)
  compressor = np.array(kind.flops(config, keys, images, fused_text) if kind else (0.0, 0.0))
  fusion = prefusion_parts(config, views=views, text=fused_text)
  parts = decoder_parts(config, length=length, visuals=visuals, views=views)
  layers = sum(_llama_layers(config.decoder, *part) for part in parts)
  return dict(
    vision=images * views * _vision(config),
    projector=np.array([images * 2.0 * projected * (w * d + d * d), 0.0]),
    compressor=compressor,
    prefusion=images * sum((_llama_layers(config.decoder, *part) for part in fusion), np.zeros(2)),
    decoder=rows * (layers + (2.0 * length * d * config.decoder.vocab_size, 0.0)),
  )


def forward_flops(config: LlavaMiniConfig, *, convention: str = 'full', **sizes: int) -> Flops:
  """One forward pass over a Batch of these static sizes (padding included, as the device computes it).

  sizes: rows, length, visuals, fused_text and, if several, views. Raises ConfigError for another convention.
  """
  require_choice('convention', convention, CONVENTIONS)
  parts = _parts(config, **sizes)
  if convention == 'full':
    return Flops(**{name: float(part.sum()) for name, part in parts.items()})
  counted = {name: float(part[0]) for name, part in parts.items()}
  images, views, vision = sizes['rows'] * sizes['visuals'], sizes.get('views', 1), config.vision
  counted['vision'] = images * views * _calflops_tower(config)
  fused = fused_visual_length(config, views) + sizes['fused_text']
  counted['prefusion'] = images * float(_llama_layers(config.decoder, config.prefusion.num_layers, fused)[0])
  if config.compressor.kind == 'query' and config.compressor.attention == 'mha':
    keys = vision.num_patches * (views if views == 1 else views - 1)
    counted['compressor'] += images * _LAYER_NORM * (keys + config.compressor.grid**2) * config.compressor_width
  return Flops(**counted)


def _calflops_tower(config: LlavaMiniConfig) -> float:
  v, tokens = config.vision, config.vision.num_patches + 1
  kernels = 2.0 * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
  norms = _LAYER_NORM * (2 * v.num_hidden_layers + 1) * v.hidden_size  # one before the layers and two in each
  embedding = 2.0 * v.num_patches * 3 * v.patch_size**2 * v.hidden_size
  return embedding + tokens * (v.num_hidden_layers * kernels + norms)


def fused_visual_length(config: LlavaMiniConfig, views: int = 1) -> int:
  """Tokens of a visual in pre-fusion, before the text."""
  compressed = config.prefusion.fuse_compressed and not config.compressor.within
  return views * config.vision.num_patches + (config.new_tokens(views) if compressed else 0)


def prefusion_parts(config: LlavaMiniConfig, *, views: int, text: int) -> list[tuple[int, int, int]]:
  """(layers, tokens, those that are more than keys and values) for a visual: of the last layer, what is read."""
  layers, vision = config.prefusion.num_layers, fused_visual_length(config, views)
  if not layers:
    return []
  read = vision if config.compressor.within else config.slots_per_visual(views)
  read = read if config.prefusion.fuse_compressed else 0
  return [(layers - 1, vision + text, vision + text), (1, vision + text, max(1, read + text))]


def decoder_parts(config: LlavaMiniConfig, *, length: int, visuals: int, views: int = 1) -> list[tuple[int, int]]:
  """(layers, tokens) of each part of the decoder for a row: where it compresses inside, its first layers see more."""
  within, layers = config.compressor.within, config.decoder.num_hidden_layers
  first = [(within, visuals * views * config.vision.num_patches + length)] if within else []
  return [*first, (layers - within, length)]


def kept_parts(config: LlavaMiniConfig, *, visuals: int = 1, views: int = 1, text: int = 0) -> list[tuple[int, int]]:
  """(layers, tokens) whose keys and values each part of the decoder keeps of a prompt, as `infer.generate` does.

  Where the number of tokens depends on the image, it is the largest. text: tokens that are kept; voco keeps none of
  those in front of the last visual.
  """
  within, layers = config.compressor.within, config.decoder.num_hidden_layers
  hides = config.compressor_class and config.compressor_class.in_decoder
  tokens = visuals * (config.new_tokens(views) if hides else config.slots_per_visual(views)) + text
  first = [(within, visuals * views * config.vision.num_patches + text)] if within else []
  return [*first, (layers - within, tokens)]


def require_lasting_tokens(config: LlavaMiniConfig) -> None:
  """Raises ConfigError for a compressor whose tokens depend on the question: another one needs another look."""
  if config.compressor_reads('text'):
    found = config.compressor.kind
    raise ConfigError(f'a later question: expected a compressor that does not read the question; found {found}')


def prompt_sizes(
  config: LlavaMiniConfig, text: int, *, visuals: int = 1, views: int = 1, convention: str = 'full'
) -> dict[str, int]:
  """`sizes` of one prompt without padding: so many visuals, all with the same `text` tokens (no `<image>` in them)."""
  fused = text + (convention == 'calflops')
  length = visuals * config.slots_per_visual(views) + text
  return dict(rows=1, length=length, visuals=visuals, fused_text=fused, views=views)


def prompt_flops(
  config: LlavaMiniConfig, text: int, *, visuals: int = 1, views: int = 1, convention: str = 'full'
) -> Flops:
  """Prefill of a prompt; see `prompt_sizes`."""
  sizes = prompt_sizes(config, text, visuals=visuals, views=views, convention=convention)
  return forward_flops(config, convention=convention, **sizes)


def later_question_flops(
  config: LlavaMiniConfig, text: int, *, earlier: int, visuals: int = 1, views: int = 1, convention: str = 'full'
) -> Flops:
  """`text` more tokens about visuals whose keys and values are kept, as are those of `earlier` tokens of text.

  No vision token depends on the text, so only the new tokens run, through pre-fusion once for each visual. Raises
  ConfigError for a compressor that reads the question, and for another convention.
  """
  require_choice('convention', convention, CONVENTIONS)
  require_lasting_tokens(config)
  d = config.decoder

  def layers(count: int, kept: int) -> float:
    weights, own = _llama_layers(d, count, text)
    seen = count * 4.0 * text * kept * d.num_attention_heads * d.head_dim
    return float(weights + (own + seen if convention == 'full' else 0.0))

  return Flops(
    vision=0.0,
    projector=0.0,
    compressor=0.0,
    prefusion=visuals * layers(config.prefusion.num_layers, fused_visual_length(config, views)),
    decoder=sum(layers(*part) for part in kept_parts(config, visuals=visuals, views=views, text=earlier))
    + unembedding_flops(config, text),
  )


def training_flops(
  config: LlavaMiniConfig, *, trains: Container[str], adapts: Container[str] = (), **sizes: int
) -> float:
  """One training step without recomputation.

  Args:
    trains: the fields of Flops that train; a decoder whose `embed_tokens` alone is frozen does.
    adapts: those of whose kernels only LoRA adapters train. The adapters' own products, of a rank, are left out.
    sizes: as `forward_flops`.
  """
  total, before = 0.0, False  # something trains in a station before this one
  parts = _parts(config, **sizes)
  for stations in (('vision',), ('projector', 'compressor'), ('prefusion',), ('decoder',)):
    here = any(name in trains or name in adapts for name in stations)
    for name in stations:
      weights, attention = parts[name]
      passes = before or name in trains or name in adapts
      total += weights * (1 + (name in trains) + passes) + attention * (1 + 2 * passes)
    before = before or here
  return total


def recomputed_flops(
  config: LlavaMiniConfig, *, trains: Container[str], adapts: Container[str] = (), **sizes: int
) -> float:
  """What the layers of a training step compute again for the backward pass, by their `ScanConfig.remat`.

  Products whose result the backward pass does not read, those with `down_proj` and of the tower's second MLP kernel,
  are not repeated. Attention is counted as `jnp` computes it. Arguments as of `training_flops`.
  """
  d, v = config.decoder, config.vision
  rows, views = sizes['rows'], sizes.get('views', 1)
  images, fusion = rows * sizes['visuals'], prefusion_parts(config, views=views, text=sizes['fused_text'])
  n, k, h = d.num_attention_heads, d.num_key_value_heads, d.head_dim
  llama = dict(
    kv=d.hidden_size * h * 2 * k, q=d.hidden_size * h * n, mlp=2 * d.hidden_size * d.intermediate_size
  )  # the product after attention is as large as that of the queries
  tower = dict(kv=2 * v.hidden_size**2, q=v.hidden_size**2, mlp=v.hidden_size * v.intermediate_size)
  decoder = decoder_parts(config, length=sizes['length'], visuals=sizes['visuals'], views=views)
  stations = (  # sequences, layers, tokens, those that are more than keys and values
    ('vision', images * views, v.run_layers, v.num_patches + 1, v.num_patches + 1, tower, v.hidden_size),
    *(('prefusion', images, *part, llama, n * h) for part in fusion),
    *(('decoder', rows, layers, tokens, tokens, llama, n * h) for layers, tokens in decoder),
  )
  total, passes = 0.0, False
  for name, sequences, layers, tokens, asks, kernels, width in stations:
    early = ('projector', 'compressor') if name == 'prefusion' else ()
    passes = passes or any(part in trains or part in adapts for part in (name, *early))
    scores = 2.0 * asks * tokens * width
    results = 2.0 * asks * (kernels['q'] + kernels['mlp'])
    projections = 2.0 * (asks * kernels['q'] + tokens * kernels['kv'])
    again = {
      'none': 0.0,
      'dots': scores,
      'mlp': 2.0 * asks * kernels['q'] + scores,
      'projections': results + scores,
      'attention': results + scores + projections,
      'full': results + 2 * scores + projections,
    }
    total += passes * sequences * layers * again[config.scan.of(name).remat]
  return total


def unembedding_flops(config: LlavaMiniConfig, tokens: int) -> float:
  """The logits of so many tokens."""
  return 2.0 * tokens * config.decoder.hidden_size * config.decoder.vocab_size


def decode_flops(config: LlavaMiniConfig, *, rows: int, slots: int) -> float:
  """One new token per row, which sees a cache of so many slots (those not in use included).

  Raises ConfigError where the decoder compresses inside: its parts have caches of different lengths.
  """
  if config.compressor.within:
    raise ConfigError(f'decode_flops: expected compressor.within=0; found {config.compressor.within}')
  d = config.decoder
  (weights, _), seen = _llama_layers(d, d.num_hidden_layers, 1), 4.0 * slots * d.num_attention_heads * d.head_dim
  return rows * (weights + d.num_hidden_layers * seen) + unembedding_flops(config, rows)


def peak_flops(dtype: str) -> float:
  """Peak FLOP/s of all devices: published for known accelerators, else measured on a matmul of `dtype`."""
  kind = jax.devices()[0].device_kind
  if kind in PEAK_FLOPS:
    return PEAK_FLOPS[kind] * jax.device_count()
  # Emulated devices share one machine, so an unknown device is measured once, not per device.
  size, repeats = 1024, 3
  x = jnp.ones((size, size), dtype)
  multiply = jax.jit(lambda x: x @ x)
  multiply(x).block_until_ready()
  best = float('inf')
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best

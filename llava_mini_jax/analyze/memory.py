"""Bytes that a model takes on the device, from the config alone: weights, what an image leaves behind, activations.

The paper's 358 MB and 0.6 MB per image are not of keys and values alone (288 and 0.5 MiB): they come out as MiB if the
float32 logits of every prompt token are kept too, as `transformers` 4.43 does. That reading is inferred; the paper does
not say it. Here a decode needs the logits of the last position only, so `logits='last'` counts none per image.
"""

from __future__ import annotations

import dataclasses
import math

from llava_mini_jax.analyze.flops import (
  decoder_parts,
  fused_visual_length,
  kept_parts,
  prefusion_parts,
  require_lasting_tokens,
)
from llava_mini_jax.config import DecoderConfig, LlavaMiniConfig, require_choice
from llava_mini_jax.train.tree import parameter_shapes

MIB = 2**20
LOGITS = ('all', 'last')
STATIONS = ('vision', 'projector', 'compressor', 'prefusion', 'decoder')


@dataclasses.dataclass(frozen=True)
class ImageMemory:
  """Bytes that one image or frame leaves in memory after the prefill."""

  cache: int  # keys and values of its tokens in the decoder
  logits: int  # float32, of those tokens

  @property
  def total(self) -> int:
    return self.cache + self.logits


def cache_bytes_per_token(config: DecoderConfig, element_bytes: int = 2) -> int:
  """Keys and values of one token in all layers of the decoder."""
  return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element_bytes


def image_memory(
  config: LlavaMiniConfig, *, views: int = 1, logits: str = 'last', element_bytes: int = 2
) -> ImageMemory:
  """Of each part of the decoder what `flops.kept_parts` says; the logits are of the prompt's slots.

  Args:
    logits: all = kept for every prompt token; last = for none of an image. Raises ConfigError for another.
  """
  require_choice('logits', logits, LOGITS)
  of_layer = cache_bytes_per_token(dataclasses.replace(config.decoder, num_hidden_layers=1), element_bytes)
  kept = config.slots_per_visual(views) * 4 * config.decoder.vocab_size if logits == 'all' else 0
  return ImageMemory(sum(layers * tokens for layers, tokens in kept_parts(config, views=views)) * of_layer, kept)


def session_bytes(config: LlavaMiniConfig, *, views: int = 1, element_bytes: int = 2) -> int:
  """Of one visual whose later questions cost no second look: pre-fusion's keys and values, the decoder's besides.

  Raises ConfigError for a compressor that reads the question.
  """
  require_lasting_tokens(config)
  fused = fused_visual_length(config, views)
  layers = dataclasses.replace(config.decoder, num_hidden_layers=max(1, config.prefusion.num_layers))
  kept = fused * cache_bytes_per_token(layers, element_bytes) if config.prefusion.num_layers else 0
  return kept + image_memory(config, views=views, element_bytes=element_bytes).cache


def weight_bytes(config: LlavaMiniConfig, element_bytes: int = 2) -> dict[str, int]:
  """By component; those that this configuration does not have are left out."""
  found = dict.fromkeys(STATIONS, 0)
  for path, shape in parameter_shapes(config).items():
    found[path.split('/')[0]] += math.prod(shape) * element_bytes
  return {name: size for name, size in found.items() if size}


def video_bytes(config: LlavaMiniConfig, frames: int, *, logits: str = 'last', element_bytes: int = 2) -> int:
  """Weights and what `frames` frames leave behind. Frames are encoded one after the other (`visual_chunk`)."""
  frame = image_memory(config, logits=logits, element_bytes=element_bytes)
  return sum(weight_bytes(config, element_bytes).values()) + frames * frame.total


def kept_activation_bytes(config: LlavaMiniConfig, *, element_bytes: int = 2, **sizes: int) -> dict[str, int]:
  """What the layers of pre-fusion and decoder keep for the backward pass, by `ScanConfig.remat`.

  Args:
    sizes: rows, length, visuals, fused_text and, if several, views, as of `flops.forward_flops`.
  Returns:
    {'prefusion', 'decoder'}: bytes. Whatever is outside of the layers (logits, the frozen tower) is not in them.
  Raises:
    ConfigError: remat `dots` or `none`, which keep what only the compiled program shows (launch/compile_tpu.py).
  """
  d, views, images = config.decoder, sizes.get('views', 1), sizes['rows'] * sizes['visuals']
  decoder = decoder_parts(config, length=sizes['length'], visuals=sizes['visuals'], views=views)
  fusion = prefusion_parts(config, views=views, text=sizes['fused_text'])
  parts = dict(  # sequences, and their layers, tokens, and those that are more than keys and values
    prefusion=(images, fusion), decoder=(sizes['rows'], [(layers, tokens, tokens) for layers, tokens in decoder])
  )
  context, projections = d.num_attention_heads * d.head_dim, 2 * d.num_key_value_heads * d.head_dim
  kept = {}
  for name, (sequences, part) in parts.items():
    remat = config.scan.of(name).remat
    require_choice(f'{name} remat', remat, ('full', 'attention', 'projections', 'mlp'))
    projected = remat in ('projections', 'mlp')
    of_token = d.hidden_size + projected * projections
    of_query = (remat != 'full') * context + projected * context + (remat == 'mlp') * 2 * d.intermediate_size
    size = sum(layers * (tokens * of_token + asks * of_query) for layers, tokens, asks in part)
    kept[name] = sequences * size * element_bytes
  return kept

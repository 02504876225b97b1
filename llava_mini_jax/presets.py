"""The sizes that have a name; `LlavaMiniConfig.preset` looks them up."""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import (
  CompressorConfig,
  DecoderConfig,
  LlavaMiniConfig,
  PrefusionConfig,
  RopeScaling,
  ScanConfig,
  VisionConfig,
)


def _vicuna_7b() -> LlavaMiniConfig:
  return LlavaMiniConfig(
    vision=VisionConfig(),
    compressor=CompressorConfig(),
    prefusion=PrefusionConfig(),
    decoder=DecoderConfig(
      vocab_size=32000,
      hidden_size=4096,
      intermediate_size=11008,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=32,
      head_dim=128,
    ),
  )


def _vicuna_13b() -> LlavaMiniConfig:
  base = _vicuna_7b()
  decoder = dataclasses.replace(
    base.decoder,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
  )
  return dataclasses.replace(base, decoder=decoder)


def _llama31_8b() -> LlavaMiniConfig:
  base = _vicuna_7b()
  decoder = dataclasses.replace(
    base.decoder,
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0),
    max_position_embeddings=131072,
  )
  return dataclasses.replace(base, decoder=decoder)


def _smollm2_135m() -> LlavaMiniConfig:
  decoder = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
  )
  return dataclasses.replace(_vicuna_7b(), decoder=decoder)


def _tiny() -> LlavaMiniConfig:
  """Trains from scratch on two CPU cores in minutes; nothing pretrained, so the text embeddings train too."""
  return LlavaMiniConfig(
    vision=VisionConfig(
      hidden_size=96,
      intermediate_size=192,
      num_hidden_layers=5,
      num_attention_heads=2,
      image_size=64,
      patch_size=8,
    ),
    compressor=CompressorConfig(),
    prefusion=PrefusionConfig(num_layers=1),
    decoder=DecoderConfig(
      vocab_size=512,
      hidden_size=96,
      intermediate_size=256,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=4,
      head_dim=24,
      max_position_embeddings=512,
      initializer_range=0.06,
    ),
    detach_text=False,
    dtype='float32',
    scan=ScanConfig(remat='none', unroll=True),
  )


PRESETS = {
  'vicuna_7b': _vicuna_7b,
  'vicuna_13b': _vicuna_13b,
  'llama31_8b': _llama31_8b,
  'smollm2_135m': _smollm2_135m,
  'tiny': _tiny,
}

"""Whether a model can have the compressor that its config names, with the fields that it sets."""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import ConfigError, LlavaMiniConfig

_SHARED = ('kind', 'within', 'num_heads', 'space', 'init_std')  # may stay as they are when the kind alone is changed


def check_compressor(model: LlavaMiniConfig) -> None:
  """Raises ConfigError: a field set that the kind does not read, or that it cannot have; a place where it cannot be."""
  kind = model.compressor_class
  _check_fields(model)
  if kind:
    kind.check(model)
  if not model.tokens_per_visual and not model.prefusion.num_layers:
    raise ConfigError('prefusion.num_layers: expected 1 or more without vision tokens; found 0')
  if model.compressor.within:
    _check_within(model)


def _check_fields(model: LlavaMiniConfig) -> None:
  config = model.compressor
  read = model.compressor_class.fields if model.compressor_class else ()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != field.default and field.name not in (*_SHARED, *read):
      expected = f'{field.default!r} with {config.kind}, which does not read it'
      raise ConfigError(f'CompressorConfig.{field.name}: expected {expected}; found {value!r}')


def _check_within(model: LlavaMiniConfig) -> None:
  config, layers = model.compressor, model.decoder.num_hidden_layers
  if config.within >= layers:
    raise ConfigError(
      f'CompressorConfig.within: expected fewer than the {layers} decoder layers; found {config.within}'
    )
  if not (model.compressor_class and model.compressor_class.inside):
    raise ConfigError(f'CompressorConfig.within: expected 0 with {config.kind}; found {config.within}')
  if config.space != 'llm' or config.elastic or not model.tokens_per_visual:
    raise ConfigError('CompressorConfig.within: expected space=llm, at least one token and not elastic')

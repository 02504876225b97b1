"""What a compressor is: patch features in, C tokens out, and what it says of itself before it is built."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import nnx

from llava_mini_jax.config import CompressorConfig, LlavaMiniConfig
from llava_mini_jax.types import Batch


class Compressor(nnx.Module):
  """A kind of compressor is a subclass in a file of its own and a row of `compressors.KINDS`; docs/compressors.md.

  `__init__(model, *, rngs)` makes its parameters. `__call__(x, **read)` takes the patches of one visual each, [B P W]
  of `compressor.space`, and what `reads` names, and gives [B C W], in the order in which tokens enter the decoder; if
  their number depends on the image, also int32[B], how many of the C count, from the first.

  Attributes:
    fields: those of `CompressorConfig` that it reads, besides `kind` and `within`; others must have their defaults
      (`checks`).
    reads: other arguments that `__call__` takes, of
      project: the projector, [... W] -> [... D], for what maps a part of its tokens itself;
      text: the raw embeddings of the instruction [B T D] and which of them are there, bool[B T];
      layers: the hidden states of `compressor.layers`, joined, [B P k·W];
      class_attention: keys of the layer after the selected one, [B P W], joined with how much the class token attends
        to each patch there.
    projects: True: it gives the decoder's width, [B C D]; False: the projector follows, if `space` is vision.
    keeps_patches: True: the patches go to the decoder too, before its tokens.
    inside: True: it can compress the decoder's hidden states as well (`compressor.within`).
    in_decoder: True: the decoder itself compresses: what its tokens are to each other is said by `roles`.
    gives_attention: `__call__(x, return_attention=True)` also gives the head-mean weights float32[B C P].
  """

  fields: ClassVar[tuple[str, ...]] = ()
  reads: ClassVar[tuple[str, ...]] = ()
  projects: ClassVar[bool] = False
  keeps_patches: ClassVar[bool] = False
  inside: ClassVar[bool] = False
  in_decoder: ClassVar[bool] = False
  gives_attention: ClassVar[bool] = False

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    self.config = model.compressor

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    """Raises ConfigError for a model that cannot have it."""

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    """C of a visual of so many patches."""
    raise NotImplementedError

  @staticmethod
  def varies(config: CompressorConfig) -> bool:
    """Whether the number of its tokens depends on the image."""
    return False

  @staticmethod
  def roles(config: CompressorConfig, batch: Batch) -> jax.Array:
    """What each token of a row is to the others, int32[B L], as `AttentionMask.roles`: of what is `in_decoder`."""
    raise NotImplementedError

  @staticmethod
  def flops(model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    """Of so many visuals in one batch, with so many text tokens each: FLOPs of products with weights, and of others."""
    return 0.0, 0.0

  def __call__(self, x: jax.Array) -> jax.Array:
    raise NotImplementedError

"""LLaMA-VID (arXiv 2311.17043): a context token that depends on the question, and grid² content tokens.

context = W_v · mean over queries of softmax(q W_k(x)ᵀ / √W) x, in the decoder's width; content = average pooling of x,
through the projector. q are `text_queries` queries that have read the question.

Simplified: the original's q come from a Q-Former of twelve layers (InstructBLIP's) that reads question and image; here
learnt queries read the question's raw embeddings in one cross-attention with one head. A token that depends on the
question cannot be shared by questions side by side. It reads all instruction tokens that its visual is fused with, of
every turn: rows of several questions have it know later ones, so that it is trained with one question per row.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import CompressorConfig, LlavaMiniConfig
from llava_mini_jax.models.compressors.average import cells, check_cells
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.layers import Linear, fan_in, linear, param


class LlamaVid(Compressor):
  fields = ('grid', 'text_queries', 'space', 'init_std')
  reads = ('text', 'project')
  projects = True

  def __init__(self, model: LlavaMiniConfig, *, rngs: nnx.Rngs):
    self.config = config = model.compressor
    width, out = model.compressor_width, model.decoder.hidden_size
    init = nnx.initializers.truncated_normal(config.init_std)
    self.query = param(rngs, init, (config.text_queries, width), ('position', 'norm'))
    self.text_key = param(rngs, fan_in(0), (out, width), ('embed', 'vision_mlp'))
    self.text_value = param(rngs, fan_in(0), (out, width), ('embed', 'vision_mlp'))
    self.text_out = Linear(width, width, ('vision_embed', 'vision_mlp'), rngs=rngs)
    self.key = Linear(width, width, ('vision_embed', 'vision_mlp'), rngs=rngs)
    self.value = Linear(width, out, ('vision_embed', 'mlp'), rngs=rngs)

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    check_cells(model)

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return 1 + config.grid**2

  @staticmethod
  def flops(model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    """The projection of content is counted here."""
    w, d, n = model.compressor_width, model.decoder.hidden_size, model.compressor.text_queries
    c = model.compressor.grid**2 if model.compressor.space == 'vision' else 0
    weights = 2.0 * (2 * text * d * w + n * w**2 + patches * w**2 + w * d + c * (w * d + d**2))
    return images * weights, images * 4.0 * n * w * (text + patches)

  def __call__(self, x: jax.Array, *, text: tuple[jax.Array, jax.Array], project) -> jax.Array:
    """x [B P W], text [B T D] and bool[B T] -> [B 1 + grid² D]. Without text the queries stay as they are."""
    words, there = text
    q = self.query[...].astype(x.dtype)
    scores = jnp.einsum('QW,BTW->BQT', q, linear(words, self.text_key[...]), preferred_element_type=jnp.float32)
    scores = jnp.where(there[:, None], scores / math.sqrt(x.shape[-1]), -1e30)  # not -inf: there may be no text
    weights = (jax.nn.softmax(scores, axis=-1) * there[:, None]).astype(x.dtype)
    q = q + self.text_out(jnp.einsum('BQT,BTW->BQW', weights, linear(words, self.text_value[...])))

    scores = jnp.einsum('BQW,BPW->BQP', q, self.key(x), preferred_element_type=jnp.float32) / math.sqrt(x.shape[-1])
    seen = jnp.einsum('BQP,BPW->BQW', jax.nn.softmax(scores, axis=-1).astype(x.dtype), x)
    context = self.value(seen.astype(jnp.float32).mean(1, keepdims=True).astype(x.dtype))
    if not self.config.grid:
      return context
    content = cells(x, self.config.grid).astype(jnp.float32).mean(2).astype(x.dtype)
    content = project(content) if self.config.space == 'vision' else content
    return jnp.concatenate([context, content], axis=1)

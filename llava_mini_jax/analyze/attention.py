"""Where the decoder looks, layer by layer: between kinds of tokens, how widely, and at which patches.

Enters: a model and teacher-forced batches. Leaves: sums over tokens that add up over batches (`AttentionSums`), of
heads' mean attention. Layers are gone through one after the other, so the weights of one alone are in memory. Source:
the paper's Sec. 3.2 with Figures 2 to 5, and Appendix A, Eq. 4 and 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.models.attention import AttentionMask
from llava_mini_jax.models.layers import LlamaAttention, rope_tables
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.types import Batch

KINDS = ('instruction', 'vision', 'response')
_TINY = 1e-30  # below any weight that a softmax gives a token


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['flow', 'flow_count', 'entropy', 'entropy_count', 'map', 'map_count'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AttentionSums:
  """float32 or float64. The last axes: the kind that attends, the kind attended to, both in the order of KINDS."""

  flow: jax.Array | np.ndarray  # [layer 3 3]; attention of each token to all tokens of a kind
  flow_count: jax.Array | np.ndarray  # [layer 3 3]; tokens whose attention to that kind is not 0
  entropy: jax.Array | np.ndarray  # [layer 3], nats; of a token's attention within a kind
  entropy_count: jax.Array | np.ndarray  # [layer 3]; tokens that attend to that kind
  map: jax.Array | np.ndarray  # [layer C]; attention of text to each token of a visual
  map_count: jax.Array | np.ndarray  # []; text tokens that see the visual, over all visuals

  def mean_flow(self) -> np.ndarray:
    """[layer 3 3]: Eq. 4 and 5; 0 where no token attends."""
    return self.flow / np.maximum(self.flow_count, 1)

  def mean_entropy(self) -> np.ndarray:
    """[layer 3], nats: after attention is renormalised within the kind attended to."""
    return self.entropy / np.maximum(self.entropy_count, 1)

  def mean_map(self) -> np.ndarray:
    """[layer C]."""
    return self.map / np.maximum(self.map_count, 1)


def added(a: AttentionSums | None, b: AttentionSums) -> AttentionSums:
  """The sums of two batches, in float64 on the host."""
  b = jax.tree.map(lambda x: np.asarray(x, np.float64), b)
  return b if a is None else jax.tree.map(np.add, a, b)


def kinds(batch: Batch) -> jax.Array:
  """bool[B L 3]: which of KINDS each token is; padding is none. A response is what is learnt, all other text is
  instruction."""
  real = batch.segment_ids > 0
  rows, length = batch.tokens.shape
  slots = batch.slot_index.reshape(rows, -1)
  vision = jax.vmap(lambda at: jnp.zeros(length, bool).at[at].set(True, mode='drop'))(slots)
  learnt = jnp.pad(batch.loss_mask[:, :-1], ((0, 0), (1, 0)))  # a token is learnt where the one before it stands
  return jnp.stack([real & ~vision & ~learnt, real & vision, real & ~vision & learnt], axis=-1)


def attention_weights(attention: LlamaAttention, x: jax.Array, rope: Any, allowed: jax.Array) -> jax.Array:
  """Heads' mean of the softmax: float32[B L S] of x [B L D], with allowed bool[B L S]."""
  q, k, _ = attention.heads(x, rope)
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])  # [B L K G H]: query heads by the key head they share
  scores = jnp.einsum('BLKGH,BSKH->BKGLS', q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
  scores = jnp.where(allowed[:, None, None], scores, -jnp.inf)
  return jax.nn.softmax(scores, axis=-1).mean((1, 2))


def attention_sums(model: LlavaMini, batch: Batch) -> AttentionSums:
  """Of every layer of the decoder, over all tokens of a batch that are not padding. Jit it.

  Raises ConfigError: a model that compresses inside the decoder, whose layers have other rows.
  """
  x, batch, rope, allowed = _rows(model, batch)
  of_kind = kinds(batch).astype(jnp.float32)
  text = of_kind[..., 0] + of_kind[..., 2]

  def body(x, layer):
    weights = attention_weights(layer.self_attn, layer.input_layernorm(x), rope, allowed)
    sums = _sums(weights, of_kind) | _maps(weights * text[..., None], allowed, text, batch.slot_index)
    x, _ = layer(x, rope, allowed[:, None])
    return x, sums

  _, sums = jax.lax.scan(body, x, model.decoder.layers)
  return AttentionSums(**(sums | dict(map_count=sums['map_count'][0])))


def _rows(model: LlavaMini, batch: Batch) -> tuple[jax.Array, Batch, Any, jax.Array]:
  """What the decoder is given: embeddings [B L D], the batch as it is laid out then, rotary tables, bool[B L S]."""
  if model.config.compressor.within:
    raise ConfigError(f'attention: expected compressor.within=0; found {model.config.compressor.within}')
  x, batch = model.rows(batch)
  mask = AttentionMask(batch.segment_ids, batch.segment_ids, batch.branch_ids, model.roles(batch))
  return x, batch, rope_tables(batch.positions, model.config.decoder), mask.allowed()


def _sums(weights: jax.Array, of_kind: jax.Array) -> dict[str, jax.Array]:
  """weights float32[B L S], of_kind float32[B L 3] -> flow and entropy of one layer, with their counts."""
  to = jnp.einsum('BLS,BSt->BLt', weights, of_kind)
  attends = (to > 0).astype(jnp.float32)
  real = of_kind.sum(-1, keepdims=True)
  log = weights * jnp.log(jnp.maximum(weights, _TINY))
  # -sum p log p of p = weight / to
  entropy = jnp.log(jnp.maximum(to, _TINY)) - jnp.einsum('BLS,BSt->BLt', log, of_kind) / jnp.maximum(to, _TINY)
  return dict(
    flow=jnp.einsum('BLs,BLt->st', of_kind, to),
    flow_count=jnp.einsum('BLs,BLt->st', of_kind, attends),
    entropy=(entropy * attends * real).sum((0, 1)),
    entropy_count=(attends * real).sum((0, 1)),
  )


def _maps(weights: jax.Array, allowed: jax.Array, text: jax.Array, slot_index: jax.Array) -> dict[str, jax.Array]:
  """weights float32[B L S] of text tokens, slot_index int[B M C] -> the sum over visuals of one layer, [C]."""

  def one_row(weights, allowed, text, slots):
    here = slots < weights.shape[1]  # [M C]
    to = weights.sum(0)[jnp.minimum(slots, weights.shape[1] - 1)] * here  # [M C]
    seen = (allowed[:, jnp.minimum(slots[:, 0], weights.shape[1] - 1)] * text[:, None]).sum(0) * here[:, 0]
    return to.sum(0), seen.sum()

  total, count = jax.vmap(one_row)(weights, allowed, text, slot_index)
  return dict(map=total.sum(0), map_count=count.sum())


def right_without_vision(model: LlavaMini, batch: Batch, dropped: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many answers stay right when some layers do not see the vision tokens (Figure 5). Jit it.

  An answer is right if every token of it is the most likely one after the true ones before it, which is when greedy
  decoding gives it.

  Args:
    dropped: bool[layer]; in these layers no token attends to a vision token but itself.
  Returns:
    int32 answers that are right, and answers in all: one for each segment with something to learn.
  Raises:
    ConfigError: as `attention_sums`.
  """
  decoder = model.decoder
  x, batch, rope, allowed = _rows(model, batch)
  blind = allowed & (~kinds(batch)[:, None, :, 1] | jnp.eye(allowed.shape[1], dtype=bool))

  def body(x, layer_and_flag):
    layer, flag = layer_and_flag
    x, _ = layer(x, rope, jnp.where(flag, blind, allowed)[:, None])
    return x, None

  x, _ = jax.lax.scan(body, x, (decoder.layers, dropped))
  wrong = (decoder.logits(decoder.norm(x)).argmax(-1) != batch.targets) & batch.loss_mask
  most = batch.tokens.shape[1] + 1
  by_segment = lambda flags: jax.vmap(lambda s, f: jnp.zeros(most, bool).at[s].max(f))(batch.segment_ids, flags)  # noqa: E731
  asked = by_segment(batch.loss_mask)
  return (asked & ~by_segment(wrong)).sum(), asked.sum()

"""Attention, and the one description of who sees whom that all its implementations are built from.

Enters: queries [B L N H], keys and values [B S K H], and an `AttentionMask`, or
the bool mask made of one. Leaves: [B L N H]. `jnp` is `jax.nn.dot_product_attention`,
on CPUs `attend_on_cpu`; `splash` is JAX's Pallas kernel for TPUs, which never writes
the [L S] scores to memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from llava_mini_jax.config import require_choice
from llava_mini_jax.sharding import on_shards, platform, ways

KINDS = ('auto', 'jnp', 'splash')
BEHIND, CARRIES = 1, 2  # roles in `AttentionMask`
CONTEXT = 'attention_context'  # what attention leaves, by name, for `layers.scan_layers`

_LANES = 128
_BLOCKS = (640, 512, 384, 256)  # multiples of its 128 lanes; the largest whose scores fit on the core
_HIDDEN = -1e30  # added to the scores of keys that are not seen
_WORTH_IT = 256  # shorter rows cost jnp little, and would be mostly padding in blocks


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['query_segments', 'key_segments', 'branch_ids', 'roles', 'order'],
  meta_fields=['causal'],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """A query sees the keys of its own segment, earlier ones alone if `causal`, and other branches not at all.

  Padded keys get a segment that no real query has. Every query must see at least one key. If there are fewer queries
  than keys, they belong to the last of these (`of_last`).
  """

  query_segments: jax.Array  # int32[B L]
  key_segments: jax.Array  # int32[B S]
  branch_ids: jax.Array | None = None  # int32[B S], as `types.Batch`
  # int32[B S]: a key that is BEHIND tokens that carry what it says (CARRIES) is seen by these two alone; 0 = any other
  roles: jax.Array | None = None
  order: jax.Array | None = None  # int32[B S], which keys are earlier; None = as they stand
  causal: bool = True

  def of_last(self, count: int) -> AttentionMask:
    """What the last `count` queries see."""
    return dataclasses.replace(self, query_segments=self.query_segments[:, self.query_segments.shape[1] - count :])

  def allowed(self) -> jax.Array:
    """bool[B L S] (query, key)."""
    first = self.key_segments.shape[1] - self.query_segments.shape[1]
    mask = self.query_segments[:, :, None] == self.key_segments[:, None, :]
    if self.causal and self.order is not None:
      mask &= self.order[:, None, :] <= self.order[:, first:, None]
    elif self.causal:
      mask &= jnp.tril(jnp.ones(mask.shape[1:], bool), first)
    if self.roles is not None:
      mask &= (self.roles[:, None, :] != BEHIND) | (self.roles[:, first:, None] > 0)
    if self.branch_ids is not None:
      key = self.branch_ids[:, None, :]
      mask &= (key == 0) | (key == self.branch_ids[:, first:, None])
    return mask

  def resolve(self, kind: str, head_dim: int) -> AttentionMask | jax.Array:
    """What `attend` takes: this description for the kernel, or bool[B 1 L S] for jnp, made once for all layers.

    Args:
      kind: 'jnp'; 'splash' (interpreted, slowly, where there is no TPU); 'auto' = splash on TPUs if enough tokens ask
        and the heads fill its lanes. Rows that do not divide over the mesh go to jnp, and so do rows with
        branches, roles or another order, which the kernel does not know.
    Raises:
      ConfigError: another kind.
    """
    require_choice('attention', kind, KINDS)
    rows, length = self.query_segments.shape
    suits = length >= _WORTH_IT and head_dim % _LANES == 0 and platform() == 'tpu'
    kernel = rows % ways('batch') == 0 and (kind == 'splash' or (kind == 'auto' and suits))
    plain = self.branch_ids is None and self.roles is None and self.order is None
    return self if kernel and plain else self.allowed()[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask | jax.Array | None) -> jax.Array:
  """Softmax attention, scaled by 1/sqrt(H); a group of N / K query heads shares a key head.

  Args:
    q: [B L N H]. k, v: [B S K H]. mask: of `AttentionMask.resolve`; None = everybody sees everybody.
  Returns:
    [B L N H].
  """
  if isinstance(mask, AttentionMask):
    return _splash(q, k, v, mask)
  if platform() == 'cpu':
    return attend_on_cpu(q, k, v, mask)
  return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask), CONTEXT)


def attend_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Softmax attention, scaled by 1/sqrt(H): q [B L N H], k and v [B S K H], mask bool[B 1 L S] or None -> [B L N H].

  Scores and softmax are float32. Every query must see at least one key. In the form that XLA compiles best for CPUs,
  two to four times as fast as `jax.nn.dot_product_attention`: heads lie before tokens, so that each product is one of
  plain matrices; the mask is added, because a `where` before a softmax is computed again for every use; and the
  gradient keeps the large [L S] arrays as they lie, and sums over [H] where autodiff would sum over [S].
  """
  rows, length, heads, width = q.shape
  shared = k.shape[2]
  group = heads // shared
  # All queries that share a key head are rows of one matrix: [B K G*L H] and [B K S H].
  q = (q / math.sqrt(width)).astype(q.dtype).reshape(rows, length, shared, group, width)
  q = q.transpose(0, 2, 3, 1, 4).reshape(rows, shared, group * length, width)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  y = _heads_first(q, k, v, None if mask is None else jnp.where(mask, 0.0, _HIDDEN)[:, None])
  y = y.reshape(rows, shared, group, length, width).transpose(0, 3, 1, 2, 4)
  return y.reshape(rows, length, heads, width)


@jax.custom_vjp
def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
  """q [B K G*L H], k and v [B K S H], bias float32[B 1 1 L S] -> [B K G*L H]."""
  return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
  scores = jnp.einsum('BKQH,BKSH->BKQS', q, k, preferred_element_type=jnp.float32)
  if bias is not None:
    groups = (*scores.shape[:2], -1, *bias.shape[3:])  # [B K G L S]
    scores = (scores.reshape(groups) + bias).reshape(scores.shape)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  y = checkpoint_name(jnp.einsum('BKQS,BKSH->BKQH', weights, v), CONTEXT)
  return y, (q, k, v, weights, y)


def _backward(kept, dy):
  q, k, v, weights, y = kept
  back = jnp.einsum('BKQH,BKSH->BKQS', dy, v, preferred_element_type=jnp.float32)
  mean = (dy * y).astype(jnp.float32).sum(-1, keepdims=True)  # of `back`, as the softmax weighs it
  scores = (weights * (back - mean)).astype(q.dtype)
  dq = jnp.einsum('BKQS,BKSH->BKQH', scores, k)
  dk = jnp.einsum('BKHQ,BKQS->BKHS', q.swapaxes(2, 3), scores).swapaxes(2, 3)
  dv = jnp.einsum('BKHQ,BKQS->BKHS', dy.swapaxes(2, 3), weights).swapaxes(2, 3)
  return dq, dk, dv, None


_heads_first.defvjp(_forward, _backward)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
  """Rows are padded to whole blocks; a segment of its own keeps the padding out."""
  blocks = of_queries, of_keys = _block(q.shape[1]), _block(k.shape[1])

  def pad(x, block, value=0):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)), constant_values=value)

  segments = splash_attention.SegmentIds(pad(mask.query_segments, of_queries, -1), pad(mask.key_segments, of_keys, -1))
  # The kernel does not scale; dividing here rounds once more only for heads that are no power of four wide.
  q = q / math.sqrt(q.shape[-1])
  heads = (pad(x, block).swapaxes(1, 2) for x, block in ((q, of_queries), (k, of_keys), (v, of_keys)))  # [B N L H]
  first = k.shape[1] - q.shape[1] if mask.causal else None
  run = functools.partial(_splash_on_shard, first=first, blocks=blocks, interpret=platform() != 'tpu')
  axes, rows = ('batch', 'act_heads', None, None), ('batch', None)
  y = on_shards(run, (axes, axes, axes, rows, rows), axes)(*heads, *segments)
  return y.swapaxes(1, 2)[:, : q.shape[1]]


def _block(length: int) -> int:
  return min(_BLOCKS, key=lambda size: -length % size)  # the least padding, then the largest


def _splash_on_shard(
  q, k, v, query_segments, key_segments, *, first: int | None, blocks: tuple[int, int], interpret: bool
) -> jax.Array:
  """Whole blocks of the rows and heads of one device: [b n L H], [b k S H] and their segments.

  first: the key of the first query, which sees none behind it; None = everybody sees everybody.
  """
  shape, (of_queries, of_keys) = (q.shape[2], k.shape[2]), blocks
  one = splash_attention.FullMask(shape) if first is None else splash_attention.CausalMask(shape, first)
  sizes = splash_attention.BlockSizes(
    block_q=of_queries,
    block_kv=of_keys,
    block_q_dkv=of_queries,
    block_kv_dkv=of_keys,
    use_fused_bwd_kernel=True,
  )
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([one] * q.shape[1]),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=CONTEXT,
    interpret=interpret,
  )
  segments = splash_attention.SegmentIds(query_segments, key_segments)
  return jax.vmap(kernel)(q, k, v, segments)

"""Attention, and the one description of who sees whom that all its implementations are built from.

Enters: queries [B L N H], keys and values [B S K H], and an `AttentionMask`, or
the bool mask made of one. Leaves: [B L N H]. `jnp` is `jax.nn.dot_product_attention`;
`splash` is JAX's Pallas kernel for TPUs, which never writes the [L S] scores to memory.
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
_WORTH_IT = 256  # shorter rows cost jnp little, and would be mostly padding in blocks


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['query_segments', 'key_segments', 'branch_ids', 'roles', 'order'],
  meta_fields=['causal'],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """A query sees the keys of its own segment, earlier ones alone if `causal`, and other branches not at all.

  Padded keys get a segment that no real query has. Every query must see at least one key.
  """

  query_segments: jax.Array  # int32[B L]
  key_segments: jax.Array  # int32[B S]
  branch_ids: jax.Array | None = None  # int32[B L], as `types.Batch`; S is L then
  # int32[B L]: a key that is BEHIND tokens that carry what it says (CARRIES) is seen by these two alone; 0 = any other
  roles: jax.Array | None = None
  order: jax.Array | None = None  # int32[B L], which keys are earlier; None = as they stand
  causal: bool = True

  def allowed(self) -> jax.Array:
    """bool[B L S] (query, key)."""
    mask = self.query_segments[:, :, None] == self.key_segments[:, None, :]
    if self.causal and self.order is not None:
      mask &= self.order[:, None, :] <= self.order[:, :, None]
    elif self.causal:
      mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))
    if self.roles is not None:
      mask &= (self.roles[:, None, :] != BEHIND) | (self.roles[:, :, None] > 0)
    if self.branch_ids is not None:
      key = self.branch_ids[:, None, :]
      mask &= (key == 0) | (key == self.branch_ids[:, :, None])
    return mask

  def resolve(self, kind: str, head_dim: int) -> AttentionMask | jax.Array:
    """What `attend` takes: this description for the kernel, or bool[B 1 L S] for jnp, made once for all layers.

    Args:
      kind: 'jnp'; 'splash' (interpreted, slowly, where there is no TPU); 'auto' = splash on TPUs if the row is long
        enough and the heads fill its lanes. Rows that do not divide over the mesh go to jnp, and so do rows with
        branches, roles or another order, which the kernel does not know.
    Raises:
      ConfigError: another kind.
    """
    require_choice('attention', kind, KINDS)
    (rows, length), keys = self.query_segments.shape, self.key_segments.shape[1]
    suits = length == keys >= _WORTH_IT and head_dim % _LANES == 0 and platform() == 'tpu'
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
  return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask), CONTEXT)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
  """Rows are padded to whole blocks; a segment of its own keeps the padding out."""
  length = max(q.shape[1], k.shape[1])
  block = min(_BLOCKS, key=lambda size: -length % size)  # the least padding, then the largest
  padded = -(-length // block) * block

  def pad(x, value=0):
    return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=value)

  segments = splash_attention.SegmentIds(pad(mask.query_segments, -1), pad(mask.key_segments, -1))
  # The kernel does not scale; dividing here rounds once more only for heads that are no power of four wide.
  heads = (pad(x).swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))  # [B N L H], [B K L H]
  run = functools.partial(_splash_on_shard, causal=mask.causal, block=block, interpret=platform() != 'tpu')
  axes, rows = ('batch', 'act_heads', None, None), ('batch', None)
  y = on_shards(run, (axes, axes, axes, rows, rows), axes)(*heads, *segments)
  return y.swapaxes(1, 2)[:, : q.shape[1]]


def _splash_on_shard(q, k, v, query_segments, key_segments, *, causal: bool, block: int, interpret: bool) -> jax.Array:
  """Whole blocks of the rows and heads of one device: [b n L H], [b k S H] and their segments."""
  shape = (q.shape[2], k.shape[2])
  one = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
  sizes = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
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

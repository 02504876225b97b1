"""Next-token cross-entropy over the learnt tokens, in float32.

`next_token_loss` takes logits; `head_loss` takes what the output head is multiplied with, and never holds the logits
of all tokens: it goes through them in chunks and forms the gradient of the loss, softmax - onehot, on the way.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llava_mini_jax.sharding import mesh_axes, on_shards

_CHUNK_BYTES = 2**28  # of float32 logits per device


def next_token_loss(
  logits: jax.Array, targets: jax.Array, loss_mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean over all learnt tokens of the batch; 0, not NaN, when there is none.

  Args:
    logits: float32[B L vocab]. targets: int[B L]. loss_mask: bool[B L].
  Returns:
    float32 loss, and {accuracy, target_tokens}: the share of targets that are the most likely token, and their count.
  """
  weight = loss_mask.astype(jnp.float32)
  count = weight.sum()
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  total = jnp.maximum(count, 1.0)
  loss = ((log_z - picked) * weight).sum() / total
  accuracy = ((jnp.argmax(logits, -1) == targets) * weight).sum() / total
  return loss, dict(accuracy=accuracy, target_tokens=count)


def head_loss(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, *, chunk_bytes: int = _CHUNK_BYTES
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`next_token_loss` of the logits hidden · head, which are never whole in memory.

  Args:
    hidden: [B L D]. head: [D vocab], of any dtype; multiplied in that of `hidden`.
    targets: int[B L]. loss_mask: bool[B L]. chunk_bytes: most float32 logits that a device holds.
  """
  count = loss_mask.sum(dtype=jnp.float32)
  weight = loss_mask / jnp.maximum(count, 1.0)
  loss, accuracy = _weighted_loss(hidden, head.astype(hidden.dtype), targets, weight, chunk_bytes)
  return loss, dict(accuracy=accuracy, target_tokens=count)


_INPUTS = (('batch', None, None), ('embed', 'vocab'), ('batch', None), ('batch', None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_loss(hidden, head, targets, weight, chunk_bytes):
  """Sums over tokens, float32, of weight × loss and of weight × (is the target the most likely token)."""
  run = functools.partial(_on_shard, chunk_bytes=chunk_bytes, differentiate=False)
  return on_shards(run, _INPUTS, ((), ()))(hidden, head, targets, weight)


def _forward(hidden, head, targets, weight, chunk_bytes):
  run = functools.partial(_on_shard, chunk_bytes=chunk_bytes, differentiate=True)
  *sums, d_hidden, d_head = on_shards(run, _INPUTS, ((), (), *_INPUTS[:2]))(hidden, head, targets, weight)
  return tuple(sums), (d_hidden, d_head)


def _backward(chunk_bytes, gradients, cotangents):
  del chunk_bytes
  d_hidden, d_head = ((g * cotangents[0]).astype(g.dtype) for g in gradients)
  return d_hidden, d_head, None, None


_weighted_loss.defvjp(_forward, _backward)


def _on_shard(hidden, head, targets, weight, *, chunk_bytes: int, differentiate: bool):
  """One device's rows [b L D] and part of the head [D/fsdp, vocab/tensor] -> the sums, and both gradients.

  The head is gathered once and its gradient summed over devices once, whatever the number of chunks.
  """
  rows, width = mesh_axes('batch'), mesh_axes('embed')
  if width:
    head = jax.lax.all_gather(head, width, axis=0, tiled=True)
  tokens = hidden.shape[0] * hidden.shape[1]
  chunks = -(-tokens * head.shape[1] * 4 // chunk_bytes)
  size = -(-tokens // chunks)

  def cut(x):
    x = x.reshape(tokens, *x.shape[2:])
    return jnp.pad(x, ((0, chunks * size - tokens), *((0, 0),) * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

  def body(total, chunk):
    *sums, d_hidden, d_head = _chunk_loss(*chunk[:1], head, *chunk[1:], differentiate=differentiate)
    return jax.tree.map(jnp.add, total, (*sums, d_head)), d_hidden

  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jnp.zeros(head.shape, jnp.float32) if differentiate else None)
  cuts = tuple(map(cut, (hidden, targets, weight)))
  if chunks == 1:
    total, d_hidden = body(start, jax.tree.map(lambda x: x[0], cuts))
  else:
    total, d_hidden = jax.lax.scan(body, start, cuts)
  sums = tuple(jax.lax.psum(total[:2], rows))
  if not differentiate:
    return sums
  d_head = total[2].astype(head.dtype)
  if width:
    d_head = jax.lax.psum_scatter(d_head, width, scatter_dimension=0, tiled=True)
  d_head = jax.lax.psum(d_head, tuple(axis for axis in rows if axis not in width))
  return *sums, d_hidden.reshape(-1, hidden.shape[2])[:tokens].reshape(hidden.shape), d_head


def _chunk_loss(hidden, head, targets, weight, *, differentiate: bool):
  """hidden [n D], head [D v], targets int[n], weight float32[n]; v is this device's part of the vocabulary.

  Returns:
    float32 sums of weight × loss and weight × hit, d_hidden [n D], d_head float32[D v]; None, None without gradient.
  """
  parts = mesh_axes('vocab')
  first = jax.lax.axis_index(parts) * head.shape[1] if parts else 0
  logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)  # float32[n v]
  largest = logits.max(-1)
  best = jnp.where(largest == jax.lax.pmax(largest, parts), first + logits.argmax(-1), jnp.iinfo(jnp.int32).max)
  best, largest = jax.lax.pmin(best, parts), jax.lax.pmax(largest, parts)
  target = jnp.arange(head.shape[1]) == (targets - first)[:, None]
  exponential = jnp.exp(logits - largest[:, None])
  z = jax.lax.psum(exponential.sum(-1), parts)
  picked = jax.lax.psum(jnp.where(target, logits, 0).sum(-1), parts)
  loss, hits = ((largest + jnp.log(z) - picked) * weight).sum(), ((best == targets) * weight).sum()
  if not differentiate:
    return loss, hits, None, None
  d_logits = ((exponential / z[:, None] - target) * weight[:, None]).astype(hidden.dtype)
  d_hidden = jax.lax.psum(d_logits @ head.T, parts)
  return loss, hits, d_hidden, jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)

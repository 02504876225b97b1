"""Modality pre-fusion: Llama layers in which the instruction attends to every patch (paper Sec. 4.1, Eq. 3).

The sequence is [patches; compressed; text], causal, with rotary positions
counted over its valid slots; there is no final norm. Vision comes first, so
nothing of it depends on the text: `see` and `read` are `__call__` cut between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_mini_jax.config import DecoderConfig, PrefusionConfig, ScanConfig
from llava_mini_jax.models.attention import AttentionMask
from llava_mini_jax.models.layers import LlamaLayer, remat, rope_tables, scan_layers, stack_layers


def positions_and_mask(valid: jax.Array, branch_ids: jax.Array | None = None) -> tuple[jax.Array, AttentionMask]:
  """Of slots that are valid bool[B L] and on branches int[B L]: positions int32[B L], and which slots each one sees.

  A masked slot is seen by none, and sees what a valid one would see. Its position is 1; any other's is the number of
  valid slots it sees before itself.
  """
  mask = AttentionMask(jnp.ones_like(valid, jnp.int32), valid.astype(jnp.int32), branch_ids)
  count = jnp.cumsum(valid, axis=1) if branch_ids is None else mask.allowed().sum(2)
  return jnp.where(valid, count.astype(jnp.int32) - 1, 1), mask


class Prefusion(nnx.Module):
  def __init__(
    self, config: PrefusionConfig, decoder: DecoderConfig, *, scan: ScanConfig, attention: str, rngs: nnx.Rngs
  ):
    self.num_layers = config.num_layers
    self.decoder_config = decoder
    self.scan = scan
    self.attention = attention
    self.layers = stack_layers(lambda rngs: LlamaLayer(decoder, rngs=rngs), config.num_layers, rngs)

  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array,
    branch_ids: jax.Array | None = None,
    *,
    last: int | None = None,
    return_hidden: bool = False,
  ):
    """x [B L D], valid bool[B L] -> [B L D], and with `return_hidden` every layer's output [layer B L D].

    What comes out at masked slots means nothing. branch_ids: int[B L], see `types.Batch`. last: only so many slots are
    wanted, the last ones, [B last D]; of the others the last layer makes keys and values alone. Raises ValueError for
    `last` with `return_hidden`.
    """
    if return_hidden and last is not None:
      raise ValueError(f'pre-fusion: expected all slots with return_hidden; found last={last}')
    last = x.shape[1] if last is None else last
    where = positions_and_mask(valid, branch_ids)
    x, hidden = self._run(x, *where, last, lambda x, _: x if return_hidden else None)
    return (x, hidden) if return_hidden else x

  def see(self, x: jax.Array, last: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vision tokens [B S D], all valid -> the last of them [B last D], keys and values [layer B S K H] for the text."""
    x, (keys, values) = self._run(x, *positions_and_mask(jnp.ones(x.shape[:2], bool)), last, lambda _, kv: kv)
    return x, keys, values

  def _run(
    self, x: jax.Array, positions: jax.Array, mask: AttentionMask, last: int, keep: Callable
  ) -> tuple[jax.Array, Any]:
    """[B last D], and `keep` of each layer's output and its keys and values."""
    rope, head_dim = rope_tables(positions, self.decoder_config), self.decoder_config.head_dim
    asks = max(last, 1)  # somebody must: products of no rows are refused
    of_all, of_last = (m.resolve(self.attention, head_dim) for m in (mask, mask.of_last(asks)))

    # One layer at a time: a slice of the stack would be a copy of it, and prompts would not fit where weights just do.
    def body(x, i):
      x, kv = self._layer(i)(x, rope, of_all)
      return x, keep(x, kv)

    x, most = scan_layers(body, x, jnp.arange(self.num_layers - 1), self.scan)
    x, kv = remat(lambda x, layer: layer(x, rope, of_last, last=asks), self.scan)(x, self._layer(-1))
    kept = jax.tree.map(lambda most, last: jnp.concatenate([most, last[None]]), most, keep(x, kv))
    return x[:, asks - last :], kept

  def _layer(self, i: int | jax.Array) -> LlamaLayer:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], self.layers)

  def read(self, text: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Text [B T D] after the vision tokens that `see` was given: [B T D]. Padding comes last, and means nothing."""
    (rows, length), seen = text.shape[:2], keys.shape[2]
    positions = jnp.broadcast_to(seen + jnp.arange(length), (rows, length))
    rope = rope_tables(positions, self.decoder_config)
    mask = (jnp.arange(seen + length) <= positions[:, :, None])[:, None]

    def body(x, layer_and_cache):
      layer, keys, values = layer_and_cache
      room = ((0, 0), (0, length), (0, 0), (0, 0))
      x, _ = layer(x, rope, mask, (jnp.pad(keys, room), jnp.pad(values, room), positions))
      return x, None

    return scan_layers(body, text, (self.layers, keys, values), self.scan)[0]

"""Greedy generation with a static key/value cache: prefill once, then one token per row and step.

Pre-fusion runs in the prefill only; new tokens enter the decoder as raw embeddings.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llava_mini_jax.models.attention import BEHIND, AttentionMask
from llava_mini_jax.models.decoder import cache_of
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.within import prefill_within
from llava_mini_jax.types import Batch, KVCache

Cache = KVCache | tuple[KVCache, ...]


def prefill(model: LlavaMini, batch: Batch, slots: int) -> tuple[jax.Array, Cache]:
  """One prompt per row -> float32 logits of the next token [B vocab], and a cache of `slots` slots."""
  count = (batch.segment_ids > 0).sum(1)
  hidden, cache = _read(model, batch, count, slots)
  last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)
  return model.decoder.logits(last)[:, 0], cache


def _read(model: LlavaMini, batch: Batch, count: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
  """Normed hidden states of the prompts [B L D], and a cache of what later tokens see of them.

  Where they do not see all, it is only as long as what they see, so the text must not be longer than `fuse_index`.
  """
  more = slots - batch.tokens.shape[1]
  if model.config.compressor.within:
    return prefill_within(model, batch, more)
  x, laid = model.rows(batch)
  roles = model.roles(batch)
  if roles is None and laid is batch:  # all of every prompt
    return model.decoder.extend(x, count, model.decoder.empty_cache(x.shape[0], slots, x.dtype))
  mask = AttentionMask(laid.segment_ids, laid.segment_ids, roles=roles)
  x, (keys, values) = model.decoder.run(x, laid.positions, mask, keep=lambda _, kv: kv)
  seen = laid.segment_ids > 0
  seen = seen if roles is None else seen & (roles != BEHIND)
  visuals, text = batch.fuse_index.shape[1:]
  room = min(x.shape[1], text + visuals * model.config.new_tokens(batch.pixels.shape[2]))
  cache = cache_of(keys, values, seen, room, more)
  return model.decoder.norm(x), dataclasses.replace(cache, position=laid.positions.max(1) + 1)


def decode_step(model: LlavaMini, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
  """The token just chosen, int[B] -> float32 logits of the next [B vocab]."""
  x = model.decoder.embed(tokens[:, None], model.dtype)
  hidden, cache = model.decoder.extend(x, jnp.ones_like(tokens), cache)
  return model.decoder.logits(hidden)[:, 0], cache


def generate(
  model: LlavaMini, batch: Batch, *, max_new_tokens: int, eos_id: int | None = None, return_logits: bool = False
):
  """Greedy continuation of every row, stopping once all rows have ended.

  Args:
    batch: one prompt per row, right-padded.
    max_new_tokens: static length of the answer.
    eos_id: ends a row; None never ends.
    return_logits: also give the logits each token was chosen from.
  Returns:
    int32[B max_new_tokens]: the answer, its eos, then -1; with `return_logits` also float32[B max_new_tokens vocab].
  """
  rows = batch.tokens.shape[0]
  logits, cache = prefill(model, batch, batch.tokens.shape[1] + max_new_tokens)
  answer = jnp.full((rows, max_new_tokens), -1, jnp.int32)
  trace = jnp.zeros((rows, max_new_tokens, logits.shape[-1]) if return_logits else (0,), jnp.float32)

  def unfinished(carry):
    step, _, _, done, _, _ = carry
    return (step < max_new_tokens) & ~done.all()

  def body(carry):
    step, logits, cache, done, answer, trace = carry
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    answer = answer.at[:, step].set(jnp.where(done, -1, token))
    if return_logits:
      trace = trace.at[:, step].set(logits)
    if eos_id is not None:
      done = done | (token == eos_id)
    logits, cache = decode_step(model, token, cache)
    return step + 1, logits, cache, done, answer, trace

  start = (jnp.int32(0), logits, cache, jnp.zeros((rows,), bool), answer, trace)
  *_, answer, trace = jax.lax.while_loop(unfinished, body, start)
  return (answer, trace) if return_logits else answer

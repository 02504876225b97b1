"""Greedy generation with a static key/value cache: prefill once, then one token per row and step.

Pre-fusion runs in the prefill only; new tokens enter the decoder as raw embeddings.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.types import Batch, KVCache


def prefill(model: LlavaMini, batch: Batch, slots: int) -> tuple[jax.Array, KVCache]:
  """One prompt per row -> float32 logits of the next token [B vocab], and a cache of `slots` slots."""
  x = model.embed(batch)
  count = (batch.segment_ids > 0).sum(1)
  hidden, cache = model.decoder.extend(x, count, model.decoder.empty_cache(x.shape[0], slots, x.dtype))
  last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)
  return model.decoder.logits(last)[:, 0], cache


def decode_step(model: LlavaMini, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
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

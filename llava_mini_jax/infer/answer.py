"""Answers: whole and batched, or one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.infer.generate import decode_step, generate, prefill
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Prompt, PromptEncoder
from llava_mini_jax.sharding import batch_sharding, check_batch, use_mesh
from llava_mini_jax.train.tree import merge


class Answerer:
  """Asks a loaded model. Greedy; an answer ends at the tokenizer's EOS or after `max_new_tokens`."""

  def __init__(self, run: Loaded, *, max_new_tokens: int = 32):
    self.run, self.max_new_tokens = run, max_new_tokens
    self.encoder = PromptEncoder(run.experiment, run.tokenizer)
    graphdef, eos_id = run.graphdef, run.tokenizer.eos_token_id
    self._generate = jax.jit(
      lambda params, batch: generate(merge(graphdef, params), batch, max_new_tokens=max_new_tokens, eos_id=eos_id)
    )
    self._prefill = jax.jit(
      lambda params, batch, slots: prefill(merge(graphdef, params), batch, slots), static_argnums=2
    )
    self._decode = jax.jit(
      lambda params, token, cache: decode_step(merge(graphdef, params), token, cache), donate_argnums=2
    )

  def answers(self, prompts: Sequence[Prompt], *, batch_size: int, length: int | None = None) -> Iterator[str]:
    """One answer per prompt, in order; the next batch is prepared while the devices work on one.

    Args:
      batch_size: rows per device batch; a last, shorter batch is padded.
      length: padded prompt length; None = what the longest prompt needs.
    Raises:
      MeshError: batch_size does not divide over the mesh. DataError: a bad prompt, by name.
    """
    check_batch(batch_size, self.run.mesh)
    encoded = [self.encoder.encode(prompt) for prompt in prompts]
    length = length or self.encoder.row_length(encoded)
    waiting: tuple[jax.Array, int] | None = None
    for start in range(0, len(prompts), batch_size):
      part = slice(start, start + batch_size)
      batch = self.encoder.batch(prompts[part], encoded[part], length=length, rows=batch_size)
      with use_mesh(self.run.mesh):
        ids = self._generate(self.run.params, jax.device_put(batch, batch_sharding(self.run.mesh)))
      if waiting:
        yield from self._texts(*waiting)
      waiting = ids, len(prompts[part])
    if waiting:
      yield from self._texts(*waiting)

  def stream(self, prompt: Prompt) -> Iterator[str]:
    """The answer in pieces of text, as they are decoded. Raises DataError for a bad prompt."""
    encoded = self.encoder.encode(prompt)
    length = self.encoder.row_length([encoded])
    batch = self.encoder.batch([prompt], [encoded], length=length, rows=1)
    shown, ids = '', []
    with use_mesh(self.run.mesh):
      logits, cache = self._prefill(self.run.params, batch, length + self.max_new_tokens)
    for _ in range(self.max_new_tokens):
      token = jnp.argmax(logits, -1).astype(jnp.int32)
      ids.append(int(token[0]))
      if ids[-1] == self.run.tokenizer.eos_token_id:
        break
      text = self._decode_text(ids)
      if not text.endswith('\ufffd'):  # the rest of a character is still to come
        yield text[len(shown) :]
        shown = text
      with use_mesh(self.run.mesh):
        logits, cache = self._decode(self.run.params, token, cache)
    yield self._decode_text(ids)[len(shown) :]

  def _texts(self, ids: jax.Array, count: int) -> list[str]:
    return [self._decode_text(row[row >= 0]) for row in np.asarray(ids)[:count]]

  def _decode_text(self, ids: Sequence[int]) -> str:
    return self.run.tokenizer.decode(ids, skip_special_tokens=True).strip()

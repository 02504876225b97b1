"""The jitted functions of the engine: see, read, prefill, step. All shapes are static; the slots are donated.

Enters: parameters, visuals, token rows. Leaves: `Slots`, the state of a running decode batch. Visuals come as a flat
list, whatever prompts they belong to, and lie on the batch axes of the mesh: so do the frames of one long video.

  see      pixels or features [n V ...]        -> Seen: compressed tokens, pre-fusion's keys and values
  read     Seen, text [n T]                    -> text fused with each visual [n T D]
  prefill  rows [R L] with both put together   -> R slots filled
  step     all slots                           -> one token each
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.infer.sampling import DEFAULT, Controls, choose, log_probabilities
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.sharding import batch_sharding, replicated, spec, use_mesh
from llava_mini_jax.train.tree import merge
from llava_mini_jax.types import KVCache, Seen

PREFILL_CHUNK = 1024  # tokens of a row whose attention scores are in memory at a time

_pytree = jax.tree_util.register_dataclass


@functools.partial(_pytree)
@dataclasses.dataclass(frozen=True)
class Slots:
  """A decode batch of B slots."""

  cache: KVCache
  logits: jax.Array  # float32[B vocab]; of the next token
  used: jax.Array  # bool[B vocab]; tokens of prompt and answer
  said: jax.Array  # int32[B]; tokens of the answer
  controls: Controls


@functools.partial(_pytree)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Prompts to be put into slots; R of them, padded with rows whose `slot` is B."""

  tokens: np.ndarray  # int32[R L]; 0 in vision slots
  is_vision: np.ndarray  # bool[R L]
  length: np.ndarray  # int32[R]
  fuse_index: np.ndarray  # int32[R T]; where the fused text tokens lie; L = no token
  visuals: np.ndarray  # float32[R]; how many each is fused with
  start: np.ndarray  # int32[R]; tokens whose keys and values are known
  slot: np.ndarray  # int32[R]
  controls: Controls


def prefill(
  model: LlavaMini, slots: Slots, rows: Rows, vision: jax.Array, total: jax.Array, prefix: KVCache | None, length: int
) -> Slots:
  """Puts each row into its slot, ready to say its first token.

  Args:
    vision: [R L D], compressed tokens where they go. total: float32[R T D], sum of the fused text over its visuals.
    prefix: keys and values of the first `rows.start` tokens; None = none are known.
    length: static; no row has more tokens than that after its start.
  """
  text = model.decoder.embed(rows.tokens, model.dtype)
  mean = total / jnp.maximum(rows.visuals, 1.0)[:, None, None]
  x = jnp.where(rows.is_vision[:, :, None], vision.astype(text.dtype), text)
  x = jax.vmap(lambda x, at, new: x.at[at].set(new.astype(x.dtype), mode='drop'))(x, rows.fuse_index, mean)
  x = jnp.take_along_axis(x, (rows.start[:, None] + jnp.arange(length))[:, :, None], axis=1, mode='clip')

  most = rows.tokens.shape[1]
  cache = model.decoder.empty_cache(x.shape[0], most, x.dtype)
  if prefix is not None:
    keep = min(most, prefix.keys.shape[2])
    keys, values = (
      new.at[:, :, :keep].set(old[:, :, :keep])
      for new, old in ((cache.keys, prefix.keys), (cache.values, prefix.values))
    )
    cache = KVCache(keys, values, rows.start)
  last, cache = _extend_in_chunks(model, x, rows.length - rows.start, cache)

  def put(store, new, axis):
    at = (slice(None),) * axis
    return store.at[(*at, rows.slot, *((slice(0, most),) * axis))].set(new.astype(store.dtype), mode='drop')

  here = rows.is_vision | (jnp.arange(most) >= rows.length[:, None])
  used = jnp.zeros((x.shape[0], slots.used.shape[1]), bool)
  used = jax.vmap(lambda used, at: used.at[at].set(True, mode='drop'))(
    used, jnp.where(here, used.shape[1], rows.tokens)
  )
  return Slots(
    cache=KVCache(
      put(slots.cache.keys, cache.keys, 1),
      put(slots.cache.values, cache.values, 1),
      put(slots.cache.length, rows.length, 0),
    ),
    logits=put(slots.logits, model.decoder.logits(last[:, None])[:, 0], 0),
    used=put(slots.used, used, 0),
    said=put(slots.said, jnp.zeros_like(rows.slot), 0),
    controls=jax.tree.map(lambda store, new: put(store, new, 0), slots.controls, rows.controls),
  )


def _extend_in_chunks(model: LlavaMini, x: jax.Array, count: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
  """`Decoder.extend`, with the scores of PREFILL_CHUNK queries at a time: each row's last hidden state [R D]."""
  size = min(x.shape[1], PREFILL_CHUNK)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0)))
  chunks = x.reshape(x.shape[0], -1, size, x.shape[2]).swapaxes(0, 1)

  def body(cache, chunk_and_start):
    chunk, start = chunk_and_start
    here = jnp.clip(count - start, 0, size)
    hidden, cache = model.decoder.extend(chunk, here, cache)
    return cache, jnp.take_along_axis(hidden, jnp.maximum(here - 1, 0)[:, None, None], axis=1)[:, 0]

  cache, last = jax.lax.scan(body, cache, (chunks, size * jnp.arange(len(chunks))))
  return jnp.take_along_axis(last, (jnp.maximum(count - 1, 0) // size)[None, :, None], axis=0)[0], cache


def step(model: LlavaMini, slots: Slots, active: jax.Array, top: int) -> tuple[Slots, tuple[jax.Array, ...]]:
  """One token of every active slot, bool[B]: the next state, and tokens, and what `log_probabilities` says of them."""
  tokens = choose(slots.logits, slots.used, slots.said, slots.controls)
  told = (tokens, *log_probabilities(slots.logits, tokens, top))
  x = model.decoder.embed(tokens[:, None], model.dtype)
  hidden, cache = model.decoder.extend(x, active.astype(jnp.int32), slots.cache)
  used = slots.used | (active[:, None] & jax.nn.one_hot(tokens, slots.used.shape[1], dtype=bool))
  logits = model.decoder.logits(hidden)[:, 0]
  return dataclasses.replace(slots, cache=cache, logits=logits, used=used, said=slots.said + active), told


class Programs:
  """Those functions, compiled for a mesh once per combination of sizes.

  Attributes:
    compiled: by function, how often it was compiled.
  """

  def __init__(self, config: LlavaMiniConfig, graphdef: nnx.GraphDef, mesh: Mesh):
    self.config, self.mesh, self._graphdef = config, mesh, graphdef
    self.compiled: collections.Counter[str] = collections.Counter()
    rows, all_of_it = batch_sharding(mesh), replicated(mesh)
    heads = NamedSharding(mesh, spec('layer', 'batch', None, 'act_heads', None))
    self._slots = Slots(KVCache(heads, heads, rows), rows, rows, rows, Controls(*(rows,) * 6))
    none = not config.prefusion.num_layers
    seen = Seen(rows, rows if none else heads, rows if none else heads)

    def of_model(name, function, where, **options):
      return self._jit(name, lambda params, *rest: function(merge(graphdef, params), *rest), where, **options)

    self.empty = of_model('empty', _empty, self._slots, static_argnums=(1, 2))
    self.encode = of_model('encode', lambda model, pixels: model.encode_views(pixels), rows)
    self.see = of_model('see', _see, replicated(mesh) if none else seen)
    self.read = of_model('read', _read, rows)
    self.prefill = of_model('prefill', prefill, self._slots, donate_argnums=1, static_argnums=6)
    self.step = of_model('step', step, (self._slots, (all_of_it,) * 4), donate_argnums=1, static_argnums=3)
    self.blank = self._jit('blank', self._blank, (all_of_it, all_of_it), static_argnums=(0, 1, 2))
    self.place = self._jit('place', _place, all_of_it, donate_argnums=0)
    self.add = self._jit('add', _add, all_of_it, donate_argnums=0)
    self.take = self._jit('take', _take, KVCache(heads, heads, rows), static_argnums=(2, 3))

  def _blank(self, rows: int, length: int, text: int) -> tuple[jax.Array, jax.Array]:
    """`vision` and `total` of `prefill` before anything is put into them: [R L D], float32[R T D]."""
    width = self.config.decoder.hidden_size
    return jnp.zeros((rows, length, width), self.config.dtype), jnp.zeros((rows, text, width), jnp.float32)

  def _jit(self, name: str, function: Callable, where: Any, **options: Any) -> Callable:
    def traced(*args):
      self.compiled[name] += 1
      return function(*args)

    program = jax.jit(traced, out_shardings=where, **options)

    def run(*args):
      with use_mesh(self.mesh):
        return program(*args)

    return run


def _empty(model: LlavaMini, slots: int, length: int) -> Slots:
  """None of the slots, of so many tokens each, is in use."""
  logits = jnp.zeros((slots, model.config.decoder.vocab_size), jnp.float32)
  return Slots(
    cache=model.decoder.empty_cache(slots, length, model.dtype),
    logits=logits,
    used=jnp.zeros(logits.shape, bool),
    said=jnp.zeros(slots, jnp.int32),
    controls=jax.tree.map(jnp.asarray, Controls.of([DEFAULT] * slots)),
  )


def _see(model: LlavaMini, views: jax.Array) -> Seen:
  """Pixels [n V h w 3] or features [n V P W]."""
  return model.see_once(views.astype(model.dtype) if views.ndim == 4 else model.encode_views(views))


def _read(model: LlavaMini, seen: Seen, tokens: jax.Array) -> jax.Array:
  """Text int32[n T], each row with its visual -> [n T D]."""
  return model.read(model.decoder.embed(tokens, model.dtype), seen)


def _place(vision: jax.Array, compressed: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
  """Compressed tokens [n C D] into [R L D]: those of visual i go to row[i], at[i]; L = nowhere."""
  return vision.at[row[:, None], at].set(compressed.astype(vision.dtype), mode='drop')


def _add(total: jax.Array, fused: jax.Array, row: jax.Array) -> jax.Array:
  """Adds fused text [n T D] to the rows float32[R T D] that it belongs to; R = none."""
  return total.at[row].add(fused.astype(total.dtype), mode='drop')


def _take(cache: KVCache, slot: jax.Array, length: int, rows: int) -> KVCache:
  """The first `length` keys and values of a slot, for each of `rows` rows."""

  def one(store):
    found = jax.lax.dynamic_slice_in_dim(store[:, :, :length], slot, 1, axis=1)
    return jnp.broadcast_to(found, (found.shape[0], rows, *found.shape[2:]))

  return KVCache(one(cache.keys), one(cache.values), jnp.broadcast_to(cache.length[slot], (rows,)))

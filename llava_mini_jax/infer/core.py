"""Continuous batching: requests join and leave a running decode batch between its steps.

Enters: prompts as numbers (`prompts.Laid`), one `Stream` each. Leaves: tokens, to the streams. A fixed number of slots
is decoded together; a slot whose answer has ended or was cancelled goes to the next request in the queue. Sizes are
rounded up to few, so that few programs are compiled, and padding is never seen: what a request gets does not depend on
what shares its batch, up to the rounding of floating point.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator

import jax
import numpy as np

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.programs import Programs, Rows
from llava_mini_jax.infer.prompts import Laid
from llava_mini_jax.infer.sampling import MAX_LOGPROBS, Controls, Sampling
from llava_mini_jax.infer.stream import Stream
from llava_mini_jax.infer.visuals import FusedSum, Visuals
from llava_mini_jax.sharding import check_batch
from llava_mini_jax.types import KVCache

_SHORTEST = 32  # tokens of the smallest row
_GROWTH = 4  # from one number of rows or visuals to the next


class PromptFailed(RuntimeError):
  """A request could not be put into a slot. Its stream has ended as `failed`; no other is touched."""


@dataclasses.dataclass
class Memory:
  """What the decoder has read of one conversation; the next prompt that begins alike goes on from there.

  A token counts as the same if it is fused as before, and with the same visuals.
  """

  visuals: tuple = ()  # which, and how many of each
  signature: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
  cache: KVCache | None = None
  reused: int = 0  # tokens of the last prompt that were not read again

  def known(self, laid: Laid) -> int:
    """How many tokens of a prompt need not be read; never the last, whose logits are wanted."""
    if self.cache is None or self.visuals != _visuals(laid):
      return 0
    size = min(len(self.signature), len(laid.tokens) - 1)
    same = self.signature[:size] == _signature(laid)[:size]
    return size if same.all() else int(same.argmin())


def _visuals(laid: Laid) -> tuple:
  """Pixels have no name: each object is another."""
  return tuple((some.uid, len(some)) if isinstance(some, Visuals) else object() for some in laid.media)


def _signature(laid: Laid) -> np.ndarray:
  """int64[n]: equal where the decoder's input is, for the same visuals."""
  signature = 2 * laid.tokens.astype(np.int64)
  signature[laid.fused] += 1
  signature[laid.slots.reshape(-1)] = -1 - np.arange(laid.slots.size)
  return signature


@dataclasses.dataclass(eq=False)
class _Work:
  laid: Laid
  stream: Stream
  memory: Memory | None
  alone: bool = False  # its prefill failed beside others

  @property
  def known(self) -> int:
    return self.memory.known(self.laid) if self.memory else 0


class Core:
  """The slots, the queue and the programs.

  Attributes:
    slots: how many. state: of them. programs: with `programs.compiled`, what was compiled so far.
  """

  def __init__(self, run: Loaded, *, slots: int, max_length: int, visual_chunk: int):
    """See `Engine`. Raises MeshError: slots or visual_chunk do not divide over the mesh."""
    for count in (slots, visual_chunk):
      check_batch(count, run.mesh)
    self.config: LlavaMiniConfig = run.experiment.model
    self.params, self.programs = run.params, Programs(self.config, run.graphdef, run.mesh)
    self.slots, self.max_length, self.visual_chunk = slots, max_length, visual_chunk
    self._ways = run.mesh.size // run.mesh.shape['tensor']
    self.state = self.programs.empty(self.params, slots, max_length)
    self._slots: list[_Work | None] = [None] * slots
    self._arrived: collections.deque[_Work] = collections.deque()  # of other threads, which do not wait for a step
    self._queue: collections.deque[_Work] = collections.deque()
    self._lock = threading.Lock()

  def add(self, laid: Laid, stream: Stream, memory: Memory | None = None) -> None:
    """Queues a request; the next steps answer it. Any thread may call it.

    Raises:
      DataError: E_TOO_LONG if prompt and answer do not fit a slot.
    """
    size = len(laid.tokens) + stream.sampling.max_new_tokens
    if size > self.max_length:
      found = f'{len(laid.tokens)} of the prompt and {stream.sampling.max_new_tokens} of the answer'
      raise DataError('E_TOO_LONG', laid.name, f'expected at most {self.max_length} tokens; found {found}')
    self._arrived.append(_Work(laid, stream, memory))

  @property
  def active(self) -> int:
    """How many slots are in use."""
    return sum(work is not None for work in self._slots)

  @property
  def waiting(self) -> int:
    """How many requests have no slot yet."""
    return len(self._arrived) + len(self._queue)

  def look(self, keep: str) -> Visuals:
    """For images or frames to come; see `visuals.Visuals`."""
    bound = (functools.partial(program, self.params) for program in (self.programs.encode, self.programs.see))
    return Visuals(*bound, self.visual_places, self.visual_chunk, keep)

  def step(self) -> bool:
    """Lets requests leave and join, and gives each one that has a slot its next token.

    Returns:
      Whether anything is left to do.
    Raises:
      PromptFailed: a request cannot be put into a slot; step again for the others. After anything else the state of
        the slots may be lost, so that no later step can go on.
    """
    with self._lock:
      while self._arrived:
        self._queue.append(self._arrived.popleft())
      self._drop_cancelled()
      while self._queue and None in self._slots:
        self._admit()
      active = np.array([work is not None for work in self._slots])
      if not active.any():
        return bool(self.waiting)
      wanted = any(work and work.stream.sampling.top_logprobs for work in self._slots)
      self.state, told = self.programs.step(self.params, self.state, active, MAX_LOGPROBS if wanted else 0)
      tokens, logprobs, best, best_ids = (x.tolist() for x in jax.device_get(told))
      for slot, work in enumerate(self._slots):
        if work and work.stream.take(tokens[slot], logprobs[slot], list(zip(best_ids[slot], best[slot], strict=True))):
          self._release(slot)
      return bool(self.waiting or self.active)

  def row_places(self, count: int) -> int:
    """How many rows a prefill of so many requests has."""
    return _ladder(count, self._ways, self.slots)

  def visual_places(self, count: int) -> int:
    """How many visuals are encoded together for so many, of `visual_chunk` at most."""
    return _ladder(count, self._ways, self.visual_chunk)

  def _length(self, count: int) -> int:
    return min(self.max_length, _places(count))

  def _drop_cancelled(self) -> None:
    for work in [work for work in self._queue if work.stream.cancelled]:
      self._queue.remove(work)
      work.stream.end('cancelled')
    for slot, work in enumerate(self._slots):
      if work and work.stream.cancelled:
        self._slots[slot] = None
        work.stream.end('cancelled')

  def _release(self, slot: int) -> None:
    work, self._slots[slot] = self._slots[slot], None
    if (memory := work.memory) is None:
      return
    memory.visuals = _visuals(work.laid)
    memory.signature = np.concatenate([_signature(work.laid), 2 * np.array(work.stream.ids, np.int64)])
    length = self._length(len(memory.signature))
    memory.cache = self.programs.take(self.state.cache, np.int32(slot), length, self.row_places(1))

  def _admit(self) -> None:
    """Fills slots with the first request of the queue and those of the same length behind it."""
    first, free = self._queue[0], [slot for slot, work in enumerate(self._slots) if work is None]
    group, length = [first], self._length(len(first.laid.tokens))
    if not (first.known or first.alone):
      group = [w for w in self._queue if self._length(len(w.laid.tokens)) == length and not (w.known or w.alone)]
      group = group[: len(free)]
    for work in group:
      self._queue.remove(work)
    try:
      self._fill(group, free, length)
    except Exception as error:
      self._part(group, error)
    else:
      for slot, work in zip(free, group, strict=False):
        self._slots[slot] = work

  def _part(self, group: list[_Work], error: Exception) -> None:
    """After a prefill that failed: which of the group is at fault is seen when each is tried alone."""
    lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))  # `prefill` is given the state to write into
    if len(group) > 1 and not lost:
      for work in reversed(group):
        work.alone = True
        self._queue.appendleft(work)
      return
    for work in group:  # who waits for them must not wait for ever
      work.stream.end('failed')
    if lost:
      raise error
    raise PromptFailed(f'{group[0].laid.name}: {error}') from error

  def _fill(self, group: list[_Work], free: list[int], length: int) -> None:
    """Sees, reads and prefills; `length` places per row."""
    text = max([len(work.laid.fused) for work in group if work.laid.media], default=0)
    laid = [work.laid for work in group]
    vision, total = self.programs.blank(self.row_places(len(group)), length, _places(text))
    vision, total = self._look_at_pixels(laid, vision, total)
    vision, total = self._look_at_kept(laid, vision, total)
    self._prefill(group, free, vision, total, length)

  def _look_at_pixels(self, laid: list[Laid], vision: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Visuals that nobody keeps, of all prompts together; those with as many views share chunks."""
    alike = collections.defaultdict(list)
    for row, one in enumerate(laid):
      for views, at in _with_slots(one):
        if not isinstance(views, Visuals):
          for view, places in zip(views, at, strict=True):
            alike[view.shape, view.dtype].append((row, view, places))
    (rows, length), text, size = vision.shape[:2], total.shape[1], self.visual_chunk
    chunks = (same[i : i + size] for same in alike.values() for i in range(0, len(same), size))
    for some in chunks:
      count = self.visual_places(len(some))
      seen = self.programs.see(self.params, _filled([view for _, view, _ in some], count))
      row = np.full(count, rows, np.int32)
      row[: len(some)] = [row for row, _, _ in some]
      at = np.full((count, seen.compressed.shape[1]), length, np.int32)
      at[: len(some)] = [places for _, _, places in some]
      vision = self.programs.place(vision, seen.compressed, row, at)
      tokens = _filled([_text(laid[row], text) for row, _, _ in some], count)
      total = self.programs.add(total, self.programs.read(self.params, seen, tokens), row)
    return vision, total

  def _look_at_kept(self, laid: list[Laid], vision: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Visuals that outlive the question."""
    for row, one in enumerate(laid):
      for visuals, at in _with_slots(one):
        if isinstance(visuals, Visuals) and len(visuals):
          count = _places(len(visuals))
          places = np.full((count, at.shape[1]), vision.shape[1], np.int32)
          places[: len(visuals)] = at
          vision = self.programs.place(
            vision, _filled(list(visuals.compressed()), count), np.full(count, row, np.int32), places
          )
          fused = self._fused_with(visuals, _text(one, total.shape[1]))
          total = self.programs.add(total, fused, np.array([row], np.int32))
    return vision, total

  def _fused_with(self, visuals: Visuals, text: np.ndarray) -> jax.Array:
    """The text int32[T] fused with each of the visuals, added up: float32[1 T D]. What was added before is kept."""
    known = visuals.fused
    if known is None or known.text != text.tobytes():
      known = FusedSum(text.tobytes(), self.programs.blank(1, 1, len(text))[1], 0)
    total = known.total + 0  # a copy: `add` takes what it is given
    for chunk in visuals.chunks(known.visuals):
      count = chunk.seen.compressed.shape[0]
      fused = self.programs.read(self.params, chunk.seen, _filled([text], count))
      total = self.programs.add(total, fused, (np.arange(count) >= chunk.count).astype(np.int32))
    visuals.fused = FusedSum(text.tobytes(), total, len(visuals))
    return total

  def _prefill(self, group: list[_Work], free: list[int], vision: jax.Array, total: jax.Array, length: int) -> None:
    rows, count, text = vision.shape[0], len(group), total.shape[1]
    laid, known = [work.laid for work in group], [work.known for work in group]
    columns = dict(
      tokens=np.zeros((rows, length), np.int32),
      is_vision=np.zeros((rows, length), bool),
      length=np.ones(rows, np.int32),
      fuse_index=np.full((rows, text), length, np.int32),
      visuals=np.zeros(rows, np.float32),
      start=np.zeros(rows, np.int32),
      slot=np.full(rows, self.slots, np.int32),
    )
    for row, one in enumerate(laid):
      columns['tokens'][row, : len(one.tokens)] = one.tokens
      columns['is_vision'][row, one.slots.reshape(-1)] = True
      columns['fuse_index'][row, : len(one.fused)] = one.fused
      columns['visuals'][row] = len(one.slots)
    columns['length'][:count] = [len(one.tokens) for one in laid]
    columns['start'][:count], columns['slot'][:count] = known, free[:count]
    rules = [work.stream.sampling for work in group] + [Sampling()] * (rows - count)
    prefix = group[0].memory.cache if known[0] else None
    new = self._length(max(len(one.tokens) - start for one, start in zip(laid, known, strict=True)))
    self.state = self.programs.prefill(
      self.params, self.state, Rows(**columns, controls=Controls.of(rules)), vision, total, prefix, new
    )
    for work, start in zip(group, known, strict=True):
      if work.memory:
        work.memory.reused = start


def _with_slots(laid: Laid) -> Iterator[tuple]:
  """Each tag's visuals, and where their compressed tokens go, int32[m C]."""
  start = 0
  for some in laid.media:
    yield some, laid.slots[start : start + len(some)]
    start += len(some)


def _text(laid: Laid, places: int) -> np.ndarray:
  """int32[T]: what is fused with the visuals."""
  text = np.zeros(places, np.int32)
  text[: len(laid.fused)] = laid.tokens[laid.fused]
  return text


def _filled(arrays: list[np.ndarray], count: int) -> np.ndarray:
  """Stacked; the last one again in the places left."""
  return np.stack(arrays + [arrays[-1]] * (count - len(arrays)))


def _places(count: int) -> int:
  """The next power of two, from _SHORTEST on."""
  return max(_SHORTEST, 1 << max(0, count - 1).bit_length())


def _ladder(count: int, least: int, most: int) -> int:
  """The smallest of least, 4 least, 16 least, … and most that holds `count`."""
  size = least
  while size < min(count, most):
    size *= _GROWTH
  return min(size, most)

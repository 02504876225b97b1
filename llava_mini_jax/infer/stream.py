"""One answer while it comes: its tokens, its text in pieces, and what ends it.

Text is told as soon as nothing can take it back: a character that is not whole yet, space that may be the end, and
what may become a stop string wait for the next token.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from llava_mini_jax.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Answer:
  text: str  # without special tokens, stop strings and the space around it
  ids: list[int]  # as they were chosen, with the one that ended it
  logprobs: list[float]  # of each, by the model alone
  top_logprobs: list[list[tuple[int, float]]]  # of each, the `Sampling.top_logprobs` likeliest ids, falling
  finish: str  # stop; length; cancelled; failed, where the engine raised what went wrong
  prompt_tokens: int  # with vision slots


class Stream:
  """Iterate for pieces of text, or `result()` for all of it; either works the engine until they are there."""

  def __init__(
    self,
    sampling: Sampling,
    prompt_tokens: int,
    *,
    end: Collection[int],
    decode: Callable[[Sequence[int]], str],
    advance: Callable[[], bool],
  ):
    """Made by `Engine.submit`.

    Args:
      end: ids that end the answer and are no part of its text. decode: ids -> text. advance: one step of all answers.
    """
    self.sampling, self.prompt_tokens = sampling, prompt_tokens
    self._end, self._decode, self._advance = frozenset(end), decode, advance
    self.ids: list[int] = []
    self.logprobs: list[float] = []
    self.top_logprobs: list[list[tuple[int, float]]] = []
    self.finish = ''
    self.cancelled = False
    self._lock = threading.Lock()  # one thread works the engine, another may read
    self._count = 0  # of the ids, those that are text: not the one that ended it
    self._whole, self._from, self._upto = '', 0, 0  # text of the first `_upto` ids; where decoding what follows begins
    self._told = ''
    self._cut: str | None = None  # all of the text, where a stop string ended it

  @property
  def text(self) -> str:
    """What can be told; decoded when it is asked for, and then the new tokens alone."""
    with self._lock:
      if self._cut is not None:
        return self._cut
      text = self._decoded()
      if self.finish in ('stop', 'length'):
        return text.rstrip()
      if not text.endswith('\ufffd'):
        self._told = text[: len(text) - self._unsure(text)].rstrip()
      return self._told

  def take(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> bool:
    """One more token; whether the answer has ended."""
    self.ids.append(token)
    self.logprobs.append(logprob)
    self.top_logprobs.append(list(top[: self.sampling.top_logprobs]))
    ended = token in self._end
    self._count += not ended
    if self.sampling.stop:
      with self._lock:
        text = self._decoded()
        if found := [at for at in map(text.find, self.sampling.stop) if at >= 0]:
          self._cut, ended = text[: min(found)].rstrip(), True
    if ended or len(self.ids) == self.sampling.max_new_tokens:
      self.finish = 'stop' if ended else 'length'  # last: readers look at it first
    return bool(self.finish)

  def cancel(self) -> None:
    """Its slot is free from the next step on."""
    self.cancelled = True

  def end(self, why: str) -> None:
    """By the engine: it has no slot any more, and there is nothing to come."""
    self.finish = why

  def __iter__(self) -> Iterator[str]:
    told = 0
    while True:
      finished, text = bool(self.finish), self.text
      if len(text) > told:
        yield text[told:]
        told = len(text)
      elif finished:
        return
      else:
        self._advance()

  def result(self) -> Answer:
    while not self.finish:
      self._advance()
    return Answer(self.text, self.ids, self.logprobs, self.top_logprobs, self.finish, self.prompt_tokens)

  def _decoded(self) -> str:
    """Text of all ids that are text; the space before it is left out.

    A token's text may depend on the one before it, so decoding begins with tokens whose text is known.
    """
    ids = self.ids[: self._count]
    if len(ids) == self._upto:
      return self._whole.lstrip()
    known, text = self._decode(ids[self._from : self._upto]), self._decode(ids[self._from :])
    whole = self._whole + text[len(known) :]
    if not text.endswith('\ufffd'):
      self._whole, self._from, self._upto = whole, self._upto, len(ids)
    return whole.lstrip()

  def _unsure(self, text: str) -> int:
    """How many characters at the end begin a stop string."""
    longest = max((len(stop) for stop in self.sampling.stop), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.sampling.stop)), 0)

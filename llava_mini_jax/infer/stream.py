"""One answer while it comes: its tokens, its text in pieces, and what ends it.

Text is told as soon as nothing can take it back: a character that is not whole yet, space that may be the end, and
what may become a stop string wait for the next token.
"""

from __future__ import annotations

import dataclasses
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
    self.text = ''  # that can be told
    self.finish = ''
    self.cancelled = False

  def take(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> bool:
    """One more token; whether the answer has ended."""
    self.ids.append(token)
    self.logprobs.append(logprob)
    self.top_logprobs.append(list(top[: self.sampling.top_logprobs]))
    ended = token in self._end
    text = self._decode(self.ids[:-1] if ended else self.ids).lstrip()
    found = [at for at in map(text.find, self.sampling.stop) if at >= 0]
    if ended or found:
      return self._finish('stop', text[: min(found, default=len(text))])
    if len(self.ids) == self.sampling.max_new_tokens:
      return self._finish('length', text)
    if not text.endswith('\ufffd'):
      self.text = text[: len(text) - self._unsure(text)].rstrip()
    return False

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

  def _finish(self, why: str, text: str) -> bool:
    self.text, self.finish = text.rstrip(), why  # in this order: readers look at `finish` first
    return True

  def _unsure(self, text: str) -> int:
    """How many characters at the end begin a stop string."""
    longest = max((len(stop) for stop in self.sampling.stop), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.sampling.stop)), 0)

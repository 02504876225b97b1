"""A conversation in the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_mini_jax.data.conversation import MEDIA_TAG, Turn
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.prompts import Prompt

HELP = 'Ask a question; /image FILE or /video FILE shows another, /new starts over, an empty line ends.'
Shown = tuple[str, Path]  # tag and file


class Conversation:
  """The turns so far, about one image or video, or about none."""

  def __init__(self, answerer: Answerer, shown: Shown | None):
    self._answerer = answerer
    self._tag, self._visuals = '', []
    self.start_over()
    if shown:
      self.show(*shown)

  def show(self, tag: str, path: Path) -> None:
    """Starts over with another image or video. Raises DataError if it cannot be read."""
    self._visuals: list[np.ndarray] = self._answerer.encoder.media.read(path, tag, str(path))
    self._tag = tag
    self.start_over()

  def start_over(self) -> None:
    """Forgets the turns, not what is shown."""
    self._turns: list[Turn] = []

  def ask(self, question: str) -> None:
    """Prints the answer as it comes, and remembers the turn. Raises DataError for a question that cannot be asked."""
    if found := MEDIA_TAG.search(question):
      raise DataError('E_IMAGE_TAGS', 'question', f'expected no {found[0]}: the image is shown already; found one')
    tag = f'{self._tag}\n' if self._visuals and not self._turns else ''
    turns = [*self._turns, {'role': 'user', 'content': tag + question}]
    answer = ''
    for piece in self._answerer.stream(Prompt(turns, [self._visuals] if self._visuals else [], 'question')):
      print(piece, end='', flush=True)
      answer += piece
    print()
    self._turns = [*turns, {'role': 'assistant', 'content': answer}]


def answer_once(answerer: Answerer, shown: Shown | None, question: str) -> None:
  """One question, one answer on stdout. Raises DataError."""
  Conversation(answerer, shown).ask(question)


def prompt_loop(answerer: Answerer, shown: Shown | None) -> None:
  """Questions until an empty line or end of input; a mistake is named and the loop goes on."""
  conversation = Conversation(answerer, shown)
  print(HELP)
  while True:
    try:
      line = input('> ').strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if not line:
      return
    try:
      if line == '/new':
        conversation.start_over()
      elif line.startswith(('/image', '/video')):
        conversation.show(f'<{line[1:6]}>', Path(line[6:].strip()))
      else:
        conversation.ask(line)
    except DataError as error:
      print(f'error: {error}')

"""A conversation in the terminal."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_mini_jax.data.conversation import IMAGE_TAG, Turn
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.prompts import Prompt

HELP = 'Ask a question; /image FILE shows another image, /new starts over, an empty line ends.'


class Conversation:
  """The turns so far, about one image or none."""

  def __init__(self, answerer: Answerer, image: Path | None):
    self._answerer = answerer
    self.show(image)

  def show(self, path: Path | None) -> None:
    """Starts over with another image. Raises DataError if it cannot be read."""
    self._image: Image.Image | None = None if path is None else load_image(path, str(path))
    self.start_over()

  def start_over(self) -> None:
    """Forgets the turns, not the image."""
    self._turns: list[Turn] = []

  def ask(self, question: str) -> None:
    """Prints the answer as it comes, and remembers the turn. Raises DataError for a question that cannot be asked."""
    if IMAGE_TAG in question:
      raise DataError('E_IMAGE_TAGS', 'question', f'expected no {IMAGE_TAG}: the image is shown already; found one')
    tag = f'{IMAGE_TAG}\n' if self._image is not None and not self._turns else ''
    turns = [*self._turns, {'role': 'user', 'content': tag + question}]
    answer = ''
    for piece in self._answerer.stream(Prompt(turns, [] if self._image is None else [self._image], 'question')):
      print(piece, end='', flush=True)
      answer += piece
    print()
    self._turns = [*turns, {'role': 'assistant', 'content': answer}]


def answer_once(answerer: Answerer, image: Path | None, question: str) -> None:
  """One question, one answer on stdout. Raises DataError."""
  Conversation(answerer, image).ask(question)


def prompt_loop(answerer: Answerer, image: Path | None) -> None:
  """Questions until an empty line or end of input; a mistake is named and the loop goes on."""
  conversation = Conversation(answerer, image)
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
      elif line.startswith('/image'):
        conversation.show(Path(line.removeprefix('/image').strip()))
      else:
        conversation.ask(line)
    except DataError as error:
      print(f'error: {error}')

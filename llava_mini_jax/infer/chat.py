"""A conversation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_mini_jax.data.conversation import VIDEO_TAG
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.infer.session import Session

HELP = 'Ask a question; /image FILE or /video FILE shows another, /new starts over, an empty line ends.'
Shown = tuple[str, Path]  # tag and file


class Conversation:
  """The turns so far, about images or a video, or about none."""

  def __init__(self, engine: Engine, shown: Sequence[Shown], max_new_tokens: int):
    self._engine, self._sampling = engine, Sampling(max_new_tokens=max_new_tokens)
    self.show(*shown)

  def show(self, *shown: Shown) -> None:
    """Starts over with other images or another video. Raises DataError if one cannot be read."""
    session = Session(self._engine, name='question')
    for tag, path in shown:
      frames = self._engine.encoder.media.stream(path, tag, str(path))
      if tag == VIDEO_TAG:
        session.show_video(frames)
      else:
        session.show_image(next(frames))
    self._session = session

  def start_over(self) -> None:
    """Forgets the turns, not what is shown."""
    self._session.start_over()

  def ask(self, question: str) -> None:
    """Prints the answer as it comes, and remembers the turn. Raises DataError for a question that cannot be asked."""
    for piece in self._session.stream(question, self._sampling):
      print(piece, end='', flush=True)
    print()


def prompt_loop(conversation: Conversation) -> None:
  """Questions until an empty line or end of input; a mistake is named and the loop goes on."""
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
        conversation.show((f'<{line[1:6]}>', Path(line[6:].strip())))
      else:
        conversation.ask(line)
    except DataError as error:
      print(f'error: {error}')

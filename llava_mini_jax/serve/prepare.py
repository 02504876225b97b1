"""A chat request -> what the engine takes. Done in threads: it decodes media and encodes them."""

from __future__ import annotations

import dataclasses

from llava_mini_jax.data.conversation import IMAGE_TAG, MEDIA_TAG, VIDEO_TAG, Turn
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.media import Files, Looker
from llava_mini_jax.serve.refusal import Refused
from llava_mini_jax.serve.schema import ChatRequest, Message, TextPart, VideoPart
from llava_mini_jax.serve.watch import Watch

DEFAULT_TOKENS = 256  # of an answer, where nothing is said and so many fit


@dataclasses.dataclass(frozen=True)
class Prepared:
  request: Request
  visuals: int  # images and frames
  reused: int  # of them, those that the engine had seen before


def prepare(chat: ChatRequest, engine: Engine, files: Files, looker: Looker, limits: Limits, watch: Watch) -> Prepared:
  """Media lead the turn they are in, in their order, as in training.

  Raises:
    Refused: 403, 404 or 422, naming the field. DataError: a medium that cannot be read, a prompt that cannot be. Left.
  """
  new_tokens = chat.answer_tokens(limits.new_tokens)
  sources = _sources(chat, limits)
  turns = [_turn(message, f'messages.{i}') for i, message in enumerate(chat.messages)]
  data = [(files.read(url, tag, where), tag, where) for url, tag, where in sources]
  media, reused = [], 0
  for content, tag, where in data:
    visuals, known = looker.look(content, tag, where, watch.of(where))
    media.append(visuals)
    reused += len(visuals) * known
    if (found := sum(map(len, media))) > limits.frames:
      raise Refused(422, f'messages: expected at most {limits.frames} images and frames; found {found}')
  watch.check()
  prompt = Prompt(turns, media, 'messages')
  if new_tokens is None:
    new_tokens = max(1, min(DEFAULT_TOKENS, limits.new_tokens, _room(engine, prompt)))
  return Prepared(Request(prompt, chat.sampling(new_tokens)), sum(map(len, media)), reused)


def _sources(chat: ChatRequest, limits: Limits) -> list[tuple[str, str, str]]:
  """url, tag and place of every medium. Raises Refused 422 for too many of them, or too much text."""
  found, characters = [], 0
  for i, message in enumerate(chat.messages):
    for k, part in enumerate(message.content):
      where = f'messages.{i}.content.{k}'
      if isinstance(part, TextPart):
        characters += len(part.text)
        continue
      if message.role != 'user':
        raise Refused(422, f'{where}: expected images and videos of the user alone; found one of {message.role}')
      video = isinstance(part, VideoPart)
      source = part.video_url if video else part.image_url
      found.append((source.url, VIDEO_TAG if video else IMAGE_TAG, f'{where}.{part.type}.url'))
  if len(found) > limits.media:
    raise Refused(422, f'messages: expected at most {limits.media} images and videos; found {len(found)}')
  if characters > limits.characters:
    raise Refused(422, f'messages: expected at most {limits.characters} characters of text; found {characters}')
  return found


def _turn(message: Message, where: str) -> Turn:
  texts = [part.text for part in message.content if isinstance(part, TextPart)]
  for text in texts:
    if tag := MEDIA_TAG.search(text):
      raise Refused(422, f'{where}.content: expected no {tag[0]} in the text; found one', param=where)
  tags = [VIDEO_TAG if isinstance(p, VideoPart) else IMAGE_TAG for p in message.content if not isinstance(p, TextPart)]
  role = 'system' if message.role == 'developer' else message.role
  return dict(role=role, content=''.join(f'{tag}\n' for tag in tags) + '\n'.join(texts))


def _room(engine: Engine, prompt: Prompt) -> int:
  """Tokens that are left for the answer."""
  return engine.core.max_length - engine.encoder.sizes([prompt], [engine.encoder.encode(prompt)])[0]


def refused(error: DataError) -> Refused:
  """The same for the client: bad data are its own. The cause, which may quote the host, is not told."""
  message = ' '.join(error.message.split()).encode('ascii', 'backslashreplace').decode()
  return Refused(422, f'{error.where}: {message}', param=error.where[:80], code=error.code)


def vision_tokens(engine: Engine, visuals: int) -> int:
  """Slots that so many images and frames take."""
  return visuals * engine.run.experiment.model.slots_per_visual(engine.encoder.media.images.views)

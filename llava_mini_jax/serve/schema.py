"""What `POST /v1/chat/completions` takes, after OpenAI's API reference: JSON bytes -> `ChatRequest`.

A field that would change the answer and that this server cannot honour is refused, not ignored; of fields that it
knows only by their neutral value, that value is taken. `top_k`, `min_p` and `repetition_penalty` are extensions.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BeforeValidator, FailFast, Field, FiniteFloat
from pydantic_core import PydanticCustomError

from llava_mini_jax.infer.sampling import MAX_LOGPROBS, Sampling
from llava_mini_jax.serve.refusal import Refused

MAX_STOPS, MAX_STOP = 4, 256  # stop strings, and characters of each
MAX_MESSAGES, MAX_PARTS, MAX_FIELDS = 1024, 256, 64
MAX_MARKS = 2**19  # brackets and commas of a body, which say how many objects it makes; base64 has none


def _few(fields: Any) -> Any:
  """Before they are looked at: each that is wrong would be an error of its own."""
  if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
    raise PydanticCustomError('too_many_fields', f'input should have at most {MAX_FIELDS} fields')
  return fields


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(strict=True, extra='forbid', protected_namespaces=())

  @pydantic.model_validator(mode='before')
  @classmethod
  def _few_fields(cls, fields: Any) -> Any:
    return _few(fields)


class TextPart(_Strict):
  type: Literal['text']
  text: str


class Source(_Strict):
  """A data URI, or the id of an uploaded file. `detail` is a hint of OpenAI's that changes nothing here."""

  url: str
  detail: Literal['auto', 'low', 'high'] = 'auto'


class ImagePart(_Strict):
  type: Literal['image_url']
  image_url: Source


class VideoPart(_Strict):
  type: Literal['video_url']
  video_url: Source


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator='type')]


Nothing = Annotated[list, Field(max_length=0)] | None


class Message(_Strict):
  role: Literal['system', 'developer', 'user', 'assistant']
  content: Annotated[list[Part], FailFast(), Field(max_length=MAX_PARTS)]
  name: str | None = None
  # what an answer has besides its content, so that one can be sent back as it came; never more than nothing here
  refusal: Literal[''] | None = None
  annotations: Nothing = None
  audio: None = None
  function_call: None = None
  tool_calls: Nothing = None

  @pydantic.field_validator('content', mode='before')
  @classmethod
  def _as_parts(cls, content: Any) -> Any:
    return [dict(type='text', text=content)] if isinstance(content, str) else content


class StreamOptions(_Strict):
  include_usage: bool = False
  include_obfuscation: bool = False


class ResponseFormat(_Strict):
  type: Literal['text']


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class ChatRequest(_Strict):
  model: str
  messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  temperature: FiniteFloat | None = Field(None, ge=0, le=2)
  top_p: FiniteFloat | None = Field(None, gt=0, le=1)
  top_k: int = Field(0, ge=0, lt=2**31)
  min_p: FiniteFloat = Field(0.0, ge=0, le=1)
  repetition_penalty: FiniteFloat = Field(1.0, ge=0.01, le=100)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None
  # known by their neutral value alone
  n: Literal[1] | None = None
  frequency_penalty: FiniteFloat | None = Field(None, ge=0, le=0)
  presence_penalty: FiniteFloat | None = Field(None, ge=0, le=0)
  response_format: ResponseFormat | None = None
  logit_bias: dict | None = Field(None, max_length=0)
  tools: Nothing = None
  tool_choice: Literal['none'] | None = None
  parallel_tool_calls: bool | None = None
  store: Literal[False] | None = None
  metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None

  @pydantic.field_validator('stop', mode='before')
  @classmethod
  def _as_list(cls, stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop

  def answer_tokens(self, most: int) -> int | None:
    """Most tokens of the answer; None = not said. Raises Refused 422 over `most`, or if two are said that differ."""
    said = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
    if len(said) > 1:
      raise Refused(422, f'max_tokens: expected that of max_completion_tokens; found {self.max_tokens}')
    if said and max(said) > most:
      raise Refused(422, f'max_tokens: expected at most {most}; found {max(said)}', param='max_tokens')
    return said.pop() if said else None

  def sampling(self, max_new_tokens: int) -> Sampling:
    """Greedy unless a temperature is said; drawn from another seed each time unless a seed is said."""
    return Sampling(
      max_new_tokens=max_new_tokens,
      temperature=float(self.temperature or 0.0),
      top_k=self.top_k,
      top_p=float(1.0 if self.top_p is None else self.top_p),
      min_p=float(self.min_p),
      repetition_penalty=float(self.repetition_penalty),
      seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
      stop=tuple(self.stop or ()),
      top_logprobs=self.top_logprobs or 0,
    )


class HeatRequest(_Strict):
  """What `POST /v1/compressor` takes: the same url as an `image_url` has."""

  url: str


_Request = TypeVar('_Request', bound=_Strict)


def parse_json(body: bytes) -> Any:
  """Raises Refused 400 for what is no JSON in UTF-8, nested too deep, or of too many parts."""
  if (found := sum(map(body.count, (b'[', b'{', b',')))) > MAX_MARKS:
    raise Refused(400, f'body: expected at most {MAX_MARKS} brackets and commas; found {found}')
  try:
    return json.loads(body.decode('utf-8'))
  except RecursionError:
    raise Refused(400, 'body: expected JSON; found one that is nested too deep') from None
  except UnicodeDecodeError as error:
    raise Refused(400, f'body: expected UTF-8; found another byte at {error.start}') from None
  except json.JSONDecodeError as error:
    raise Refused(400, f'body: expected JSON; line {error.lineno}, column {error.colno}: {error.msg}') from None
  except ValueError:
    raise Refused(400, 'body: expected JSON; found a number with too many digits') from None


def parse(kind: type[_Request], body: bytes) -> _Request:
  """Raises Refused 400 as `parse_json`, 422 naming the field at fault."""
  try:
    request = kind.model_validate(parse_json(body))
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False, include_context=False)[0]
    # both may quote what the client sent, whatever its length
    where = ascii('.'.join(map(str, first['loc'])) or 'body')[1:-1][:120]
    message = ascii(first['msg'])[1:-1].replace("\\'", "'")[:160]
    message = f'{where}: {message[:1].lower()}{message[1:]}; found {_short(first["input"])}'
    raise Refused(422, message, param=where) from None
  except RecursionError:
    raise Refused(400, 'body: expected JSON; found one that is nested too deep') from None
  if isinstance(request, ChatRequest):
    if request.top_logprobs and not request.logprobs:
      raise Refused(422, 'top_logprobs: expected logprobs to be true; found otherwise', param='top_logprobs')
    if request.stream_options and not request.stream:
      raise Refused(422, 'stream_options: expected stream to be true; found otherwise', param='stream_options')
  return request


def _short(found: Any) -> str:
  """One line of it. Only numbers and short texts are told back; of the rest its kind."""
  if isinstance(found, str):
    return ascii(found) if len(found) <= 40 else f'{len(found)} characters'
  return repr(found)[:40] if found is None or isinstance(found, int | float) else type(found).__name__

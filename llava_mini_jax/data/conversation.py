"""Conversations -> token ids, and which of them the assistant says.

Enters: turns `[{'role': 'user'|'assistant', 'content': str}, ...]`, optionally
led by one `system` turn. Leaves: ids with IMAGE_TOKEN_ID at every `<image>`
and `<video>`, and a mask of the tokens to learn: the assistant's words and its end-of-turn
token. One rendering of a Jinja template gives both, because the template marks
what the assistant says with `{% generation %}`.

Formats: `vicuna_v1` is LLaVA-v1.5's (system, `USER: `, `ASSISTANT:`, `</s>`);
`plain` is LLaVA's pretraining format (`<image>` caption newline); `llama_3_1`
has Llama-3's headers with the LLaVA-NeXT system text that the released package
uses; `chatml` is Qwen's and SmolLM2's; `qa` is bare question and answer. A leading system turn, or `system=`,
replaces the default system text; an empty one leaves it out.

A tag is cut out before tokenizing and the pieces are tokenized apart, as the
released `tokenizer_image_token` does (golden `tokenizer_image_token.json`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.types import IMAGE_TOKEN_ID

if TYPE_CHECKING:
  import transformers

Turn = Mapping[str, str]
Span = tuple[int, int]
_Medium = TypeVar('_Medium')

IMAGE_TAG, VIDEO_TAG = '<image>', '<video>'
MEDIA_TAG = re.compile(f'{IMAGE_TAG}|{VIDEO_TAG}')
TEMPLATES = ('chatml', 'llama_3_1', 'plain', 'qa', 'vicuna_v1')

_MARK = '\ud800'  # a lone surrogate encloses assistant output while rendering: valid text cannot contain one
_SURROGATE = re.compile('[\ud800-\udfff]')
_LLAVA_ROLES = {'human': 'user', 'gpt': 'assistant', 'system': 'system'}


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A conversation as the model reads it."""

  ids: np.ndarray  # int32[n]; IMAGE_TOKEN_ID at every `<image>` and `<video>`
  assistant: np.ndarray  # bool[n]; True where the assistant speaks, its end-of-turn token included


class _Generation(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}` encloses its body in marks."""

  tags = frozenset({'generation'})

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method('_enclose'), [], [], body).set_lineno(line)

  def _enclose(self, caller):
    return f'{_MARK}{caller()}{_MARK}'


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
  trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, extensions=[_Generation]
)
_ENVIRONMENT.filters['media_tags'] = lambda text: ''.join(MEDIA_TAG.findall(text))


@functools.lru_cache(maxsize=64)
def load_template(name_or_path: str | os.PathLike) -> jinja2.Template:
  """Compiles one of TEMPLATES, or a template file; compiled once per process.

  A template sees `messages` (`role`, `content`; a `system` one first if there is one), `add_generation_prompt`,
  `bos_token` and `eos_token`, and runs in Jinja's immutable sandbox.

  Raises:
    ConfigError: no such template, or its syntax is wrong (the message gives file and line).
  """
  path = _template_file(name_or_path)
  try:
    return _ENVIRONMENT.from_string(path.read_text(encoding='utf-8'))
  except jinja2.TemplateSyntaxError as error:
    raise ConfigError(f'template {path.name}:{error.lineno}: {error.message}') from error


def template_fingerprint(name_or_path: str | os.PathLike) -> str:
  """sha256 of a template's text, wherever it lies. Raises ConfigError: no such template."""
  return hashlib.sha256(_template_file(name_or_path).read_bytes()).hexdigest()


def _template_file(name_or_path: str | os.PathLike) -> Path:
  if name_or_path in TEMPLATES:
    return Path(__file__).with_name('templates') / f'{name_or_path}.jinja'
  if not Path(name_or_path).is_file():
    close = difflib.get_close_matches(str(name_or_path), TEMPLATES, n=1)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    raise ConfigError(f'template: expected one of {", ".join(TEMPLATES)} or a file; found {str(name_or_path)!r}{hint}')
  return Path(name_or_path)


def render(
  template: jinja2.Template,
  turns: list[Turn],
  *,
  system: str | None = None,
  add_generation_prompt: bool = False,
  bos_token: str = '<s>',
  eos_token: str = '</s>',
  where: str = 'conversation',
) -> tuple[str, list[Span]]:
  """Writes a conversation out.

  Args:
    template: from `load_template`.
    turns: user and assistant in turn, the user first; a `system` turn may lead.
    system: replaces the leading system turn and the template's default system text; None = keep them.
    add_generation_prompt: end with what precedes an answer; the last turn must then be the user's.
    bos_token, eos_token: for templates that name them (only `vicuna_v1` does, with eos_token).
    where: names the sample in errors.
  Returns:
    The text, and the (start, end) character spans of assistant output in it, in order.
  Raises:
    DataError: as `check_turns`, and E_ROLE_ORDER for a generation prompt after an assistant turn.
    ConfigError: the template itself fails, or reaches for what the sandbox forbids.
  """
  check_turns(turns, where)
  messages = turns
  if system is not None:
    messages = [{'role': 'system', 'content': system}, *turns[turns[0]['role'] == 'system' :]]
    check_turns(messages, where)
  if add_generation_prompt and messages[-1]['role'] != 'user':
    raise DataError('E_ROLE_ORDER', where, 'a generation prompt: expected the last turn to be user; found assistant')
  try:
    marked = template.render(
      messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos_token, eos_token=eos_token
    )
  except jinja2.TemplateError as error:
    raise ConfigError(f'template: cannot render {where}: {error}') from error
  pieces = marked.split(_MARK)  # outside, inside, outside, ...
  ends = np.cumsum([len(piece) for piece in pieces]).tolist()
  return ''.join(pieces), list(zip(ends[0:-1:2], ends[1::2], strict=True))


def encode(
  tokenizer: transformers.PreTrainedTokenizerFast,
  template: jinja2.Template,
  turns: list[Turn],
  *,
  add_generation_prompt: bool = False,
  system: str | None = None,
  where: str = 'conversation',
) -> Encoded:
  """A conversation -> ids int32[n] and assistant mask bool[n].

  Special tokens come from the template alone: text that spells one is refused, so nobody can end a turn or open
  another from inside one.

  Args: as `render`; the tokenizer gives BOS and EOS.
  Raises:
    DataError: as `render`, and E_SPECIAL_TOKEN for a turn that spells one of the tokenizer's special tokens.
  """
  text, spans = render(
    template,
    turns,
    system=system,
    add_generation_prompt=add_generation_prompt,
    bos_token=tokenizer.bos_token or '',
    eos_token=tokenizer.eos_token or '',
    where=where,
  )
  special = _special_tokens(tokenizer, len(tokenizer))
  for name, content in [('system', system or ''), *((f'turns[{i}]', turn['content']) for i, turn in enumerate(turns))]:
    found = special.search(content)
    if found:
      raise DataError(
        'E_SPECIAL_TOKEN', where, f'{name}: expected no special token in the text; found {found.group()!r}'
      )
  return tokenize(tokenizer, text, spans)


def tokenize(tokenizer: transformers.PreTrainedTokenizerFast, text: str, spans: Sequence[Span] = ()) -> Encoded:
  """Text -> ids int32[n], and bool[n]: which tokens reach into one of the ordered, disjoint character spans.

  The pieces between `<image>` and `<video>` tags are tokenized apart. One BOS leads if the tokenizer adds one and the
  text does not spell it already; no EOS is appended, because templates write their own.
  """
  backend = tokenizer.backend_tokenizer
  if backend.truncation or backend.padding or backend.encode_special_tokens:
    # left behind by an earlier `tokenizer(text, truncation=..., padding=..., split_special_tokens=...)`
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False

  ids: list[int] = []
  offsets: list[Span] = []  # of each token, in the whole text; before it = of no character
  tags = [match.span() for match in MEDIA_TAG.finditer(text)]
  for i, (at, stop) in enumerate(zip([0, *(end for _, end in tags)], [*(s for s, _ in tags), len(text)], strict=True)):
    if i:
      ids.append(IMAGE_TOKEN_ID)
      offsets.append((-1, 0))
    encoding = backend.encode(text[at:stop], add_special_tokens=False)
    ids.extend(encoding.ids)
    offsets.extend([(at + start, at + (end or 1)) for start, end in encoding.offsets])

  bos = tokenizer.bos_token_id
  if backend.encode('').ids[:1] == [bos] and ids[:1] != [bos]:
    ids.insert(0, bos)
    offsets.insert(0, (-1, 0))
  reach = np.asarray(offsets, np.int64).reshape(-1, 2) - (0, 1)  # first and last character of each token
  # byte-level tokenizers that trim give a lone space the empty range *after* it
  reach[:, 0] = reach.min(axis=1)
  edges = np.asarray(spans, np.int64).reshape(-1)  # start, end, start, end, ...: inside = past an odd number of them
  inside = np.searchsorted(edges, reach, side='right') % 2 == 1
  return Encoded(np.asarray(ids, np.int32), inside.any(axis=1))


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerFast, template: jinja2.Template) -> int:
  """The token with which an answer ends, where generation stops.

  Raises:
    ConfigError: what the template writes after an answer is not one token of this tokenizer.
  """
  dialogue = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  text, spans = render(template, dialogue, bos_token=tokenizer.bos_token or '', eos_token=tokenizer.eos_token or '')
  end = text[slice(*spans[-1])].partition('b')[2] if spans else ''
  encoded = encode(tokenizer, template, dialogue)
  last = encoded.ids[encoded.assistant][-1:].tolist()  # in its place: alone, some tokenizers put a space before it
  if not end or tokenizer.backend_tokenizer.decode(last, skip_special_tokens=False) != end:
    raise ConfigError(f'template: expected an end of turn that is one token of the tokenizer; found {end!r}')
  return last[0]


def turns_from_llava(conversations: Any, where: str) -> list[Turn]:
  """LLaVA's `[{'from': 'human'|'gpt'|'system', 'value': str}, ...]` -> turns. Raises DataError as `check_turns`."""
  _check(conversations, where, 'conversations', 'from', 'value', ('system', 'human', 'gpt'))
  return [{'role': _LLAVA_ROLES[item['from']], 'content': item['value']} for item in conversations]


def check_turns(turns: Any, where: str) -> None:
  """Raises DataError unless `turns` is a conversation: user, assistant, user, ..., after at most one system turn.

  E_EMPTY_TURNS: no turn but the system's. E_ROLE_ORDER: a turn of anyone but the one whose turn it is.
  E_FIELD: not a list, an object or a string where there should be one, or a lone surrogate in the text.
  E_IMAGE_TAGS: `<image>` or `<video>` in a turn that is not the user's. Turns are counted from 0, a system turn
  included.
  """
  _check(turns, where, 'turns', 'role', 'content', ('system', 'user', 'assistant'))


def _check(turns: Any, where: str, name: str, speaker: str, text: str, roles: tuple[str, str, str]) -> None:
  """`check_turns` in the words of the data at hand: the keys of a turn, and what system, user, assistant are called."""
  if not isinstance(turns, list):
    raise DataError('E_FIELD', where, f'{name}: expected a list; found {type(turns).__name__}')
  lead = 0
  for i, turn in enumerate(turns):
    here = f'{name}[{i}]'
    if not isinstance(turn, Mapping):
      raise DataError('E_FIELD', where, f'{here}: expected an object; found {type(turn).__name__}')
    role, content = turn.get(speaker), turn.get(text)
    if i == 0 and role == roles[0]:
      lead = 1
    elif role != roles[1 + (i - lead) % 2]:
      raise DataError('E_ROLE_ORDER', where, f'{here}.{speaker}: expected {roles[1 + (i - lead) % 2]}; found {role!r}')
    if not isinstance(content, str):
      raise DataError('E_FIELD', where, f'{here}.{text}: expected a string; found {type(content).__name__}')
    surrogate = _SURROGATE.search(content)
    if surrogate:
      found = f'a lone surrogate at character {surrogate.start()}'
      raise DataError('E_FIELD', where, f'{here}.{text}: expected valid Unicode; found {found}')
    tag = MEDIA_TAG.search(content)
    if role != roles[1] and tag:
      raise DataError('E_IMAGE_TAGS', where, f'{here}.{text}: expected {tag[0]} in {roles[1]} turns only; found one')
  if len(turns) == lead:
    raise DataError('E_EMPTY_TURNS', where, f'{name}: expected at least one {roles[1]} turn; found none')


def media_tags(turns: Iterable[Turn]) -> list[str]:
  """Every `<image>` and `<video>` of a conversation, in order."""
  return [tag for turn in turns for tag in MEDIA_TAG.findall(turn['content'])]


def tagged_media(turns: Iterable[Turn], media: Sequence[_Medium], where: str) -> list[tuple[str, _Medium]]:
  """Every tag with the medium it stands for. Raises DataError E_IMAGE_TAGS unless there is one tag for each."""
  tags = media_tags(turns)
  if len(tags) != len(media):
    expected = f'expected {len(media)} <image> or <video> tag(s) for its media; found {len(tags)}'
    raise DataError('E_IMAGE_TAGS', where, expected)
  return list(zip(tags, media, strict=True))


def check_targets(encoded: Encoded, where: str) -> None:
  """Raises DataError E_NO_TARGET if there is nothing to learn: no token of the assistant's."""
  if not encoded.assistant.any():
    tokens = len(encoded.ids)
    raise DataError('E_NO_TARGET', where, f'expected at least one assistant token; found none in {tokens} tokens')


def special_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> set[str]:
  """What text must not spell. `<image>` and `<video>`, special to some tokenizers, never reach one and are left out."""
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
  found = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
  return found - {IMAGE_TAG, VIDEO_TAG}


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer, size: int) -> re.Pattern:
  """Matches any special token of the tokenizer; `size`, its length, makes tokens added later count."""
  longer_first = sorted(special_tokens(tokenizer), reverse=True)  # of two that begin alike, so that the error is right
  return re.compile('|'.join(map(re.escape, longer_first)) or r'(?!)')

"""LLaVA-style annotation files -> records, with every refusal on a list and nothing substituted.

Enters: JSON (a list) or JSONL (one object a line) of
`{"id", "image"?, "video"? (each a path or a list of paths), "category"?, "conversations": [{"from", "value"}, ...]}`
and the directory that the paths are relative to. Leaves: `records.Record` dicts, and a `Report`.

The n-th `<image>` stands for the n-th image, the n-th `<video>` for the n-th video. A sample with videos and no images
may write `<image>` for them, as LLaVA's own video data do.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.data import images, video
from llava_mini_jax.data.conversation import IMAGE_TAG, VIDEO_TAG, media_tags, turns_from_llava
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import Record, check_media_bytes

# What a tag stands for: in words, in codes of errors, and what reads it.
_KINDS = {
  IMAGE_TAG: ('image', 'IMG', images, images.load_image),
  VIDEO_TAG: ('video', 'VIDEO', video, video.check_video),
}


@dataclasses.dataclass
class Report:
  """What became of the samples of one source.

  Attributes:
    kept: samples that became records.
    refused: one DataError per sample left out; its `code` and `where` (file, line or record, id) are stable.
  """

  kept: int = 0
  refused: list[DataError] = dataclasses.field(default_factory=list)

  @property
  def refused_share(self) -> float:
    """Refused samples as a share of all, 0 for an empty source."""
    return len(self.refused) / max(1, self.kept + len(self.refused))


def resolve_inside(root: str | os.PathLike, path: Any) -> Path:
  """The regular file that `path` names inside `root`, with no way out of it.

  Raises:
    DataError: E_PATH for anything but a relative path (no `..`, no URL, no NUL) whose real location, symbolic links
      followed, is a regular file inside the real `root`; E_IMG_MISSING if there is no such file.
  """
  if not isinstance(path, str):
    raise DataError('E_PATH', repr(path), f'expected a string; found {type(path).__name__}')
  where = repr(path)
  if not path or '\0' in path or '://' in path:
    raise DataError('E_PATH', where, 'expected a relative path; found an empty one, a NUL or a URL')
  if os.path.isabs(path) or '..' in Path(path).parts:
    raise DataError('E_PATH', where, "expected a path relative to the media root, without '..'")
  base = os.path.realpath(root)
  try:
    real = os.path.realpath(os.path.join(base, path))
    mode = os.stat(real).st_mode
  except (FileNotFoundError, NotADirectoryError):
    raise DataError('E_IMG_MISSING', where, f'no such file in {root}') from None
  except (OSError, UnicodeError) as error:  # a loop of links, a name too long, no permission; a lone surrogate
    raise DataError('E_PATH', where, f'cannot be resolved ({error})') from None
  if os.path.commonpath([base, real]) != base:
    raise DataError('E_PATH', where, f'leads out of the media root {base} through a symbolic link')
  if not stat.S_ISREG(mode):
    raise DataError('E_PATH', where, 'expected a regular file')
  return Path(real)


class _NotAnObject:
  """Stands for a JSON object that Python's parser would accept and JSON does not define."""

  def __init__(self, reason: str):
    self.reason = reason


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _NotAnObject:
  result = dict(pairs)
  if len(result) < len(pairs):
    keys = [key for key, _ in pairs]
    return _NotAnObject(f'duplicate key {next(k for k in keys if keys.count(k) > 1)!r}')
  return next((value for value in result.values() if isinstance(value, _NotAnObject)), result)


def _parse(text: str, where: str, first_line: int = 1) -> Any:
  """Strict JSON. Raises DataError E_JSON with file:line:column."""
  try:
    return json.loads(
      text, object_pairs_hook=_object, parse_constant=lambda name: _NotAnObject(f'{name} is not a JSON value')
    )
  except json.JSONDecodeError as error:
    place = f'{where}:{first_line + error.lineno - 1}:{error.colno}'
    raise DataError('E_JSON', place, f'malformed JSON: {error.msg}') from None
  except (RecursionError, ValueError) as error:  # 100,000 nested lists; an integer of 5,000 digits
    reason = 'nested too deeply' if isinstance(error, RecursionError) else str(error)
    raise DataError('E_JSON', f'{where}:{first_line}', f'cannot be parsed: {reason}') from None


def entries(file: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Yields (place, parsed value) per sample: a place is `file: record n` or, for JSONL, `file:line`.

  The value of a line that is no JSON is the DataError that says so. Raises DataError: E_NO_SOURCE or E_JSON when the
  file as a whole cannot be used.
  """
  file = Path(file)
  try:
    text = file.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise DataError('E_JSON', str(file), f'expected UTF-8; byte {error.start} is not') from None
  except OSError as error:
    raise DataError('E_NO_SOURCE', str(file), f'cannot be read ({error.strerror})') from None
  if file.suffix.lower() != '.jsonl':
    values = _parse(text, str(file))
    if not isinstance(values, list):
      raise DataError('E_JSON', str(file), f'expected a list of samples; found {_kind(values)}')
    for index, value in enumerate(values):
      yield f'{file}: record {index}', value
    return
  for number, line in enumerate(text.split('\n'), start=1):
    if line.strip():
      try:
        yield f'{file}:{number}', _parse(line, str(file), number)
      except DataError as error:
        yield f'{file}:{number}', error


def _kind(value: Any) -> str:
  if isinstance(value, _NotAnObject):
    return value.reason
  kinds = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean', type(None): 'null'}
  return kinds.get(type(value), 'a number')


def read_llava(
  file: str | os.PathLike,
  media_root: str | os.PathLike | None,
  report: Report,
  *,
  reserved: Sequence[str] = (),
  number_duplicates: bool = False,
) -> Iterator[Record]:
  """Yields the good samples of a file in order, their images and videos read, decoded once and kept as they are.

  Args:
    file: `.jsonl` for one object a line; anything else is one JSON list.
    media_root: where image and video paths are relative to; None = text only.
    report: filled while iterating. A refused sample is listed there and left out; nothing takes its place.
    reserved: special tokens; a sample whose text spells one is refused.
    number_duplicates: keep a sample whose id occurred before, as `id#2`, `id#3`, ... (LLaVA's own mixtures repeat
      ids), instead of refusing it.
  Raises:
    DataError: E_NO_SOURCE or E_JSON when the file as a whole cannot be used.
  """
  seen: dict[str, str] = {}
  for place, value in entries(file):
    try:
      record = to_record(value, media_root, reserved, place)
      record['id'] = claim_id(record['id'], place, seen, number_duplicates)
    except DataError as error:
      report.refused.append(error)
      continue
    report.kept += 1
    yield record


def claim_id(name: str, place: str, seen: dict[str, str], number_duplicates: bool) -> str:
  """The id of a good sample, now in `seen` (id -> place). Raises DataError E_DUPLICATE_ID."""
  if name in seen:
    if not number_duplicates:
      raise DataError('E_DUPLICATE_ID', f'{place}: sample {name!r}', f'the id occurred first at {seen[name]}')
    name = next(new for n in itertools.count(2) if (new := f'{name}#{n}') not in seen)
  seen[name] = place
  return name


def to_record(value: Any, media_root: str | os.PathLike | None, reserved: Sequence[str], place: str) -> Record:
  """What `entries` yields -> a record, its media read and decoded once. Raises DataError."""
  if isinstance(value, DataError):
    raise value
  if not isinstance(value, dict):
    code = 'E_JSON' if isinstance(value, _NotAnObject) else 'E_FIELD'
    raise DataError(code, place, f'expected an object; found {_kind(value)}')
  identity = value.get('id')
  if isinstance(identity, int) and not isinstance(identity, bool):
    identity = str(identity)
  if not isinstance(identity, str) or not identity:
    raise DataError('E_FIELD', f'{place}: id', f'expected a string; found {_kind(identity)}')
  where = f'{place}: sample {identity!r}'
  category = value.get('category', '')
  if not isinstance(category, str):
    raise DataError('E_FIELD', f'{where}: category', f'expected a string; found {_kind(category)}')
  conversations = _conversations(value, where)
  paths = {tag: _paths(value, field) for tag, field in ((IMAGE_TAG, 'image'), (VIDEO_TAG, 'video'))}
  if paths[VIDEO_TAG] and not paths[IMAGE_TAG]:
    conversations = [{**turn, 'value': turn['value'].replace(IMAGE_TAG, VIDEO_TAG)} for turn in conversations]
  tags = media_tags(turns_from_llava(conversations, where))
  for tag, kind in ((IMAGE_TAG, 'image'), (VIDEO_TAG, 'video')):
    if tags.count(tag) != len(paths[tag]):
      expected = f'expected {len(paths[tag])} for its {kind}(s)'
      raise DataError('E_IMAGE_TAGS', where, f'found {tags.count(tag)} {tag} tag(s), {expected}')
  _check_text([identity, category, *(turn['value'] for turn in conversations)], reserved, where)
  media = _read_media(tags, paths, media_root, where)
  return {'id': identity, 'category': category, 'media': media, 'conversations': conversations}


def _paths(value: dict[str, Any], field: str) -> list[Any]:
  paths = value.get(field)
  return [] if paths is None else paths if isinstance(paths, list) else [paths]


def _conversations(value: dict[str, Any], where: str) -> list[dict[str, str]]:
  """The turns, checked: strings, roles in order, tags in questions only, at least one answer to learn."""
  if 'conversations' not in value:
    raise DataError('E_FIELD', where, 'expected a list of turns under "conversations"; found no such key')
  conversations = value['conversations']
  bad = [turn for turn in conversations if isinstance(turn, _NotAnObject)] if isinstance(conversations, list) else []
  if bad:
    raise DataError('E_JSON', f'{where}: conversations', bad[0].reason)
  turns = turns_from_llava(conversations, where)
  if all(turn['role'] != 'assistant' for turn in turns):
    raise DataError('E_NO_TARGET', where, 'conversations: expected at least one gpt turn; found none')
  return [{'from': turn['from'], 'value': turn['value']} for turn in conversations]


def _check_text(texts: list[str], reserved: Sequence[str], where: str) -> None:
  for text in texts:
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise DataError('E_FIELD', where, f'character {error.start} of {text[:40]!r} is a lone surrogate') from None
    for token in reserved:
      if token in text:
        raise DataError('E_SPECIAL_TOKEN', where, f'expected no special token in the text; found {token!r}')


def _read_media(
  tags: Sequence[str], paths: dict[str, list[Any]], root: str | os.PathLike | None, where: str
) -> list[bytes]:
  """The n-th path of a kind for the n-th tag of it, decoded once to see that it can be.

  No file is read that is too large, or too much for the record together with those before it.
  """
  rest = {tag: iter(found) for tag, found in paths.items()}
  media: list[bytes] = []
  for tag in tags:
    path = next(rest[tag])
    kind, code, module, check = _KINDS[tag]
    here = f'{where}: {kind} {path!r}'
    if root is None:
      raise DataError(f'E_{code}_MISSING', where, f'names the {kind} {path!r}, and no media root was given')
    try:
      file = resolve_inside(root, path)
    except DataError as error:
      raise DataError(error.code.replace('IMG', code), f'{where}: {kind} {error.where}', error.message) from None
    try:
      size = file.stat().st_size
      module.check_bytes(size, here)
      check_media_bytes(sum(map(len, media)) + size, where)
      data = file.read_bytes()
    except OSError as error:
      raise DataError(f'E_{code}_MISSING', here, f'cannot be read ({error.strerror})') from None
    check(data, here)
    media.append(data)
  return media

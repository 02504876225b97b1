"""Video files, before they are decoded: which container is it, and is the file whole?

Enters: an open file. Leaves: the name of the demuxer to read it with, the only
one that then sees it, so that playlists and other formats that name further
files cannot be reached. MP4/MOV, Matroska/WebM, AVI and GIF.

Demuxers skip what they cannot read and end early without a word, so the parts
of the file are walked first: each must lie within the file, and follow the one
before it. Sources: ISO/IEC 14496-12, RFC 9559 (Matroska) over RFC 8794 (EBML),
Microsoft's RIFF and OpenDML AVI, GIF89a.
"""

from __future__ import annotations

import os
from typing import BinaryIO, NamedTuple

from llava_mini_jax.data.errors import DataError

CONTAINERS = {'mov': 'MP4/MOV', 'matroska': 'Matroska/WebM', 'avi': 'AVI', 'gif': 'GIF'}  # by demuxer
MAX_PARTS = 5_000_000  # 4 hours at 60 frames a second with three tracks of sound have 2.9 million

_BOXES = frozenset(  # at the top of an MP4/MOV file
  b'ftyp styp moov moof mdat free skip wide pnot PICT udta uuid meta mfra sidx ssix prft emsg pdin imda'.split()
)
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_ELEMENTS = {  # all that may lie in a segment or a cluster
  *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367),
  *(0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF),
}


class _Part(NamedTuple):
  """A part of a file: how long, header apart; None = to the end of the file."""

  header: int
  size: int | None
  enter: bool = False  # made of parts itself
  top: bool = False  # the file may end after it, or go on with what is not video


def demuxer_of(file: BinaryIO, where: str) -> str:
  """A key of CONTAINERS, told by content, never by name. The file is left at its start.

  Args:
    file: readable and seekable.
    where: names the video in errors.
  Raises:
    DataError: E_VIDEO_FORMAT none of CONTAINERS; E_VIDEO_TRUNCATED a part goes beyond the end of the file, or no part
      begins where one must; E_VIDEO_TOO_LARGE more than MAX_PARTS.
  """
  length = file.seek(0, os.SEEK_END)
  file.seek(0)
  head = file.read(16)
  if head[4:8] in _BOXES and _box(head) is not None:
    demuxer = 'mov'
    _walk(file, length, _box, where)
  elif head[:4] == _EBML.to_bytes(4):
    demuxer = 'matroska'
    _walk(file, length, _element, where)
  elif head[:4] == b'RIFF' and head[8:11] == b'AVI':
    demuxer = 'avi'
    _walk(file, length, _chunk, where)
  elif head[:6] in (b'GIF87a', b'GIF89a'):
    demuxer = 'gif'
    _walk_gif(file, where)
  else:
    found = f'{length} bytes starting {head[:8]!r}'
    raise DataError('E_VIDEO_FORMAT', where, f'expected {", ".join(CONTAINERS.values())}; found {found}')
  file.seek(0)
  return demuxer


def _walk(file: BinaryIO, length: int, parse, where: str) -> None:
  """`parse` maps the 16 bytes at which a part must begin to a _Part, or to None if none does."""
  at = complete = 0
  for _ in range(MAX_PARTS):
    if at >= length:
      return
    file.seek(at)
    part = parse(file.read(16))
    if part is None:
      if at >= complete:  # what follows the last part is no video
        return
      raise DataError('E_VIDEO_TRUNCATED', where, f'expected a whole video; damaged at byte {at} of {length}')
    end = length if part.size is None else at + part.header + part.size
    if end > length:
      message = f'expected a whole video; its part at byte {at} ends at byte {end}, the file at byte {length}'
      raise DataError('E_VIDEO_TRUNCATED', where, message)
    if part.top:
      complete = end
    at = at + part.header if part.enter else end
  raise DataError('E_VIDEO_TOO_LARGE', where, f'expected at most {MAX_PARTS} parts in the file')


def _box(head: bytes) -> _Part | None:
  size, kind = int.from_bytes(head[:4]), head[4:8]
  header = 16 if size == 1 else 8
  size = int.from_bytes(head[8:16]) if size == 1 else size
  if kind not in _BOXES or 0 < size < header:
    return None
  return _Part(header, size - header if size else None, top=True)


def _element(head: bytes) -> _Part | None:
  ident, width = _number(head, keep_marker=True)
  size, more = _number(head[width:], keep_marker=False)
  if not (width and more) or ident not in (_ELEMENTS | {_EBML, _SEGMENT, _CLUSTER}):
    return None
  unknown = size == (1 << 7 * more) - 1  # all ones: a live recording, written without going back
  enter = ident in (_SEGMENT, _CLUSTER)
  if unknown and not enter:
    return None
  return _Part(width + more, None if unknown else size, enter, top=ident in (_EBML, _SEGMENT))


def _number(head: bytes, *, keep_marker: bool) -> tuple[int, int]:
  """An EBML number, and how many bytes it takes: 0 if none is there."""
  width = 9 - head[0].bit_length() if head else 9
  if width > min(len(head), 8):
    return 0, 0
  value = int.from_bytes(head[:width])
  return value if keep_marker else value & ((1 << 7 * width) - 1), width


def _chunk(head: bytes) -> _Part | None:
  kind, size = head[:4], int.from_bytes(head[4:8], 'little')
  if len(head) < 8 or not all(0x20 <= byte < 0x7F for byte in kind):
    return None
  if kind == b'RIFF':
    return _Part(12, size - 4 if size else None, enter=True, top=True)
  return _Part(12, size - 4, enter=True) if kind == b'LIST' else _Part(8, size + size % 2)


def _walk_gif(file: BinaryIO, where: str) -> None:
  def read(count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
      raise DataError('E_VIDEO_TRUNCATED', where, f'expected a whole video; the file ends at byte {file.tell()}')
    return data

  def colors(flags: int) -> None:
    read(3 << (flags & 7) + 1 if flags & 0x80 else 0)

  file.seek(0)
  colors(read(13)[10])
  while (kind := read(1)) != b';':
    if kind == b',':
      colors(read(9)[8])
    elif kind != b'!':
      message = f'expected a whole video; damaged at byte {file.tell() - 1}'
      raise DataError('E_VIDEO_TRUNCATED', where, message)
    read(1)  # the code size of an image, the label of an extension
    while size := read(1)[0]:
      read(size)

"""Reads the scheduled text of a compiled program (`compiled.as_text()`): instructions, sizes, loops, source lines.

Enters: the text. Leaves: a Module of computations, each a list of Instructions in the order they are scheduled. Only
what a cost model needs is kept; https://openxla.org/xla/operation_semantics explains the operations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8} | {f'{kind}{bits}': bits for kind in 'su' for bits in (2, 4, 8, 16, 32, 64)}
_BITS |= {'f16': 16, 'bf16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128}
_BITS |= dict.fromkeys(('f8e4m3fn', 'f8e5m2', 'f8e4m3', 'f8e4m3b11fnuz', 'f8e8m0fnu'), 8)
_ARRAY = re.compile(rf'\b({"|".join(sorted(_BITS, key=len, reverse=True))})\[([\d,<=]*)\](?:\{{([^}}]*)\}})?')
_HEADER = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.-]+) = ')
_NAME = re.compile(r'%([\w.-]+)')
_COMMENT = re.compile(r'/\*.*?\*/')
_TABLE_ROW = re.compile(r'(\d+) (.*)')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result. space: of memory, 0 = HBM, others are on the core."""

  dtype: str
  shape: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> float:
    """Without the padding of its tiles."""
    return math.prod(self.shape) * _BITS[self.dtype] / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[Array, ...]  # the result, flattened
  operands: tuple[str, ...]  # names
  literal: str  # what stands between the parentheses
  attributes: str  # what follows them
  is_root: bool

  @property
  def bytes(self) -> float:
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> float:
    return sum(array.bytes for array in self.arrays if array.space == 0)

  def called(self, attribute: str = 'calls') -> str | None:
    """The name of a computation: of a fusion (`calls`), of a loop (`body`, `condition`)."""
    found = re.search(rf'\b{attribute}=%([\w.-]+)', self.attributes)
    return found and found.group(1)

  def string(self, key: str) -> str | None:
    """The value of a key of `attributes` that is quoted: `key="value"` or, in a backend's JSON, `"key":"value"`."""
    found = re.search(rf'"?\b{key}"?[=:]"([^"]*)"', self.attributes)
    return found and found.group(1)

  @property
  def group_size(self) -> int:
    """Of a collective: how many devices take part in one group; 0 = the text does not say."""
    groups = self.attributes
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', groups):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
      axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))  # a part of an axis: 'axis':(skipped)size
      return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]', groups):
      return int(found.group(1))
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', groups):
      return found.group(1).count(',') + 1
    return 2 if 'source_target_pairs' in groups else 0


@dataclasses.dataclass(frozen=True)
class Line:
  file: str
  number: int
  function: str


@dataclasses.dataclass(frozen=True)
class Module:
  """computations: by name, instructions in schedule order. entry: the one that runs."""

  computations: dict[str, list[Instruction]]
  entry: str
  _frames: dict[int, tuple[Line, int]]  # id -> line, id of the caller's frame

  @functools.cached_property
  def _by_name(self) -> dict[str, dict[str, Instruction]]:
    return {name: {i.name: i for i in body} for name, body in self.computations.items()}

  def find(self, computation: str, name: str) -> Instruction | None:
    return self._by_name[computation].get(name)

  def parameter(self, computation: str, index: int) -> Instruction | None:
    same = f'{index}'
    return next((i for i in self.computations[computation] if i.opcode == 'parameter' and i.literal == same), None)

  def trip_count(self, loop: Instruction) -> int:
    """How often a `while` runs: what its backend says, else the bound that its condition compares with.

    Raises ValueError for a loop whose bound is not a constant, which a scan's always is.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known.group(1))
    bound = self._bound(loop.called('condition'))
    if bound is None:
      raise ValueError(f'{loop.name}: expected a loop with a constant number of turns; found another')
    return bound

  def _bound(self, condition: str) -> int | None:
    body = self.computations[condition]
    constants = {i.name: int(i.literal) for i in body if i.opcode == 'constant' and re.fullmatch(r'-?\d+', i.literal)}
    for instruction in body:
      if instruction.opcode == 'compare' and 'direction=LT' in instruction.attributes or instruction.opcode == 'fusion':
        found = [constants[name] for name in instruction.operands if name in constants]
        if found:
          return found[0]
        inner = instruction.called()
        if inner and (bound := self._bound(inner)) is not None:
          return bound
    return None

  def source(self, instruction: Instruction, within: str = 'llava_mini_jax/') -> tuple[Line, ...]:
    """The lines of this package that an instruction comes from, innermost first; () = unknown.

    within: the part of a path after which files of the package are named.
    """
    found = re.search(r'stack_frame_id=(\d+)', instruction.attributes)
    frame, lines = int(found.group(1)) if found else 0, []
    while frame in self._frames:
      line, frame = self._frames[frame]
      if within in line.file:
        lines.append(dataclasses.replace(line, file=line.file.rsplit(within, 1)[1]))
    return tuple(lines)


def arrays_in(shape: str) -> tuple[Array, ...]:
  """Every array that a shape's text lists: `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`, or a tuple of such."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(size.lstrip('<=')) for size in dims.split(',') if size)
    found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
  return tuple(found)


def parse(text: str) -> Module:
  """Raises ValueError if the text has no entry computation."""
  computations, entry, current = {}, None, None
  tables: dict[str, dict[int, str]] = {}
  table = None
  for line in _whole_lines(text):
    if not line.startswith(' '):
      if header := _HEADER.match(line):
        current, table = computations.setdefault(header.group(2), []), None
        entry = header.group(2) if header.group(1) else entry
      elif table is not None and (row := _TABLE_ROW.match(line)):
        table[int(row.group(1))] = row.group(2).strip('"')
      elif line.strip() in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
        table = tables.setdefault(line.strip(), {})
    elif current is not None and (instruction := _instruction(line)):
      current.append(instruction)
  if entry is None:
    raise ValueError('HLO text: expected an ENTRY computation; found none')
  return Module(computations, entry, _frames(tables))


def _whole_lines(text: str) -> Iterator[str]:
  """An instruction may go on in further lines, where its attributes quote what a kernel says of itself."""
  waiting: list[str] = []
  for line in text.splitlines():
    if waiting and line.startswith(('"', '}}')):
      waiting.append(line)
      continue
    yield from [''.join(waiting)] if waiting else []
    waiting = [line]
  yield from [''.join(waiting)] if waiting else []


def _instruction(line: str) -> Instruction | None:
  line = _COMMENT.sub('', line) if '/*' in line else line
  start = _INSTRUCTION.match(line)
  if not start:
    return None
  rest = line[start.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  literal = rest[opening + 1 : closing]
  return Instruction(
    name=start.group(2),
    opcode=rest[:opening],
    arrays=arrays_in(shape),
    operands=tuple(_NAME.findall(literal)),
    literal=literal,
    attributes=rest[closing + 1 :],
    is_root=bool(start.group(1)),
  )


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens at `opening` is closed."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found.group() == '(' else -1
    if not depth:
      return found.start()
  raise ValueError(f'HLO text: unbalanced parentheses in {text[:80]!r}')


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[Line, int]]:
  def fields(row: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', row)}

  files, functions = tables.get('FileNames', {}), tables.get('FunctionNames', {})
  locations = {index: fields(row) for index, row in tables.get('FileLocations', {}).items()}
  rows = {index: fields(row) for index, row in tables.get('StackFrames', {}).items()}
  # Some versions print parents one too high, so that the outermost frame seems to be its own.
  shift = int(any(row.get('parent_frame_id') == index for index, row in rows.items()))
  frames = {}
  for index, row in rows.items():
    at = locations[row['file_location_id']]
    line = Line(files[at['file_name_id']], at['line'], functions[at['function_name_id']])
    frames[index] = line, row.get('parent_frame_id', 0) - shift
  return frames

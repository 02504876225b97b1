"""Scenes of 4 to 9 coloured shapes on a dark ground, and questions that only looking answers.

Leaves: records for `train` (a scene with all its questions as one conversation) and `test` (one question each, with its
category). A blind reader is at chance, because answers are drawn and not found:

| category | question | answers, equally likely whatever the question says |
|---|---|---|
| color, shape, size | what color is the large cross? (two of the three properties name one object) | 8, 4, 3 |
| count | how many red things are there? (the answer is drawn, and the scene made to fit) | 0 to 4 |
| more | are there more red or blue things? (never as many) | the two |
| bigger | is the red cross bigger than the blue circle? (never as big) | yes, no |
| relation | is the red cross left of the blue circle? (or right of, above, below; by 4 pixels of 64) | yes, no |
| place | what is in row 2, column 3? (of 4 by 4; asked of every object) | 96, as large red cross |

Colors, shapes and sizes of a scene are drawn independently of each other and of the places, none preferred to another:
to exchange two values, or two objects, changes the answer and neither the question nor its probability.

The same seed gives the same bytes everywhere: the only source of chance is `random.Random.random`, whose sequence
Python guarantees, the rest is integers, and pictures are 4-bit BMP files, which no compressor has touched.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.data.records import Record

COLORS = {
  'red': (220, 40, 40),
  'green': (40, 170, 60),
  'blue': (50, 80, 225),
  'yellow': (235, 220, 50),
  'purple': (150, 50, 190),
  'cyan': (60, 210, 220),
  'orange': (240, 140, 30),
  'white': (240, 240, 240),
}
SHAPES = ('circle', 'square', 'triangle', 'cross')
SIZES = {'small': 3, 'medium': 5, 'large': 7}  # radius in units of a 64th of the picture
VALUES = dict(color=tuple(COLORS), shape=SHAPES, size=tuple(SIZES))
RELATIONS = {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 1), 'below': (1, -1)}  # axis, sign of the difference
CATEGORIES = ('color', 'shape', 'size', 'count', 'more', 'bigger', 'relation', 'place')
FEWEST, MOST, HIGHEST_COUNT = 4, 9, 4
MARGIN = 4  # units between the centres that a relation is asked about
_CELLS, _UNITS = 4, 64  # per side
_ATTRIBUTE_QUESTIONS, _PAIR_QUESTIONS = 2, 2  # most of each category about a scene
_JITTER, _GROUND = 15, (25, 60)  # of each channel


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Which scenes: `train` of them and a tenth as many, at least one, for `test`; pixels per side."""

  train: int = 20_000
  seed: int = 0
  pixels: int = _UNITS

  def __post_init__(self):
    if self.train < 1:
      raise ConfigError(f'scenes: expected a positive number; found {self.train}')
    if self.pixels < _UNITS or self.pixels % _UNITS:
      raise ConfigError(f'scene_pixels: expected a multiple of {_UNITS}; found {self.pixels}')

  @property
  def description(self) -> str:
    return f'scenes of coloured shapes, {self.pixels} pixels a side, seed {self.seed}, with balanced questions'


@dataclasses.dataclass(frozen=True)
class Thing:
  color: str
  shape: str
  size: str
  center: tuple[int, int]  # x, y in units of a 64th of the picture


@dataclasses.dataclass(frozen=True)
class Question:
  category: str
  text: str
  answer: str


class _Chance:
  """Integers out of `random.random` alone: the other methods of `random` may change between versions of Python."""

  def __init__(self, name: str):
    self._random = random.Random(name).random

  def below(self, count: int) -> int:
    return int(self._random() * count)

  def between(self, low: int, high: int) -> int:
    return low + self.below(high - low + 1)

  def order(self, items: Sequence[Any]) -> list[Any]:
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
      other = self.below(last + 1)
      items[last], items[other] = items[other], items[last]
    return items

  def one(self, items: Sequence[Any]) -> Any:
    return items[self.below(len(items))]


def splits(scenes: Scenes) -> dict[str, Iterator[Record]]:
  """`train` and `test`, each scene from a seed of its own."""
  return {
    'train': (_conversation(name, *scene(name, scenes)) for name in _names(scenes, 'train', scenes.train)),
    'test': (
      record
      for name in _names(scenes, 'test', max(1, scenes.train // 10))
      for record in _questions_apart(name, *scene(name, scenes))
    ),
  }


def scene(name: str, scenes: Scenes) -> tuple[bytes, list[Question]]:
  """The picture, a BMP file, and the questions of the scene of that name."""
  chance = _Chance(name)
  things, counted = _things(chance)
  return _picture(things, chance, scenes.pixels), _questions(things, counted, chance)


def _names(scenes: Scenes, split: str, count: int) -> Iterator[str]:
  return (f'{scenes.seed}-{split}-{index}' for index in range(count))


def _things(chance: _Chance) -> tuple[list[Thing], dict[str, tuple[str, int]]]:
  """Objects in random cells; and by property a value with the number of objects that have it, drawn before them."""
  count = chance.between(FEWEST, MOST)
  columns, counted = {}, {}
  for name, values in VALUES.items():
    value, having = chance.one(values), chance.between(0, HIGHEST_COUNT)
    others = [other for other in values if other != value]
    columns[name] = chance.order([value] * having + [chance.one(others) for _ in range(count - having)])
    counted[name] = value, having
  cell = _UNITS // _CELLS
  things = []
  for index, place in enumerate(chance.order(range(_CELLS**2))[:count]):
    color, shape, size = (columns[name][index] for name in VALUES)
    radius = SIZES[size]
    corner = (place % _CELLS * cell, place // _CELLS * cell)
    center = tuple(at + chance.between(radius, cell - 2 - radius) for at in corner)  # a unit of ground between two
    things.append(Thing(color, shape, size, center))
  return things, counted


def _picture(things: Sequence[Thing], chance: _Chance, pixels: int) -> bytes:
  scale = pixels // _UNITS
  y, x = np.mgrid[:pixels, :pixels]
  image = np.zeros((pixels, pixels), np.uint8)
  palette = [(chance.between(*_GROUND),) * 3]
  for number, thing in enumerate(things, 1):
    palette.append(tuple(min(255, max(0, c + chance.between(-_JITTER, _JITTER))) for c in COLORS[thing.color]))
    center = [at * scale + scale // 2 for at in thing.center]
    image[_covers(thing.shape, x - center[0], y - center[1], SIZES[thing.size] * scale)] = number
  return _bmp(image, palette)


def _covers(shape: str, x: np.ndarray, y: np.ndarray, radius: int) -> np.ndarray:
  """bool: which offsets from the centre a shape covers."""
  box = (abs(x) <= radius) & (abs(y) <= radius)
  if shape == 'circle':
    return x * x + y * y <= radius * (radius + 1)
  if shape == 'triangle':
    return box & (2 * abs(x) <= y + radius)
  if shape == 'cross':
    return box & (np.minimum(abs(x), abs(y)) <= radius // 3)
  return box


def _bmp(image: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> bytes:
  """uint8[h w] of colour numbers below 16 -> a BMP file; h w even, w a multiple of 8. Bottom row first."""
  height, width = image.shape
  table = b''.join(bytes((blue, green, red, 0)) for red, green, blue in palette).ljust(16 * 4, b'\0')
  rows = image[::-1]
  data = (rows[:, 0::2] << 4 | rows[:, 1::2]).astype(np.uint8).tobytes()
  start = 14 + 40 + len(table)
  head = struct.pack('<2sIHHI', b'BM', start + len(data), 0, 0, start)
  return head + struct.pack('<IiiHHIIiiII', 40, width, height, 1, 4, 0, len(data), 2835, 2835, 16, 0) + table + data


def _questions(things: Sequence[Thing], counted: dict[str, tuple[str, int]], chance: _Chance) -> list[Question]:
  asked = []
  for name in VALUES:
    candidates = chance.order(_named_by(things, tuple(other for other in ('size', 'color', 'shape') if other != name)))
    for thing in candidates[:_ATTRIBUTE_QUESTIONS]:
      asked.append(Question(name, _ask(name, thing), getattr(thing, name)))
  for name, (value, count) in counted.items():
    asked.append(Question('count', f'how many {_several(name, value)} are there?', str(count)))
  asked += _more(things, chance)
  named = _named_by(things, ('color', 'shape'))
  pairs = chance.order(list(itertools.permutations(named, 2)))
  sizes = list(SIZES)

  def bigger(a: Thing, b: Thing) -> Question | None:
    if a.size == b.size:
      return None
    return _yes_or_no('bigger', a, 'bigger than', b, sizes.index(a.size) > sizes.index(b.size))

  def relation(a: Thing, b: Thing) -> Question | None:
    words, (axis, sign) = chance.one(list(RELATIONS.items()))
    distance = sign * (b.center[axis] - a.center[axis])
    return None if abs(distance) < MARGIN else _yes_or_no('relation', a, words, b, distance > 0)

  return chance.order(asked + _first(bigger, pairs) + _first(relation, chance.order(pairs)) + _places(things))


def _places(things: Sequence[Thing]) -> list[Question]:
  """What every object is, asked by the cell of the grid that it is in."""
  cell = _UNITS // _CELLS
  asked = []
  for thing in things:
    column, row = (at // cell + 1 for at in thing.center)
    answer = f'{thing.size} {thing.color} {thing.shape}'
    asked.append(Question('place', f'what is in row {row}, column {column}?', answer))
  return asked


def _first(ask: Callable[[Thing, Thing], Question | None], pairs: Sequence[tuple[Thing, Thing]]) -> list[Question]:
  found = (question for a, b in pairs if (question := ask(a, b)))
  return list(itertools.islice(found, _PAIR_QUESTIONS))


def _more(things: Sequence[Thing], chance: _Chance) -> list[Question]:
  """One question about colors and one about shapes, where two values are there in different numbers."""
  asked = []
  for name in ('color', 'shape'):
    have = [getattr(thing, name) for thing in things]
    for a, b in chance.order(list(itertools.permutations(VALUES[name], 2))):
      if have.count(a) != have.count(b):
        winner = a if have.count(a) > have.count(b) else b
        if name == 'shape':
          a, b, winner = _plural(a), _plural(b), _plural(winner)
        asked.append(Question('more', f'are there more {a} or {b}{" things" * (name == "color")}?', winner))
        break
  return asked


def _named_by(things: Sequence[Thing], names: Sequence[str]) -> list[Thing]:
  """Those that no other shares these properties with."""
  keys = [tuple(getattr(thing, name) for name in names) for thing in things]
  return [thing for thing, key in zip(things, keys, strict=True) if keys.count(key) == 1]


def _ask(name: str, thing: Thing) -> str:
  if name == 'color':
    return f'what color is the {thing.size} {thing.shape}?'
  if name == 'shape':
    return f'what shape is the {thing.size} {thing.color} thing?'
  return f'what size is the {thing.color} {thing.shape}?'


def _yes_or_no(category: str, a: Thing, words: str, b: Thing, holds: bool) -> Question:
  text = f'is the {a.color} {a.shape} {words} the {b.color} {b.shape}?'
  return Question(category, text, 'yes' if holds else 'no')


def _plural(shape: str) -> str:
  return f'{shape}es' if shape.endswith('s') else f'{shape}s'


def _several(name: str, value: str) -> str:
  return _plural(value) if name == 'shape' else f'{value} things'


def _conversation(name: str, picture: bytes, questions: Sequence[Question]) -> Record:
  turns = [turn for question in questions for turn in _turns(question.text, question.answer)]
  turns[0]['value'] = f'{IMAGE_TAG}\n{turns[0]["value"]}'
  return {'id': name, 'category': '', 'media': [picture], 'conversations': turns}


def _questions_apart(name: str, picture: bytes, questions: Sequence[Question]) -> Iterator[Record]:
  for number, question in enumerate(questions):
    turns = _turns(f'{IMAGE_TAG}\n{question.text}', question.answer)
    yield {'id': f'{name}-{number}', 'category': question.category, 'media': [picture], 'conversations': turns}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
  return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]

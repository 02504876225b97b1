"""Generated scenes: balanced, answered rightly, and the same bytes everywhere."""

from __future__ import annotations

import collections
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import records, scenes
from llava_mini_jax.data.branches import one_question_each, share_prefix
from llava_mini_jax.data.conversation import encode, load_template, turns_from_llava
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.scenes import CATEGORIES, COLORS, RELATIONS, SIZES, Scenes
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.recipes import SCENE_TEXT

CHANCE = dict(color=1 / 8, shape=1 / 4, size=1 / 3, count=1 / 5, more=1 / 2, bigger=1 / 2, relation=1 / 2, place=1 / 96)
WIDTHS = {2 * radius + 1: size for size, radius in SIZES.items()}


def seen(picture: bytes) -> list[dict]:
  """What a picture of 64 pixels shows, found again without the generator: each object is one colour and one piece."""
  image = np.asarray(load_image(picture, 'scene')).astype(int)
  ground = image[0, 15]  # the sixteenth column of a cell is empty
  found = []
  for color in np.unique(image.reshape(-1, 3), axis=0):
    if (color == ground).all():
      continue
    rows, columns = np.nonzero((image == color).all(-1))
    box = (image == color).all(-1)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.shape[0] == box.shape[1]
    name = min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - color).sum())
    corners, middle = box[[0, 0, -1, -1], [0, -1, 0, -1]].sum(), len(box) // 2
    edge = int(box[0].sum())
    shape = 'square' if corners == 4 else 'triangle' if corners == 2 else None
    shape = shape or ('cross' if not box[middle // 2, middle // 2] else 'circle')
    assert edge
    center = columns.min() + middle, rows.min() + middle
    found.append(dict(color=name, shape=shape, size=WIDTHS[len(box)], center=center))
  return found


def answer(question: str, things: list[dict]) -> str:
  """Of a reader of the picture, in its own words."""
  if match := re.fullmatch(r'what (\w+) is the (\w+) (\w+)(?: thing)?\?', question):
    values = set(match.groups()[1:])
    (thing,) = [t for t in things if values <= {t['color'], t['shape'], t['size'], 'thing'}]
    return thing[match.group(1)]
  if match := re.fullmatch(r'what is in row (\d), column (\d)\?', question):
    (thing,) = [t for t in things if [str(at // 16 + 1) for at in t['center'][::-1]] == list(match.groups())]
    return f'{thing["size"]} {thing["color"]} {thing["shape"]}'
  if match := re.fullmatch(r'how many (\w+)(?: things)? are there\?', question):
    return str(number(match.group(1), things))
  if match := re.fullmatch(r'are there more (\w+) or (\w+)(?: things)?\?', question):
    return max(match.groups(), key=lambda word: number(word, things))
  match = re.fullmatch(r'is the (\w+) (\w+) (bigger than|left of|right of|above|below) the (\w+) (\w+)\?', question)
  a, b = (
    next(t for t in things if (t['color'], t['shape']) == pair) for pair in (match.groups()[:2], match.groups()[3:])
  )
  (ax, ay), (bx, by) = a['center'], b['center']
  sizes = list(SIZES)
  holds = {
    'bigger than': sizes.index(a['size']) > sizes.index(b['size']),
    'left of': ax < bx,
    'right of': ax > bx,
    'above': ay < by,
    'below': ay > by,
  }
  return 'yes' if holds[match.group(3)] else 'no'


def number(word: str, things: list[dict]) -> int:
  names = {word, word.removesuffix('s'), word.removesuffix('es')}
  return sum(bool(names & {t['color'], t['shape'], t['size']}) for t in things)


def pairs(record) -> list[tuple[str, str]]:
  values = [turn['value'].removeprefix('<image>\n') for turn in record['conversations']]
  return list(zip(values[::2], values[1::2], strict=True))


def test_the_answers_are_what_the_pictures_show():
  checked = collections.Counter()
  for split in scenes.splits(Scenes(300, seed=1)).values():
    for record in split:
      things = seen(record['media'][0])
      assert 4 <= len(things) <= 9
      for question, truth in pairs(record):
        assert answer(question, things) == truth, (record['id'], question)
        checked[question.split()[0]] += 1
  assert set(checked) == {'what', 'how', 'are', 'is'} and min(checked.values()) > 300


def category(question: str) -> str:
  words = question.split()
  if words[0] == 'what':
    return 'place' if words[1] == 'is' else words[1]
  if words[0] == 'how':
    return 'count'
  return 'more' if words[0] == 'are' else 'bigger' if 'bigger' in words else 'relation'


@pytest.fixture(scope='module')
def many():
  """(category, question, answer) of each split; no pictures are looked at."""
  found = scenes.splits(Scenes(6_000, seed=0))
  return {name: [(category(q), q, a) for record in split for q, a in pairs(record)] for name, split in found.items()}


def test_each_answer_is_equally_likely(many):
  for kind in CATEGORIES:
    answers = collections.Counter(a for k, _, a in many['train'] if k == kind)
    groups = [list(answers)] if kind != 'more' else [list(COLORS), ['circles', 'squares', 'triangles', 'crosses']]
    assert sum(map(len, groups)) == len(answers)
    assert kind == 'more' or len(answers) == round(1 / CHANCE[kind])
    for group in groups:
      total = sum(answers[a] for a in group)
      for a in group:
        assert abs(answers[a] / total - 1 / len(group)) < min(0.02, 0.3 / len(group)), (kind, a)


def test_a_blind_reader_is_near_chance(many):
  """The most frequent training answer to each question, word by word, on the held-out questions."""
  best = collections.defaultdict(collections.Counter)
  for _, question, truth in many['train']:
    best[question][truth] += 1
  for kind in CATEGORIES:
    asked = [(q, a) for k, q, a in many['test'] if k == kind]
    right = sum(bool(best[q]) and best[q].most_common(1)[0][0] == a for q, a in asked) / len(asked)
    bound = 4 * (CHANCE[kind] * (1 - CHANCE[kind]) / len(asked)) ** 0.5  # of a coin that is thrown so often
    assert abs(right - CHANCE[kind]) < bound < 0.065, (kind, right)


def test_every_relation_and_category_is_asked_about(many):
  for words in RELATIONS:
    assert sum(words in q for _, q, _ in many['test']) > 150
  assert {k for k, _, _ in many['test']} == set(CATEGORIES) == set(CHANCE)


def digest(settings: Scenes) -> str:
  found = hashlib.sha256()
  for split in scenes.splits(settings).values():
    for record in split:
      found.update(repr(record).encode())
  return found.hexdigest()[:16]


def test_the_same_bytes_for_the_same_seed():
  """What other machines and versions must give too."""
  assert digest(Scenes(50)) == 'e573c8088219a8d9'
  assert digest(Scenes(50)) != digest(Scenes(50, seed=1))
  both = [next(iter(scenes.splits(Scenes(n))['train'])) for n in (1, 50)]
  assert both[0] == both[1]  # a larger set begins with the smaller one


def test_larger_pictures_show_the_same_scene():
  small, large = (scenes.scene('0-test-3', Scenes(pixels=pixels)) for pixels in (64, 192))
  assert small[1] == large[1]
  image = Image.open(io.BytesIO(large[0]))
  assert image.size == (192, 192)
  reduced = np.asarray(image.convert('RGB'))[1::3, 1::3]
  original = np.asarray(load_image(small[0], 'scene'))
  assert (reduced == original).all(-1).mean() > 0.98  # edges of circles and triangles differ


def test_the_questions_about_a_scene_fit_a_row_of_the_sweeps(tmp_path):
  """Those of the scene with the most words; the tokenizer is that of the dataset."""
  prepare(['scenes'], tmp_path, scenes=Scenes(200))
  split, tokenizer = records.open_split(tmp_path, 'train'), load_tokenizer(tmp_path / 'tokenizer')
  record = max((split[i] for i in range(200)), key=lambda record: sum(len(q) + len(a) for q, a in pairs(record)))
  questions = one_question_each(turns_from_llava(record['conversations'], 'scene'))
  assert len(questions) == 24  # as many as there can be
  apart = [encode(tokenizer, load_template('qa'), one) for one in questions]
  tokens, _ = share_prefix(apart, 'scene')
  assert SCENE_TEXT - 16 < len(tokens.ids) <= SCENE_TEXT


def test_prepared(tmp_path):
  summary = prepare(['scenes'], tmp_path / 'out', scenes=Scenes(20, seed=3), tokenizer_vocab_size=512)
  train, test = (records.open_split(tmp_path / 'out', name) for name in ('train', 'test'))
  assert summary['splits']['train'] == dict(records=20, refused=0, source='scenes')
  assert [train[i] for i in range(20)] == list(scenes.splits(Scenes(20, seed=3))['train'])
  assert summary['splits']['test']['records'] == len(test) and test[0]['category'] in CATEGORIES


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: Scenes(0), 'scenes: expected a positive number; found 0'),
    (lambda: Scenes(pixels=100), 'scene_pixels: expected a multiple of 64; found 100'),
    (
      lambda: prepare(['scenes'], 'out', splits=['a'], media_roots=['x']),
      'source: scenes brings its own splits and images; expected no split and no media root',
    ),
  ],
)
def test_refused(build, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises((ConfigError, DataError)) as error:
    build()
  assert str(error.value) == message

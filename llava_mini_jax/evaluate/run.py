"""Asks every question of a split and scores the answers.

`images` shows whether the model looks: `real`; `blank` replaces every image by
the mean colour; `swapped` gives every question the images of another record, of
the first from half the split away that has as many, and other ones.

With several processes each reads the questions of the rows that its devices
hold; the first gathers and writes what all of them found.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from llava_mini_jax.config import require_choice
from llava_mini_jax.data.conversation import MEDIA_TAG, turns_from_llava
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import PAD_COLOR
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.records import Record, Split, open_split
from llava_mini_jax.distributed import is_writer, texts_of_all
from llava_mini_jax.evaluate.contact_sheet import contact_sheet
from llava_mini_jax.evaluate.exact_match import accuracy, is_match
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.prompts import Prompt

IMAGES = ('real', 'blank', 'swapped')


@dataclasses.dataclass(frozen=True)
class Question:
  prompt: Prompt
  truth: str
  category: str

  @property
  def text(self) -> str:
    return MEDIA_TAG.sub('', self.prompt.turns[-1]['content']).strip()


def evaluate(
  answerer: Answerer,
  dataset: Path,
  split: str,
  out: Path,
  *,
  images: str = 'real',
  batch_size: int = 256,
  limit: int = 0,
  sheet: int = 32,
) -> dict[str, Any]:
  """Writes `answers_{images}.json` (summary and every answer) and `contact_sheet_{images}.png` under `out`.

  With a `limit` their names end with `_first_{limit}`.

  Args:
    images: one of IMAGES. limit: ask only the first so many; 0 = all. sheet: images on the contact sheet.
  Returns:
    The summary: what was asked, with which changes of the experiment (`Loaded.changes`), and `exact_match.accuracy`.
  Raises:
    DataError, ConfigError, MeshError.
  """
  require_choice('images', images, IMAGES)
  records = open_split(dataset, split)
  count = min(limit or len(records), len(records))
  chosen = {int(i) for i in np.linspace(0, count - 1, min(sheet, count))}  # a split sorted by image shows many
  questions = _Questions(records, count, images, answerer.encoder.media, chosen)
  bar = tqdm.tqdm(
    answerer.answers(questions, batch_size=batch_size),
    total=count,
    unit='question',
    desc=f'{images} images',
    disable=not is_writer(),
  )
  answers = list(bar)
  asked = _gathered(questions.asked)
  rows = [asked[i] | dict(answer=a, correct=is_match(a, asked[i]['truth'])) for i, a in enumerate(answers)]
  run = answerer.run
  summary = dict(images=images, split=split, step=run.step, changes=list(run.changes), **accuracy(rows))
  if not is_writer():
    return summary
  out.mkdir(parents=True, exist_ok=True)
  name = images if count == len(records) else f'{images}_first_{count}'
  (out / f'answers_{name}.json').write_text(json.dumps(dict(summary=summary, answers=rows), indent=1) + '\n')
  for index in chosen - questions.asked.keys():
    questions[index]  # which another process has read
  if pictures := dict(sorted(questions.pictures.items())):
    title = f'{summary["accuracy"]:.1%} exact match on {count:,} questions, {images} images'
    contact_sheet(list(pictures.values()), [rows[i] for i in pictures], out / f'contact_sheet_{name}.png', title=title)
  return summary


class _Questions(Sequence):
  """The prompts of the first `count` records, read when they are asked for.

  Attributes:
    asked: by index what is written of a question, of those that were read. pictures: the first image of `chosen` ones.
  """

  def __init__(self, records: Split, count: int, images: str, media: MediaProcessor, chosen: set[int]):
    self._records, self._count, self._images, self._media, self._chosen = records, count, images, media, chosen
    self.asked: dict[int, dict[str, str]] = {}
    self.pictures: dict[int, np.ndarray] = {}

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Prompt:
    question = _question(self._records, index, self._images, self._media)
    prompt = question.prompt
    self.asked[index] = dict(id=prompt.name, category=question.category, question=question.text, truth=question.truth)
    if index in self._chosen and prompt.media:
      self.pictures[index] = prompt.media[0][0]
    return prompt


def _gathered(own: Mapping[int, dict[str, str]]) -> Mapping[int, dict[str, str]]:
  """What all processes have, by index, on each of them."""
  parts = map(json.loads, texts_of_all(json.dumps(own)))
  return {int(index): row for part in parts for index, row in part.items()}


def _question(records: Split, index: int, images: str, media: MediaProcessor) -> Question:
  """The last question of a record, after the turns before it."""
  record = records[index]
  turns = turns_from_llava(record['conversations'], record['id'])
  if turns[-1]['role'] != 'assistant':
    raise DataError('E_NO_TARGET', f'sample {record["id"]!r}', 'expected an answer to compare with; found none')
  shown = _partner(records, index, record) if images == 'swapped' and record['media'] else record
  where = f'sample {shown["id"]!r}'
  visuals = media.read_record(turns_from_llava(shown['conversations'], where), shown['media'], where)
  if images == 'blank':
    visuals = [[np.broadcast_to(np.array(PAD_COLOR, np.uint8), v.shape) for v in some] for some in visuals]
  return Question(Prompt(turns[:-1], visuals, record['id']), turns[-1]['content'], record['category'])


def _partner(records: Split, index: int, own: Record) -> Record:
  """The record whose images stand for those of record `index`. Raises DataError E_NO_SWAP if there is none."""
  count = len(records)
  for step in range(count):
    other = records[(index + count // 2 + step) % count]
    if len(other['media']) == len(own['media']) and other['media'] != own['media']:
      return other
  raise DataError('E_NO_SWAP', f'sample {own["id"]!r}', 'expected a record with as many images, and other ones')


def describe(summary: dict[str, Any]) -> str:
  """The summary as a short table."""
  lines = [f'{summary["images"]:8} images   exact match {summary["accuracy"]:7.2%} of {summary["count"]:,} questions']
  lines += [
    f'  {name:20} {part["accuracy"]:7.2%} of {part["count"]:,}' for name, part in summary['by_category'].items()
  ]
  return '\n'.join(lines)

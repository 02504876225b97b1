"""Asks every question of a split and scores the answers.

`images` shows whether the model looks: `real`; `blank` replaces every image by
the mean colour; `swapped` gives every question the image of another record half
the split away.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from llava_mini_jax.config import require_choice
from llava_mini_jax.data.conversation import IMAGE_TAG, turns_from_llava
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import PAD_COLOR, load_image
from llava_mini_jax.data.records import Split, open_split
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
    return self.prompt.turns[-1]['content'].replace(IMAGE_TAG, '').strip()


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

  Args:
    images: one of IMAGES. limit: ask only the first so many; 0 = all. sheet: images on the contact sheet.
  Returns:
    The summary: see `exact_match.accuracy`.
  Raises:
    DataError, ConfigError, MeshError.
  """
  require_choice('images', images, IMAGES)
  records = open_split(dataset, split)
  count = min(limit or len(records), len(records))
  questions = [_question(records, index, count, images) for index in range(count)]
  prompts = [question.prompt for question in questions]
  rows = []
  bar = tqdm.tqdm(
    answerer.answers(prompts, batch_size=batch_size), total=count, unit='question', desc=f'{images} images'
  )
  for question, answer in zip(questions, bar, strict=True):
    rows.append(
      dict(
        id=question.prompt.name,
        category=question.category,
        question=question.text,
        answer=answer,
        truth=question.truth,
        correct=is_match(answer, question.truth),
      )
    )
  summary = dict(images=images, split=split, step=answerer.run.step, **accuracy(rows))
  out.mkdir(parents=True, exist_ok=True)
  (out / f'answers_{images}.json').write_text(json.dumps(dict(summary=summary, answers=rows), indent=1) + '\n')
  _draw(questions, rows, summary, out / f'contact_sheet_{images}.png', sheet)
  return summary


def _question(records: Split, index: int, count: int, images: str) -> Question:
  """The last question of a record, after the turns before it."""
  record = records[index]
  turns = turns_from_llava(record['conversations'], record['id'])
  if turns[-1]['role'] != 'assistant':
    raise DataError('E_NO_TARGET', f'sample {record["id"]!r}', 'expected an answer to compare with; found none')
  shown = records[(index + count // 2) % count] if images == 'swapped' else record
  pictures = [np.asarray(load_image(data, f'sample {shown["id"]!r}')) for data in shown['images']]
  if images == 'blank':
    pictures = [np.broadcast_to(np.array(PAD_COLOR, np.uint8), picture.shape) for picture in pictures]
  return Question(Prompt(turns[:-1], pictures, record['id']), turns[-1]['content'], record['category'])


def _draw(questions: list[Question], rows: list[dict], summary: dict, out: Path, sheet: int) -> None:
  """Evenly spaced samples, so that a split sorted by image shows many images."""
  with_image = [i for i, question in enumerate(questions) if question.prompt.images]
  chosen = [with_image[i] for i in np.linspace(0, len(with_image) - 1, min(sheet, len(with_image))).astype(int)]
  if not chosen:
    return
  title = f'{summary["accuracy"]:.1%} exact match on {summary["count"]:,} questions, {summary["images"]} images'
  contact_sheet([questions[i].prompt.images[0] for i in chosen], [rows[i] for i in chosen], out, title=title)


def describe(summary: dict[str, Any]) -> str:
  """The summary as a short table."""
  lines = [f'{summary["images"]:8} images   exact match {summary["accuracy"]:7.2%} of {summary["count"]:,} questions']
  lines += [
    f'  {name:20} {part["accuracy"]:7.2%} of {part["count"]:,}' for name, part in summary['by_category'].items()
  ]
  return '\n'.join(lines)

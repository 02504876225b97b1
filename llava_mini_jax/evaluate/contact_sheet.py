"""A picture of sampled images, each with its question, the model's answer and the truth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

RIGHT, WRONG = '#1a7f37', '#c62828'
_CELL, _IMAGE, _LINE, _TITLE = 1.75, 1.5, 0.145, 0.4  # inches
_WIDTH, _MOST = 22, 5  # characters of a line; lines above and below an image, at most


def contact_sheet(
  images: Sequence[np.ndarray], rows: Sequence[dict], out: Path, *, title: str, columns: int = 8
) -> None:
  """images uint8[h w 3] and rows of {question, answer, truth, correct} -> PNG. Long texts end in an ellipsis."""
  questions, answers = [_wrapped(row['question']) for row in rows], [_answer(row) for row in rows]
  above, below = (
    _LINE * (1 + max((text.count('\n') + 1 for text in texts), default=1)) for texts in (questions, answers)
  )
  tall, lines = above + _IMAGE + below, -(-len(images) // columns)
  wide, high = _CELL * columns, tall * lines + _TITLE
  figure = Figure(figsize=(wide, high))
  for number, (image, row, question, answer) in enumerate(zip(images, rows, questions, answers, strict=False)):
    left, top = _CELL * (number % columns) + 0.1, high - _TITLE - tall * (number // columns) - above
    axis = figure.add_axes((left / wide, (top - _IMAGE) / high, _IMAGE / wide, _IMAGE / high))
    axis.axis('off')
    axis.imshow(image, interpolation='nearest')
    axis.set_anchor('NW')
    axis.set_title(question, fontsize=8, loc='left', pad=3, parse_math=False)
    color = RIGHT if row['correct'] else WRONG
    style = dict(fontsize=8, color=color, va='top', weight='bold', parse_math=False)
    axis.annotate(answer, (0, 0), (0, -3), 'axes fraction', 'offset points', **style)
  figure.suptitle(title, fontsize=11, y=1 - 0.1 / high, va='top', parse_math=False)
  figure.savefig(out, dpi=110)


def _answer(row: dict) -> str:
  if row['correct']:
    return _wrapped(row['answer'])
  truth = f'(truth: {row["truth"]})'
  return f'{_wrapped(row["answer"] or "(nothing)")}\n{_wrapped(truth)}'


def _wrapped(text: str) -> str:
  return '\n'.join(textwrap.wrap(text, _WIDTH, max_lines=_MOST, placeholder=' …'))

"""A picture of sampled images, each with its question, the model's answer and the truth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

RIGHT, WRONG = '#1a7f37', '#c62828'


def contact_sheet(
  images: Sequence[np.ndarray], rows: Sequence[dict], out: Path, *, title: str, columns: int = 8
) -> None:
  """images uint8[h w 3] and rows of {question, answer, truth, correct} -> PNG."""
  lines = -(-len(images) // columns)
  figure = Figure(figsize=(1.75 * columns, 2.35 * lines), layout='constrained')
  axes = figure.subplots(lines, columns)
  for axis in np.ravel(axes):
    axis.axis('off')
  for axis, image, row in zip(np.ravel(axes), images, rows, strict=False):
    axis.imshow(image, interpolation='nearest')
    axis.set_title('\n'.join(textwrap.wrap(row['question'], 22)), fontsize=8, loc='left')
    color = RIGHT if row['correct'] else WRONG
    text = row['answer'] if row['correct'] else f'{row["answer"] or "(nothing)"}  (truth: {row["truth"]})'
    axis.text(0.0, -0.04, text, fontsize=9, color=color, va='top', transform=axis.transAxes, weight='bold')
  figure.suptitle(title, fontsize=11)
  figure.savefig(out, dpi=110)

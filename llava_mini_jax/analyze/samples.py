"""A prepared split -> a contact sheet: pictures from all of it, each with the last question about it and the answer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from llava_mini_jax.data.conversation import MEDIA_TAG, turns_from_llava
from llava_mini_jax.data.images import load_image
from llava_mini_jax.data.records import open_split
from llava_mini_jax.evaluate.contact_sheet import contact_sheet


def sample_sheet(dataset: str | os.PathLike, split: str, out: Path, *, count: int = 32) -> None:
  """Writes a PNG of up to `count` records with an image. Raises DataError as `records.open_split`."""
  records = open_split(dataset, split)
  images, rows = [], []
  for index in sorted({int(i) for i in np.linspace(0, len(records) - 1, min(count, len(records)))}):
    record = records[index]
    if not record['media']:
      continue
    *_, question, answer = turns_from_llava(record['conversations'], record['id'])
    images.append(np.asarray(load_image(record['media'][0], record['id'])))
    text = MEDIA_TAG.sub('', question['content']).strip()
    rows.append(dict(question=text, answer=answer['content'], truth=answer['content'], correct=True))
  contact_sheet(images, rows, out, title=f'{len(images)} of {len(records):,} records of the split {split}')

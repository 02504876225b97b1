"""Files that are too large are refused by their size, unread; one limit holds for a video and for a record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_run import picture

from llava_mini_jax.data import images, records, video
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image
from llava_mini_jax.data.sources import Report, read_llava


def sparse(path: Path, size: int) -> None:
  """A file of that size that takes no room on the disk."""
  with path.open('wb') as file:
    os.truncate(file.fileno(), size)


def refusals(root: Path, *samples: dict) -> tuple[list[str], list[str]]:
  """Ids of the records, and the refusals without where the file lies."""
  found = []
  for i, sample in enumerate(samples):
    (paths,) = sample.values()
    turns = [{'from': 'human', 'value': '<image>' * len(paths)}, {'from': 'gpt', 'value': 'yes'}]
    found.append(dict(id=str(i), conversations=turns, **sample))
  (root / 'all.json').write_text(json.dumps(found))
  report = Report()
  kept = [record['id'] for record in read_llava(root / 'all.json', root, report)]
  return kept, [str(error).replace(f'{root}/all.json: ', '') for error in report.refused]


def test_too_large_files_are_not_read(tmp_path, monkeypatch):
  sparse(tmp_path / 'large.png', images.MAX_BYTES + 1)
  sparse(tmp_path / 'large.mp4', video.MAX_BYTES + 1)
  (tmp_path / 'red.png').write_bytes(picture('red'))
  read, read_bytes = [], Path.read_bytes
  monkeypatch.setattr(Path, 'read_bytes', lambda path: read.append(path.name) or read_bytes(path))
  kept, refused = refusals(tmp_path, dict(image=['large.png']), dict(image=['red.png']), dict(video=['large.mp4']))
  assert kept == ['1'] and read == ['red.png']
  assert refused == [
    f"E_{code}_TOO_LARGE: record {i}: sample '{i}': {kind} 'large.{end}': "
    f'expected at most {most} bytes; found {most + 1}'
    for i, kind, code, end, most in (
      (0, 'image', 'IMG', 'png', 256 * 2**20),
      (2, 'video', 'VIDEO', 'mp4', 2**31 - 2**20),
    )
  ]


def test_what_a_record_does_not_hold_is_refused_as_a_sample(tmp_path, monkeypatch):
  """The rest of the file is prepared; the second image is not read."""
  data = picture('red')
  for name in 'ab':
    (tmp_path / f'{name}.png').write_bytes(data)
  monkeypatch.setattr(records, 'MAX_MEDIA_BYTES', 2 * len(data) - 1)
  kept, refused = refusals(tmp_path, dict(image=['a.png', 'b.png']), dict(image=['a.png']))
  found = f'expected media of at most {2 * len(data) - 1} bytes in all; found {2 * len(data)}'
  assert (kept, refused) == (['1'], [f"E_TOO_LARGE: record 0: sample '0': {found}"])


def test_a_video_may_fill_a_record():
  assert video.MAX_BYTES == records.MAX_MEDIA_BYTES < 2**31


def test_bytes_that_are_too_many(monkeypatch):
  """As a file: what a record holds is not decoded either."""
  data = picture('red')
  monkeypatch.setattr(images, 'MAX_BYTES', len(data) - 1)
  with pytest.raises(DataError) as error:
    load_image(data, 's7')
  assert str(error.value) == f'E_IMG_TOO_LARGE: s7: expected at most {len(data) - 1} bytes; found {len(data)}'
  monkeypatch.setattr(images, 'MAX_BYTES', len(data))
  assert load_image(data, 's7').size == (24, 16)

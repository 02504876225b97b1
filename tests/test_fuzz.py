"""Damage at random, by a seed: images, annotations, configs and checkpoint headers give a result or our one error.

A hundred of each here, two thousand with `-m slow`. Whatever takes longer than LIMIT seconds of CPU counts as a hang.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny_run import experiment

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.tensor_files import INDEX, TensorFiles
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.data.mixture import parse
from llava_mini_jax.data.sources import Report, read_llava
from llava_mini_jax.experiment import Experiment

LIMIT = 2.0
COUNTS = [100, pytest.param(2000, marks=pytest.mark.slow)]
ODD = [
  None,
  True,
  -1,
  0,
  2**64,
  1e308,
  float('nan'),
  '',
  'x',
  '\ud800',
  '<image>',
  [],
  {},
  [[]],
  {'from': 'gpt'},
  'a\0b',
]


class Hang(Exception):
  """Raised in the main thread by the clock."""


@contextlib.contextmanager
def clock() -> Iterator[None]:
  """Of this process's own CPU time, which a busy machine does not use up."""

  def ring(*_):
    raise Hang(f'more than {LIMIT} s')

  before = signal.signal(signal.SIGVTALRM, ring)
  signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def damaged(data: bytes, rng: random.Random) -> bytes:
  """One to four changes: bytes replaced, a piece cut out, repeated or copied, the end cut off, extremes."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, rng.randint(1, 64)))
    piece = bytes(data[at : at + size])
    match rng.randrange(6):
      case 0:
        data[at : at + size] = rng.randbytes(size)
      case 1:
        del data[at : at + size]
      case 2:
        data[at:at] = piece * rng.randint(1, 8)
      case 3:
        to = rng.randrange(len(data) + 1)
        data[to:to] = piece
      case 4:
        del data[at:]
      case 5:
        data[at : at + size] = rng.choice((b'\xff', b'\0', b'\x7f', b'\x80')) * size
  return bytes(data)


def changed(value: Any, rng: random.Random) -> Any:
  """A copy of a JSON value with one to three places of it replaced, removed, renamed or repeated."""
  value = copy.deepcopy(value)
  for _ in range(rng.randint(1, 3)):
    places = list(_places(value))
    if not places:
      return rng.choice(ODD)
    parent, key = rng.choice(places)
    match rng.randrange(4):
      case 0 | 1:
        parent[key] = copy.deepcopy(rng.choice(ODD))
      case 2:
        del parent[key]
      case 3 if isinstance(parent, dict):
        parent[f'{key}x'] = parent.pop(key)
      case _:
        parent.append(copy.deepcopy(parent[key]))
  return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
  keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
  for key in keys:
    yield value, key
    yield from _places(value[key])


def fuzz(count: int, attempt: Callable[[random.Random], object], error: type[Exception]) -> tuple[int, int]:
  """-> how many were accepted and refused. Each message is one line, led by a code if it is a DataError's."""
  accepted = refused = 0
  for seed in range(count):
    try:
      with clock():
        attempt(random.Random(seed))
      accepted += 1
    except error as found:
      assert '\n' not in str(found), seed
      assert not isinstance(found, DataError) or str(found).startswith('E_'), seed
      refused += 1
    except BaseException as found:
      raise AssertionError(f'seed {seed}: {type(found).__name__}: {found}') from found
  return accepted, refused


def encoded(format: str, mode: str = 'RGB', **options) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(out, format, **options)
  return out.getvalue()


@pytest.mark.parametrize('count', COUNTS)
def test_images(count):
  exif = Image.Exif()
  exif[0x0112] = 6
  files = [encoded(format) for format in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')]
  files += [encoded('PNG', 'RGBA'), encoded('PNG', 'P'), encoded('JPEG', 'CMYK'), encoded('JPEG', exif=exif)]
  views = ImageProcessor(16, grid=2)

  def attempt(rng: random.Random) -> None:
    image = load_image(damaged(rng.choice(files), rng), 'here')
    assert views(image).shape == (5, 16, 16, 3)

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    accepted, refused = fuzz(count, attempt, DataError)
  assert min(accepted, refused) > count // 10


def annotations() -> list[dict]:
  turns = [
    {'from': 'human', 'value': '<image>\nwhat?'},
    {'from': 'gpt', 'value': 'red'},
    {'from': 'human', 'value': 'sure?'},
    {'from': 'gpt', 'value': 'yes'},
  ]
  return [
    {'id': 'a', 'image': 'a.png', 'category': 'color', 'conversations': turns},
    {'id': 'b', 'image': ['a.png'], 'conversations': turns[:2]},
    {'id': 3, 'conversations': turns[2:]},
  ]


@pytest.mark.parametrize('count', COUNTS)
def test_annotations(count, tmp_path):
  """Changed as values and as text, whole files and lines: every sample is kept or on the list of refusals."""
  (tmp_path / 'a.png').write_bytes(encoded('PNG'))
  reports = []

  def attempt(rng: random.Random) -> None:
    lines = rng.random() < 0.5
    file = tmp_path / ('x.jsonl' if lines else 'x.json')
    value = annotations() if rng.random() < 0.5 else changed(annotations(), rng)
    value = value if isinstance(value, list) else [value]
    text = '\n'.join(map(json.dumps, value)) if lines else json.dumps(value)
    data = text.encode()
    file.write_bytes(data if value != annotations() else damaged(data, rng))
    report = Report()
    for record in read_llava(file, tmp_path, report, reserved=('<s>',)):
      assert isinstance(record['id'], str) and all(isinstance(data, bytes) for data in record['media'])
    assert all(str(error).startswith('E_') and '\n' not in str(error) for error in report.refused)
    reports.append(report)

  _, refused = fuzz(count, attempt, DataError)
  assert refused > count // 20
  assert sum(report.kept for report in reports) > count // 2
  assert sum(len(report.refused) for report in reports) > count // 10


@pytest.mark.parametrize('count', COUNTS)
def test_configs(count):
  """As the command line or a checkpoint's config.json may hold them."""
  whole = json.loads(json.dumps(experiment('data').to_dict()))
  whole['data'] |= dict(mixture=[['a', 'train', 'first:9', 1.0]], dataset='', group_by_length=True, row_lengths=[9, 64])

  def attempt(rng: random.Random) -> None:
    value = changed(whole, rng)
    found = Experiment.from_dict(value)
    parse(found.data.mixture)
    assert Experiment.from_dict(found.to_dict()) == found

  _, refused = fuzz(count, attempt, ConfigError)
  assert refused > count // 3


@pytest.mark.parametrize('count', COUNTS)
def test_checkpoint_headers(count, tmp_path):
  """Of safetensors files, and the index of shards."""
  rng = np.random.default_rng(0)
  names = [f'model-{i:05}-of-00002.safetensors' for i in (1, 2)]
  tensors = [{f'{part}.{i}': rng.normal(size=(3, 2)).astype(np.float32) for part in 'ab'} for i in range(2)]
  for name, part in zip(names, tensors, strict=True):
    save_file(part, tmp_path / name)
  index = {'weight_map': {tensor: name for name, part in zip(names, tensors, strict=True) for tensor in part}}
  whole = (tmp_path / names[0]).read_bytes()
  header = 8 + int.from_bytes(whole[:8], 'little')

  def attempt(rng: random.Random) -> None:
    of_index = rng.random() < 0.5
    text = json.dumps(changed(index, rng) if of_index and rng.random() < 0.5 else index).encode()
    (tmp_path / INDEX).write_bytes(damaged(text, rng) if of_index and rng.random() < 0.5 else text)
    (tmp_path / names[0]).write_bytes(whole if of_index else damaged(whole[:header], rng) + whole[header:])
    found = TensorFiles(tmp_path)
    for tensor in found.tensors:
      assert found.read(tensor).size >= 0

  _, refused = fuzz(count, attempt, DataError)
  assert refused > count // 2


def test_the_clock_rings():
  with pytest.raises(Hang), clock():
    while True:
      pass


def test_the_copy_alone_is_changed(tmp_path: Path):
  value = annotations()
  assert changed(value, random.Random(0)) != value == annotations()

"""The files and pictures of where a model looks."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import REPOSITORY, environment, make_dataset, trained

from llava_mini_jax.analyze.attention import AttentionSums
from llava_mini_jax.analyze.attention_report import windows, write_attention, write_compressor, write_dropped


def rows(file: Path) -> list[dict[str, str]]:
  with file.open() as stream:
    return list(csv.DictReader(stream))


def sums(tokens: int) -> AttentionSums:
  rng = np.random.default_rng(0)
  flow, looks = rng.uniform(1, 2, (4, 3, 3)), rng.uniform(1, 2, (4, tokens))
  return AttentionSums(flow, np.full((4, 3, 3), 5.0), flow[:, 0], np.full((4, 3), 2.0), looks, np.float64(7))


def test_windows():
  assert windows(4, 2) == [(0, 0), (0, 2), (1, 3), (2, 4), (0, 4)]
  assert windows(2, 1) == [(0, 0), (0, 1), (1, 2), (0, 2)]


def test_numbers_and_pictures(tmp_path):
  found = sums(16)
  assert write_attention(found, tmp_path)
  flow = rows(tmp_path / 'flow.csv')
  assert len(flow) == 36 and flow[5] == {
    'layer': '0',
    'from': 'vision',
    'to': 'response',
    'attention': flow[5]['attention'],
  }
  assert float(flow[5]['attention']) == pytest.approx(found.flow[0, 1, 2] / 5, rel=1e-5)
  assert float(rows(tmp_path / 'entropy.csv')[-1]['nats']) == pytest.approx(found.entropy[3, 2] / 2, rel=1e-5)
  assert float(rows(tmp_path / 'map.csv')[17]['attention']) == pytest.approx(found.map[1, 1] / 7, rel=1e-5)
  for name in ('flow', 'entropy', 'map'):
    assert len(Image.open(tmp_path / f'{name}.png').convert('RGB').getcolors(1 << 20)) > 30


@pytest.mark.parametrize('tokens', [1, 3])
def test_one_token_has_no_map(tokens, tmp_path):
  assert not write_attention(sums(tokens), tmp_path)
  assert not (tmp_path / 'map.png').exists() and len(rows(tmp_path / 'map.csv')) == 4 * tokens


def test_without_vision(tmp_path):
  write_dropped(windows(4, 2), [(9, 10), (8, 10), (7, 10), (6, 10), (0, 10)], tmp_path)
  assert rows(tmp_path / 'dropped.csv')[1] == dict(first_layer='0', end_layer='2', right='8', answers='10')
  assert Image.open(tmp_path / 'dropped.png').height > 300


def test_where_the_queries_look(tmp_path):
  """The brightest place of the picture's lower half is where the weight is."""
  images, weights = np.full((2, 64, 64, 3), 128, np.uint8), np.zeros((2, 4, 4))
  weights[0, 0, 0] = weights[1, 3, 3] = 1.0
  write_compressor(images, weights, tmp_path)
  assert len(rows(tmp_path / 'compressor.csv')) == 32
  pixels = np.asarray(Image.open(tmp_path / 'compressor.png').convert('RGB'), int)
  below = pixels[pixels.shape[0] // 2 :]
  yellow = (below[..., 0] > 150) & (below[..., 2] < 130)  # the colour bar, right of all, apart
  first, second = (
    np.argwhere(yellow[:, : int(0.4 * below.shape[1])]),
    np.argwhere(yellow[:, : int(0.8 * below.shape[1])]),
  )
  assert first[:, 0].mean() < second[second[:, 1] > 0.4 * below.shape[1]][:, 0].mean()


def test_a_run(tmp_path, tmp_path_factory):
  """Everything is written, and what is written says the numbers that the model gives."""
  base = tmp_path_factory.getbasetemp()
  words = [f'--workdir={trained(base)}', f'--dataset={make_dataset(base)}', '--split=train', f'--out={tmp_path}']
  sizes = ['--samples=8', '--batch_size=4']
  done = subprocess.run(
    [sys.executable, '-m', 'llava_mini_jax.analyze', 'attention', *words, *sizes],
    cwd=REPOSITORY,
    env=environment(devices=1),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'written to {tmp_path}/README.md\n'
  names = {path.name for path in tmp_path.iterdir()}
  drawn = {'flow', 'entropy', 'dropped', 'compressor'}  # one vision token has no map
  assert names == {'README.md', 'map.csv', *(f'{n}.{kind}' for n in drawn for kind in ('csv', 'png'))}
  flow = rows(tmp_path / 'flow.csv')
  of_first_text = [float(row['attention']) for row in flow if row['layer'] == '0' and row['from'] == 'response']
  assert 0.9 < sum(of_first_text) < 1.1 and all(row['answers'] == '8' for row in rows(tmp_path / 'dropped.csv'))
  text = (tmp_path / 'README.md').read_text()
  assert text.startswith('# Where the model looks\n\n8 questions of ') and 'map.png' not in text

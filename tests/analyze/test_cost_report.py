"""python -m llava_mini_jax.analyze: the table, its pictures, and what a mistake is told."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_run import REPOSITORY, make_dataset

from llava_mini_jax.analyze.cost_report import describe, pictures, scaled, with_grid
from llava_mini_jax.analyze.stations import trained_stations
from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.recipes import paper_stage


def paper(stage: str) -> Experiment:
  return paper_stage(LlavaMiniConfig.preset('vicuna_7b'), stage, template='vicuna_v1', name='vicuna_7b')


@pytest.mark.parametrize(
  ('stage', 'trains', 'adapts'),
  [
    ('stage1', {'projector'}, set()),
    ('stage2', {'projector', 'compressor', 'prefusion', 'decoder'}, set()),
    ('stage2_lora', {'projector', 'compressor', 'prefusion'}, {'decoder'}),
  ],
)
def test_what_trains(stage, trains, adapts):
  assert trained_stations(paper(stage)) == dict(trains=trains, adapts=adapts)


def test_the_table():
  text = describe(paper('stage2'), 43)
  rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
  assert rows['this prompt'][-2:] == ['1.963', 'T'] and rows['every patch'][-2:] == ['8.553', 'T']
  assert rows['question 2'][:3] == ['0'] * 3
  assert '  79.4% less than every patch' in text and '  77.1% less than every patch' in text
  assert 'keys and values 288.000 MiB; with the logits of every token 358.312 MiB' in text
  hd = describe(paper('stage2_hd'), 43).splitlines()
  assert hd[0] == '43 text tokens, 5 view(s), 64 vision token(s) to the decoder'
  assert [line.split()[-2] for line in hd if line.startswith('this prompt')] == ['7.691', '8.132']


def test_scaled():
  assert [scaled(x) for x in (0, 2e6, 1.5e9, 3e12, 4e15)] == ['0', '2.000 M', '1.500 G', '3.000 T', '4.000 P']


def test_the_models_beside():
  tiny = LlavaMiniConfig.preset('tiny')
  assert (tiny.without_compression().tokens_per_visual, tiny.without_compression().prefusion.num_layers) == (64, 0)
  assert (with_grid(tiny, 3).tokens_per_visual, with_grid(tiny.without_compression(), 3).tokens_per_visual) == (9, 9)


def test_pictures(tmp_path):
  paths = pictures(LlavaMiniConfig.preset('tiny'), 20, tmp_path / 'new')
  assert [path.name for path in paths] == ['figure_7.png', 'figure_8.png', 'figure_9.png']
  for path in paths:
    image = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(image, axis=0)) > 20 and len(image) > 300_000


def command(*arguments) -> subprocess.Popen:
  environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
  program = [sys.executable, '-m', 'llava_mini_jax.analyze', *map(str, arguments)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen(program, cwd=REPOSITORY, env=environment, **pipes)


def test_commands(tmp_path, tmp_path_factory):
  data = make_dataset(tmp_path_factory.getbasetemp())
  processes = [
    command('flops', '--config=configs/tiny_easy_vqa.py', '--text=20'),
    command('samples', f'--dataset={data}', '--split=train', f'--out={tmp_path}/sheet.png'),
  ]
  (table, errors), (said, _) = (process.communicate() for process in processes)
  assert [process.returncode for process in processes] == [0, 0], errors
  experiment = Experiment(LlavaMiniConfig.preset('tiny'), DataConfig(), TrainConfig())
  assert table.splitlines()[:6] == describe(experiment, 20).splitlines()[:6]
  assert said == f'written to {tmp_path}/sheet.png\n'
  assert Image.open(tmp_path / 'sheet.png').size[0] > 1000


def test_mistakes():
  mistakes = {
    'flop': "error: analyze: expected one of attention, flops, samples; found 'flop'",
    'flops': 'error: flops: expected --config; found none',
    'samples': 'error: samples: expected --dataset and --out; found one or none',
    'attention': 'error: attention: expected --workdir, --dataset and --out; found some or none of them',
  }
  processes = [command(word) for word in mistakes]
  for process, message in zip(processes, mistakes.values(), strict=True):
    _, errors = process.communicate()
    assert (process.returncode, errors.splitlines()[-1]) == (1, message)

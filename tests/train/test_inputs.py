"""Runs on every way to lay data out: a mixture with videos, packed or grouped; a resume goes on as if nothing was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import MODEL, experiment

from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.experiment import DataConfig, Experiment
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.metrics import LOG_NAME

pytest.importorskip('av')
from test_video import clip, numbered  # noqa: E402

STEPS, SAVED = 8, 4
LAYOUTS = {
  'mixture': dict(visuals_per_row=3),
  'packed': dict(visuals_per_row=6, pack=True, fused_text=32),
  'grouped': dict(visuals_per_row=3, group_by_length=True, row_lengths=(64,), visual_counts=(1, 3)),
}


@pytest.fixture(scope='module')
def sources(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('sources')
  Image.new('RGB', (24, 16), 'red').save(root / 'red.png')
  (root / 'clip.mp4').write_bytes(clip('mp4', [numbered(i) for i in range(72)]))

  def write(name, samples):
    turns = [
      [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}] for _, question, answer in samples
    ]
    found = [
      dict(id=str(i), conversations=t, **media) for i, ((media, *_), t) in enumerate(zip(samples, turns, strict=True))
    ]
    (root / f'{name}.json').write_text(json.dumps(found))
    prepare([str(root / f'{name}.json')], root / name, media_roots=[root])

  write(
    'images', [(dict(image='red.png'), '<image>\ncolor?', 'red ' * (1 + n)) for n in range(6)] + [({}, 'no', 'yes')] * 3
  )
  write('videos', [(dict(video='clip.mp4'), '<video>\nwhat?', 'bars')] * 3)
  return root


def run(sources: Path, **fields) -> Experiment:
  mixture = ((str(sources / 'images'), 'train', 'all', 1.0), (str(sources / 'videos'), 'train', 'first:2', 2.0))
  base = experiment(sources / 'images', max_steps=STEPS, save_every=SAVED, log_every=2, keep=3)
  data = DataConfig(**dict(mixture=mixture, template='chatml', row_length=64) | fields)
  return dataclasses.replace(base, model=dataclasses.replace(MODEL, visual_chunk=2), data=data)


def curve(workdir: Path) -> list[tuple[float, ...]]:
  rows = [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]
  return [tuple(row[name] for name in ('step', 'loss', 'grad_norm', 'target_tokens')) for row in rows]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_resume_goes_on(sources, tmp_path, layout, capsys):
  config = run(sources, **LAYOUTS[layout])
  train(config, tmp_path / 'run')
  assert 'videos' in capsys.readouterr().out  # the table of the mixture
  expected = curve(tmp_path / 'run')
  assert [row[0] for row in expected] == list(range(1, STEPS + 1))
  assert expected[-1][1] < expected[0][1]
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(STEPS))
  train(config, tmp_path / 'run')
  assert curve(tmp_path / 'run') == expected

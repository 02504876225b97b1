"""Runs on every way to lay data out: a mixture with videos, packed or grouped; a resume goes on as if nothing was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import MODEL, experiment, make_dataset, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import conversation
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.sizes import SIZES_NAME
from llava_mini_jax.experiment import DataConfig, Experiment
from llava_mini_jax.train.loop import differences, train
from llava_mini_jax.train.metrics import LOG_NAME

pytest.importorskip('av')
from video_clips import clip, numbered  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')
TEMPLATE = Path(conversation.__file__).with_name('templates') / 'chatml.jinja'
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


def run(sources: Path, template: Path | str = 'chatml', **fields) -> Experiment:
  mixture = ((str(sources / 'images'), 'train', 'all', 1.0), (str(sources / 'videos'), 'train', 'first:2', 2.0))
  base = experiment(sources / 'images', max_steps=STEPS, save_every=SAVED, log_every=2, keep=3)
  data = DataConfig(**dict(mixture=mixture, template=str(template), row_length=64) | fields)
  return dataclasses.replace(base, model=dataclasses.replace(MODEL, visual_chunk=2), data=data)


def curve(workdir: Path) -> list[tuple[float, ...]]:
  rows = [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]
  return [tuple(row[name] for name in ('step', 'loss', 'grad_norm', 'target_tokens')) for row in rows]


@pytest.mark.parametrize(
  'layout', ['packed', *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != 'packed')]
)
def test_a_resume_goes_on(sources, tmp_path, layout, capsys):
  """Also when its datasets and its template have moved meanwhile."""
  template = shutil.copy(TEMPLATE, tmp_path / 'a.jinja')
  train(run(sources, template, **LAYOUTS[layout]), tmp_path / 'run')
  out = capsys.readouterr().out
  assert 'videos' in out  # the table of the mixture
  assert ('packed: ' in out) == (layout == 'packed')
  fills = [json.loads(line).get('row_fill') for line in (tmp_path / 'run' / LOG_NAME).read_text().splitlines()]
  assert all(0 < fill < 1 for fill in fills[3::2]) and fills[::2] == [None] * (STEPS // 2)
  expected = curve(tmp_path / 'run')
  assert [row[0] for row in expected] == list(range(1, STEPS + 1))
  assert expected[-1][1] < expected[0][1]
  assert (tmp_path / 'run' / SIZES_NAME).exists() == (layout != 'mixture')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(STEPS))
  moved = shutil.copytree(sources, tmp_path / 'elsewhere')
  capsys.readouterr()
  train(run(moved, shutil.move(template, tmp_path / 'b.jinja'), **LAYOUTS[layout]), tmp_path / 'run')
  assert 'measur' not in capsys.readouterr().err
  assert curve(tmp_path / 'run') == expected


def test_another_template_or_mixture_is_refused(tmp_path, tmp_path_factory):
  """Told by what it says, and not by where it lies."""
  base = tmp_path_factory.getbasetemp()
  copy = shutil.copytree(trained(base), tmp_path / 'run')
  config = experiment(make_dataset(base))
  template = tmp_path / 'mine.jinja'
  template.write_text(TEMPLATE.read_text() + '{# another #}')
  with pytest.raises(ConfigError) as error:
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, template=str(template))), copy)
  digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (TEMPLATE, template)]
  assert str(error.value).splitlines()[1:] == [f'  template: was {digests[0]!r}, is {digests[1]!r}']


def test_what_may_differ_of_a_mixture():
  stored, now = (
    dict(config=dict(data=dict(mixture=[[f'{place}/a', 'train', 'all', 1.0], [f'{place}/b', 'train', rule, 1.0]])))
    for place, rule in (('here', 'all'), ('there', 'first:3'))
  )
  assert differences(stored, now) == {
    'config.data.mixture': "was [['train', 'all', 1.0], ['train', 'all', 1.0]], "
    "is [['train', 'all', 1.0], ['train', 'first:3', 1.0]]"
  }
  now['config']['data']['mixture'][1][2] = 'all'
  assert differences(stored, now) == {}
  assert len(differences(dict(config=dict(data={})), now)) == 1

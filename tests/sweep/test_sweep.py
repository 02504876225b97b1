"""A sweep: its grid, who works on what, what it leaves; once for real, with a model that trains in seconds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import MODEL, REPOSITORY, command, experiment, make_dataset

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.scenes import Scenes
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sweep import run as sweep_run
from llava_mini_jax.sweep.grid import Point, Sweep, changed, cost, load_sweep
from llava_mini_jax.sweep.report import statistics, write_report
from llava_mini_jax.sweep.run import BUSY, DONE, KEPT, RESULT, directory_of, results, run_sweep
from llava_mini_jax.train.lock import only_trainer

ABLATIONS = sorted((REPOSITORY / 'configs' / 'ablations').glob('*.py'))
LAYERS = 'model.prefusion.num_layers'
FILE = """
from tiny_run import experiment
from llava_mini_jax.sweep.grid import Point, Sweep

def get_sweep():
  points = [Point(f'layers{n}', {'model.prefusion.num_layers': n}, dict(VQAv2=70.0 + n)) for n in (1,)]
  return Sweep('tiny', experiment('nowhere', max_steps=6, save_every=3), tuple(points), split='train')
"""


def tiny(**values) -> Sweep:
  points = tuple(Point(f'layers{n}', {LAYERS: n}, dict(VQAv2=70.0 + n), series=('a',)) for n in (0, 1))
  return Sweep(**{'title': 'tiny', 'base': experiment('data'), 'points': points, 'seeds': (0, 1), **values})


def test_points_change_what_they_name():
  sweep = tiny()
  found = [
    (p.name, e.model.prefusion.num_layers, e.train.seed) for p, s in sweep.runs() for e in [sweep.experiment(p, s)]
  ]
  assert found == [('layers0', 0, 0), ('layers0', 0, 1), ('layers1', 1, 0), ('layers1', 1, 1)]
  assert changed(sweep.base, {LAYERS: 1, 'train.seed': 0}) == sweep.base


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: tiny(seeds=()), 'sweep: expected points and seeds; found 2 and 0'),
    (
      lambda: tiny(points=(Point('a', {}), Point('a', {}))),
      "sweep: expected names of letters, digits and _, each once; found 'a'",
    ),
    (
      lambda: tiny(points=(Point('a/b', {}),)),
      "sweep: expected names of letters, digits and _, each once; found 'a/b'",
    ),
    (
      lambda: tiny(points=(Point('a', {'model.prefusion.layers': 1}),)),
      "sweep: expected the path of a field; found 'model.prefusion.layers'",
    ),
    (lambda: tiny(points=(Point('a', {LAYERS: -1}),)), 'PrefusionConfig.num_layers: expected 0 or more; found -1'),
    (lambda: load_sweep('none.py', {}), 'sweep: no such file: none.py'),
  ],
)
def test_grids_that_are_refused(build, message):
  with pytest.raises(ConfigError) as error:
    build()
  assert str(error.value) == message


@pytest.fixture
def stub(monkeypatch):
  """Training and evaluation that only take notes."""
  trained = []

  def train(experiment, workdir, *, preemption):
    trained.append((experiment.model.prefusion.num_layers, experiment.train.seed, workdir))
    workdir.mkdir(parents=True, exist_ok=True)

  def evaluated(experiment, *_):
    share = 0.5 + 0.1 * experiment.model.prefusion.num_layers + 0.02 * experiment.train.seed
    parts = dict(real=dict(accuracy=share, count=9, color=share), blank=dict(accuracy=0.25, count=9, color=0.25))
    costs = dict(tokens=1, prompt_flops=1e6 * (1 + experiment.model.prefusion.num_layers), steps=6, training_flops=1e9)
    return parts | dict(layers=experiment.model.prefusion.num_layers, cost=costs)

  monkeypatch.setattr(sweep_run, 'train', train)
  monkeypatch.setattr(sweep_run, '_evaluated', evaluated)
  return trained


def outcomes(sweep: Sweep, workdir: Path) -> list[str]:
  return [outcome for *_, outcome in run_sweep(sweep, workdir, report=lambda line: None)]


def test_finished_points_are_kept_and_begun_ones_go_on(tmp_path, stub):
  sweep = tiny()
  runs = run_sweep(sweep, tmp_path, report=lambda line: None)
  next(runs), next(runs)
  runs.close()  # as a kill does: the third has not begun
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, DONE, DONE]
  assert [run[:2] for run in stub] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  (directory_of(tmp_path, sweep.points[0], 1) / RESULT).unlink()
  assert outcomes(sweep, tmp_path) == [KEPT, DONE, KEPT, KEPT]
  assert stub[4] == stub[1]  # the same directory: the trainer finds its checkpoints


def test_a_point_that_another_process_works_on_is_left_to_it(tmp_path, stub):
  sweep = tiny()
  taken = directory_of(tmp_path, *list(sweep.runs())[2])
  taken.mkdir(parents=True)
  with only_trainer(taken):
    assert outcomes(sweep, tmp_path) == [DONE, DONE, BUSY, DONE]
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, DONE, KEPT]


def test_another_number_of_questions_is_asked_anew(tmp_path, stub):
  sweep = tiny()
  outcomes(sweep, tmp_path)
  assert [outcome for *_, outcome in run_sweep(sweep, tmp_path, limit=5, report=lambda line: None)] == [DONE] * 4
  assert [result['limit'] for result in results(sweep, tmp_path)] == [5] * 4


def test_a_result_of_another_config_is_refused(tmp_path, stub):
  sweep = tiny()
  outcomes(sweep, tmp_path)
  other = tiny(base=changed(sweep.base, {'train.batch_size': 4}))
  with pytest.raises(ConfigError) as error:
    outcomes(other, tmp_path)
  file = directory_of(tmp_path, sweep.points[0], 0) / RESULT
  assert str(error.value) == (
    f'{file}: its config differs from this one; use another --workdir:\n  config.train.batch_size: was 8, is 4'
  )
  moved = tiny(base=changed(sweep.base, {'data.dataset': 'elsewhere', 'train.mesh': (1, 1, 1)}))
  assert outcomes(moved, tmp_path) == [KEPT] * 4


def test_the_report(tmp_path, stub):
  sweep = tiny()
  assert write_report(sweep, [], tmp_path) == []
  outcomes(sweep, tmp_path)
  found = results(sweep, tmp_path)
  paths = write_report(sweep, found, tmp_path / 'out')
  assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / 'out').iterdir())
  with (tmp_path / 'out' / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [(row['point'], row['seed'], float(row['real_accuracy'])) for row in rows] == [
    ('layers0', '0', 0.5),
    ('layers0', '1', 0.52),
    ('layers1', '0', 0.6),
    ('layers1', '1', 0.62),
  ]
  lines = (tmp_path / 'out' / 'table.md').read_text().splitlines()
  assert lines[2] == '| point | layers | tokens | FLOPs | seeds | all | color | blank images | paper: VQAv2 |'
  assert lines[4] == '| layers0 | 0 | 1 | 1e+06 | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | 25.0 ± 0.0 | 70.0 |'
  assert lines[-1].startswith('4 runs; 0 to come.')
  for path in paths[2:]:
    image = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(image, axis=0)) > 20


def test_the_statistics():
  several = [dict(real=dict(accuracy=x)) for x in (0.1, 0.2, 0.6)]
  assert statistics(several) == (pytest.approx(0.3), pytest.approx(np.sqrt((0.04 + 0.01 + 0.09) / 2)))
  assert statistics(several[:1]) == (0.1, None)


@pytest.fixture(scope='module')
def sixteen_scenes(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp('scenes') / 'data'
  prepare(['scenes'], out, scenes=Scenes(16), tokenizer_vocab_size=0)
  return out


@pytest.mark.parametrize('file', ABLATIONS, ids=lambda path: path.stem)
def test_ablations(file, sixteen_scenes):
  """Every point of every file fits: a model can be built, rows hold its tokens, and it costs something."""
  sweep = load_sweep(file, {'data.dataset': str(sixteen_scenes), 'train.batch_size': 8}, (0,))
  for point, seed in sweep.runs():
    experiment = sweep.experiment(point, seed)
    found = cost(experiment)
    assert found.steps == 4 and 0 < found.prompt_flops < found.training_flops
    assert found.tokens + experiment.data.fused_text <= experiment.data.row_length
    if named := re.search(r'tokens(\d+)', point.name):
      assert int(named[1]) == found.tokens


def test_table_6_is_the_papers_grid():
  sweep = load_sweep(REPOSITORY / 'configs' / 'ablations' / 'table6.py', {})
  assert len(sweep.seeds) >= 3
  grid = [
    (e.model.prefusion.num_layers, e.model.tokens_per_visual) for p in sweep.points for e in [sweep.experiment(p, 0)]
  ]
  assert grid == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (0, 4), (0, 9), (0, 16), (0, 64)]


def swept(tmp_path: Path, data: Path) -> tuple[str, Path]:
  """What launch/sweep.py says of a grid of one point, and the result of that point."""
  file, workdir = tmp_path / 'grid.py', tmp_path / 'out'
  file.write_text(FILE)
  words = file, f'--workdir={workdir}', f'--dataset={data}', '--seeds=0', '--mesh=1,1,1', '--batch_size=4'
  process = command('sweep', *words, '--set', 'train.log_every=2', '--limit=6', cache=tmp_path / 'cache')
  said, errors = process.communicate()
  assert process.returncode == 0, errors
  return said, workdir / 'layers1' / 'seed0' / RESULT


def test_the_command(tmp_path, tmp_path_factory):
  """Trains and evaluates in a process of its own."""
  said, result = swept(tmp_path, make_dataset(tmp_path_factory.getbasetemp()))
  assert 'layers1, seed 0: done' in said
  assert re.search(r'layers1 +1 +1 +\S+ +6 ', said)  # what it will cost: layers, tokens, FLOPs, steps
  found = json.loads(result.read_text())
  assert (found['layers'], found['real']['count'], found['cost']['steps']) == (1, 6, 6)
  trained = Experiment.from_dict(found['config'])
  assert (trained.train.batch_size, trained.train.mesh, trained.train.log_every) == (4, (1, 1, 1), 2)
  assert trained.model.decoder == MODEL.decoder
  written = {'results.csv', 'table.md', *(f'accuracy_by_{x}.png' for x in ('layers', 'tokens', 'flops'))}
  assert written < {path.name for path in (tmp_path / 'out').iterdir()}


@pytest.mark.slow
def test_a_point_without_its_result_is_evaluated_and_not_trained_again(tmp_path, tmp_path_factory):
  data = make_dataset(tmp_path_factory.getbasetemp())
  _, result = swept(tmp_path, data)
  log, found = result.parent / 'run' / 'metrics.jsonl', json.loads(result.read_text())
  before = log.read_bytes()
  result.unlink()
  said, _ = swept(tmp_path, data)
  assert 'layers1, seed 0: done' in said
  assert log.read_bytes() == before and len(before.splitlines()) == 6
  assert json.loads(result.read_text())['real'] == found['real']

"""A sweep: its grid, who works on what, what it leaves; once for real, with a model that trains in seconds."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import start_processes
from tiny_run import MODEL, REPOSITORY, command, experiment, make_dataset

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sweep import run as sweep_run
from llava_mini_jax.sweep.grid import Point, Sweep, changed, cost, load_sweep
from llava_mini_jax.sweep.report import statistics, write_report
from llava_mini_jax.sweep.results import FAILURE, RESULT, directory_of, results
from llava_mini_jax.sweep.run import BUSY, DONE, FAILED, KEPT, describe_cost, run_sweep
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.goodput import LEDGER_NAME
from llava_mini_jax.train.lock import only_trainer

LAYERS = 'model.prefusion.num_layers'
FILE = """
from tiny_run import experiment
from llava_mini_jax.sweep.grid import Point, Sweep

def get_sweep():
  points = [Point(f'layers{n}', {'model.prefusion.num_layers': n}, dict(VQAv2=70.0 + n)) for n in (1,)]
  return Sweep('tiny', experiment('nowhere', max_steps=6, save_every=3), tuple(points), split='train')
"""


def tiny(dataset='data', **values) -> Sweep:
  points = tuple(Point(f'layers{n}', {LAYERS: n}, dict(VQAv2=70.0 + n), series=('a',)) for n in (0, 1))
  fields = dict(title='tiny', base=experiment(dataset), points=points, seeds=(0, 1), split='train')
  return Sweep(**{**fields, **values})


@pytest.fixture
def data(tmp_path_factory) -> Path:
  return make_dataset(tmp_path_factory.getbasetemp())


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
    start = 100 * len(trained)
    with (workdir / LEDGER_NAME).open('a') as ledger:  # 9 s of each life
      for line in (dict(start=1, at=start), dict(step=1, at=start + 9, seconds=dict(restore=4.0, step=5.0))):
        ledger.write(json.dumps(line) + '\n')

  def evaluated(experiment, *_):
    share = 0.5 + 0.1 * experiment.model.prefusion.num_layers + 0.02 * experiment.train.seed
    parts = {
      name: dict(accuracy=right, count=9, by_category=dict(color=right, count=right / 2))
      for name, right in dict(real=share, blank=0.25).items()
    }
    costs = dict(tokens=1, prompt_flops=1e6 * (1 + experiment.model.prefusion.num_layers), steps=6, training_flops=1e9)
    return parts | dict(layers=experiment.model.prefusion.num_layers, cost=costs)

  monkeypatch.setattr(sweep_run, 'train', train)
  monkeypatch.setattr(sweep_run, '_evaluated', evaluated)
  return trained


def outcomes(sweep: Sweep, workdir: Path) -> list[str]:
  return [outcome for *_, outcome in run_sweep(sweep, workdir, report=lambda line: None)]


def test_finished_points_are_kept_and_begun_ones_go_on(tmp_path, stub, data):
  sweep = tiny(data)
  runs = run_sweep(sweep, tmp_path, report=lambda line: None)
  next(runs), next(runs)
  runs.close()  # as a kill does: the third has not begun
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, DONE, DONE]
  assert [run[:2] for run in stub] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  (directory_of(tmp_path, sweep.points[0], 1) / RESULT).unlink()
  assert outcomes(sweep, tmp_path) == [KEPT, DONE, KEPT, KEPT]
  assert stub[4] == stub[1]  # the same directory: the trainer finds its checkpoints
  assert [result['seconds'] for result in results(sweep, tmp_path)] == [9.0, 18.0, 9.0, 9.0]  # of both its lives


def test_a_point_that_another_process_works_on_is_left_to_it(tmp_path, stub, data):
  sweep = tiny(data)
  taken = directory_of(tmp_path, *list(sweep.runs())[2])
  taken.mkdir(parents=True)
  with only_trainer(taken):
    assert outcomes(sweep, tmp_path) == [DONE, DONE, BUSY, DONE]
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, DONE, KEPT]


def test_a_point_that_was_finished_meanwhile_is_kept(tmp_path, stub, data, monkeypatch):
  sweep = tiny(data)
  outcomes(sweep, tmp_path)
  read, calls = sweep_run.read_result, []

  def late(*arguments):  # the first look at each point comes too early
    calls.append(arguments)
    return read(*arguments) if len(calls) % 2 == 0 else None

  monkeypatch.setattr(sweep_run, 'read_result', late)
  assert outcomes(sweep, tmp_path) == [KEPT] * 4 and len(stub) == 4


def test_a_point_that_fails_does_not_end_the_sweep(tmp_path, stub, data, monkeypatch):
  sweep, train, broken = tiny(data), sweep_run.train, [True]

  def fails(experiment, workdir, **options):
    train(experiment, workdir, **options)
    if broken and (experiment.model.prefusion.num_layers, experiment.train.seed) == (0, 1):
      raise TrainingError('step 3: 10 steps\n  skipped')

  monkeypatch.setattr(sweep_run, 'train', fails)
  failed = f'{FAILED}step 3: 10 steps skipped'
  assert outcomes(sweep, tmp_path) == [DONE, failed, DONE, DONE]
  file = directory_of(tmp_path, sweep.points[0], 1) / FAILURE
  assert file.read_text() == 'step 3: 10 steps\n  skipped\n'
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, KEPT, failed]  # last
  broken.clear()
  assert outcomes(sweep, tmp_path) == [KEPT, KEPT, KEPT, DONE]
  assert not file.exists() and outcomes(sweep, tmp_path) == [KEPT] * 4


def test_results_of_other_questions_are_not_mixed(tmp_path, stub, data):
  sweep = tiny(data)
  outcomes(sweep, tmp_path)
  runs = run_sweep(sweep, tmp_path, limit=5, report=lambda line: None)
  assert [outcome for *_, outcome in (next(runs), next(runs))] == [DONE] * 2
  runs.close()
  found = [(result['point'], result['limit']) for result in results(sweep, tmp_path)]
  assert found == [('layers1', 0)] * 2
  found = [(result['point'], result['limit']) for result in results(sweep, tmp_path, limit=5)]
  assert found == [('layers0', 5)] * 2
  said = describe_cost(sweep, tmp_path, 1e12, 0.5, limit=5).splitlines()
  assert [line.split()[-1] for line in said[1:3]] == ['0', '2']  # seeds left
  assert results(sweep, tmp_path, max_new_tokens=9) == []
  longer = run_sweep(sweep, tmp_path, max_new_tokens=9, report=lambda line: None)
  assert [outcome for *_, outcome in longer] == [DONE] * 4


def test_a_result_of_another_config_is_refused(tmp_path, stub, data):
  sweep = tiny(data)
  outcomes(sweep, tmp_path)
  other = tiny(base=changed(sweep.base, {'train.batch_size': 4}))
  with pytest.raises(ConfigError) as error:
    outcomes(other, tmp_path)
  file = directory_of(tmp_path, sweep.points[0], 0) / RESULT
  assert str(error.value) == (
    f'{file}: its run differs from this one; use another --workdir:\n  config.train.batch_size: was 8, is 4'
  )


def test_a_result_of_other_data_is_refused_and_of_data_that_moved_kept(tmp_path, stub, data):
  sweep = tiny(data)
  outcomes(sweep, tmp_path)
  moved = shutil.copytree(data, tmp_path / 'moved')
  base = changed(sweep.base, {'data.dataset': str(moved), 'train.mesh': (1, 1, 1)})
  assert outcomes(tiny(base=base), tmp_path) == [KEPT] * 4
  elsewhere = tmp_path / 'other'
  prepare([str(data.parent / 'train.json')], elsewhere, media_roots=[data.parent], tokenizer_vocab_size=300)
  other = tiny(base=changed(sweep.base, {'data.tokenizer': str(elsewhere / 'tokenizer')}))
  template = tmp_path / 'template.jinja'
  template.write_text((REPOSITORY / 'llava_mini_jax' / 'data' / 'templates' / 'chatml.jinja').read_text() + ' ')
  written = tiny(base=changed(sweep.base, {'data.template': str(template)}))
  records = json.loads((data.parent / 'train.json').read_text())[:8]
  (tmp_path / 'train.json').write_text(json.dumps(records))
  tokenizer = data / 'tokenizer'
  prepare([str(tmp_path / 'train.json')], tmp_path / 'fewer', media_roots=[data.parent])
  fewer = tiny(base=changed(sweep.base, {'data.dataset': str(tmp_path / 'fewer'), 'data.tokenizer': str(tokenizer)}))
  for changes, name in ((other, 'tokenizer'), (written, 'template'), (fewer, 'dataset')):
    with pytest.raises(ConfigError, match=rf'use another --workdir:\n  fingerprints\.{name}: was .*, is [^\n]*$'):
      outcomes(changes, tmp_path)


def test_a_result_from_another_start_is_refused(tmp_path, stub, data):
  """The weights that all points begin with may have been trained anew in the same place."""
  start = tmp_path / 'start'
  (start / 'weights').mkdir(parents=True)
  shutil.copytree(data / 'tokenizer', start / 'tokenizer')
  (start / 'weights' / 'experiment.json').write_text('{}')
  sums = start / 'weights' / 'SHA256SUMS'
  sums.write_text('0a  model.safetensors\n')
  sweep = tiny(base=changed(experiment(data), {'train.init_from': str(start)}))
  outcomes(sweep, tmp_path)
  assert outcomes(sweep, tmp_path) == [KEPT] * 4
  sums.write_text('0b  model.safetensors\n')
  with pytest.raises(ConfigError, match=r'use another --workdir:\n  fingerprints\.start: was .*, is [^\n]*$'):
    outcomes(sweep, tmp_path)
  sums.unlink()
  with pytest.raises(ConfigError, match=r'start: expected what import wrote; found no [^ ]*SHA256SUMS$'):
    outcomes(sweep, tmp_path)
  shutil.rmtree(start / 'weights')
  with pytest.raises(ConfigError, match='^no checkpoint in '):
    outcomes(sweep, tmp_path)


def test_a_run_that_began_with_other_weights_does_not_go_on(tmp_path, stub, data):
  sweep = tiny(data)
  begun = directory_of(tmp_path, *next(sweep.runs()))
  with Checkpoints(begun / 'run' / 'checkpoints') as checkpoints:
    checkpoints.save(1, dict(params=dict(x=np.zeros(2, np.float32))), dict(start='0a'))
  with pytest.raises(ConfigError) as error:
    outcomes(sweep, tmp_path)
  expected = f"{begun}: its run differs from this one; use another --workdir:\n  start: was '0a', is None"
  assert str(error.value) == expected and not stub
  for file in (begun / 'run' / 'checkpoints' / '1').rglob('_CHECKPOINT_METADATA'):
    file.unlink()  # a damaged one is the trainer's to pass over
  assert outcomes(sweep, tmp_path) == [DONE] * 4


def test_a_result_without_fingerprints_is_compared_by_its_config(tmp_path, stub, data):
  sweep = tiny(data)
  outcomes(sweep, tmp_path)
  for file in tmp_path.glob(f'*/*/{RESULT}'):
    found = json.loads(file.read_text())
    for name in ('fingerprints', 'questions', 'split', 'max_new_tokens'):
      del found[name]
    file.write_text(json.dumps(found))
  assert outcomes(sweep, tmp_path) == [KEPT] * 4 and len(results(sweep, tmp_path)) == 4


def test_what_the_first_process_sees_counts(tmp_path, stub, data, monkeypatch):
  """The others do not look: a file may come late to them."""
  sweep = tiny(data)
  monkeypatch.setattr(sweep_run, 'is_writer', lambda: False)
  monkeypatch.setattr(sweep_run, 'as_first', lambda numbers: [True] * len(numbers))
  assert outcomes(sweep, tmp_path) == [KEPT] * 4 and not stub
  monkeypatch.setattr(sweep_run, 'first_fault', lambda fault: 'a fault of the first')
  with pytest.raises(ConfigError, match='^a fault of the first$'):
    outcomes(sweep, tmp_path)


def test_packed_rows_are_counted_as_the_trainer_does(tmp_path, data):
  base = changed(tiny(data).base, {'data.pack': True, 'data.row_length': 128, 'data.visuals_per_row': 8})
  base = changed(base, {'train.epochs': 8.0, 'train.max_steps': 0, 'train.batch_size': 2})
  inputs = load_inputs(base.data, base.model)
  rows = inputs.rows(inputs.order(batch_size=2, seed=0), 8.0)
  assert rows < 8 * len(inputs.source)
  found = cost(base, kept=tmp_path / 'sizes.npz')
  assert found.steps == rows // 2 and (tmp_path / 'sizes.npz').is_file()


def test_the_report(tmp_path, stub, data):
  sweep = tiny(data)
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
  assert [(row['real_questions'], row['real_accuracy_count'], row['blank_accuracy_color']) for row in rows[:2]] == [
    ('9', '0.25', '0.25'),
    ('9', '0.26', '0.25'),
  ]
  lines = (tmp_path / 'out' / 'table.md').read_text().splitlines()
  assert lines[2] == '| point | layers | tokens | FLOPs | seeds | all | color | count | blank images | paper: VQAv2 |'
  assert lines[4] == '| layers0 | 0 | 1 | 1e+06 | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | 25.5 ± 0.7 | 25.0 ± 0.0 | 70.0 |'
  assert lines[-1].startswith('4 runs; 0 to come.')
  for path in paths[2:]:
    image = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(image, axis=0)) > 20


def test_the_statistics():
  several = [dict(real=dict(accuracy=x)) for x in (0.1, 0.2, 0.6)]
  assert statistics(several) == (pytest.approx(0.3), pytest.approx(np.sqrt((0.04 + 0.01 + 0.09) / 2)))
  assert statistics(several[:1]) == (0.1, None)


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
def test_the_command_ends_badly_if_a_point_fails(tmp_path, tmp_path_factory):
  file, data = tmp_path / 'grid.py', make_dataset(tmp_path_factory.getbasetemp())
  diverges = "Point('diverges', {'train.groups': (('.*', 1e30),), 'train.max_skipped': 1})"
  file.write_text(FILE.replace('  return Sweep', f'  points.insert(0, {diverges})\n  return Sweep'))
  words = file, f'--workdir={tmp_path / "out"}', f'--dataset={data}', '--seeds=0', '--mesh=1,1,1', '--limit=6'
  process = command('sweep', *words, cache=tmp_path / 'cache')
  said, errors = process.communicate()
  assert process.returncode == 1 and 'layers1, seed 0: done' in said
  assert re.search(r'error: sweep: 1 run\(s\) failed:\n  diverges, seed 0: failed: .+$', errors.strip()), errors
  assert '1 runs; 1 to come' in (tmp_path / 'out' / 'table.md').read_text()


@pytest.mark.slow
def test_two_processes_of_one_job(tmp_path, tmp_path_factory):
  """They train a point together, and called again both keep it; table and result are written once."""
  data, file, out = make_dataset(tmp_path_factory.getbasetemp()), tmp_path / 'grid.py', tmp_path / 'out'
  file.write_text(FILE)
  launch = REPOSITORY / 'launch' / 'sweep.py'
  words = [launch, file, f'--workdir={out}', f'--dataset={data}', '--seeds=0', '--mesh=-1,1,1', '--limit=4']
  for outcome in (DONE, KEPT):
    processes = start_processes([*words, '--evaluate_batch_size=4'], 2, 1)
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [f'layers1, seed 0: {outcome}\n' in text for text in said] == [True, False], said
    assert ['written: ' in text for text in said] == [True, False]


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

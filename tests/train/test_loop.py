"""A whole run: what it leaves on disk, what a kill at any moment changes (nothing), and what another mesh does."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiny_run import (
  LOG_EVERY,
  RATE,
  SAVE_EVERY,
  STEPS,
  experiment,
  finish,
  make_dataset,
  start_training,
  trained,
)

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.tokenizer import fingerprint, load_tokenizer
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.loop import differences, train
from llava_mini_jax.train.metrics import LOG_NAME, MetricsLog, truncate
from llava_mini_jax.train.plots import smooth, training_curves

pytestmark = pytest.mark.usefixtures('quick_compilation')
ALWAYS = {'step', 'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate', 'skipped'}
RATES = {'steps_per_second', 'tokens_per_second', 'images_per_second', 'row_fill', 'mfu'}

KILLS = {'twice': ['early', 'late']}  # early: with luck before there is any checkpoint


def rows(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]


def exact(workdir: Path) -> list[dict]:
  """The metrics of every step that no clock decides. Their text in the file is Python's shortest exact one."""
  return [{name: row[name] for name in sorted(ALWAYS)} for row in rows(workdir)]


def lines(workdir: Path) -> int:
  path = workdir / LOG_NAME
  return path.read_bytes().count(b'\n') if path.exists() else 0


def committed(workdir: Path) -> int:
  """Step of the newest whole checkpoint, 0 = none."""
  found = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return max(found, default=0)


@dataclasses.dataclass
class Killed:
  workdir: Path
  kills: list[tuple[int, int]]  # (lines logged, newest checkpoint) that each kill left behind


def run_and_kill(dataset: Path, workdir: Path, moments: list[str]) -> Killed:
  """Starts the same command over and over, kills it at a random moment, and at last lets it end."""
  found = Killed(workdir, [])
  for moment in moments:
    checkpoint = random.choice([1, 2, 3]) * SAVE_EVERY if moment == 'late' else 0
    process = start_training(dataset, workdir)
    wait(process, workdir, lambda at=checkpoint: committed(workdir) >= at)
    wanted = lines(workdir) + random.randint(1, SAVE_EVERY)
    wait(process, workdir, lambda at=wanted: lines(workdir) >= at)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it could be killed'
    found.kills.append((lines(workdir), committed(workdir)))
  finish(start_training(dataset, workdir), workdir)
  return found


def wait(process: subprocess.Popen, workdir: Path, until: Callable[[], bool]) -> None:
  while not until():
    assert process.poll() is None, workdir.with_suffix('.log').read_text()
    time.sleep(0.001)


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
  return tmp_path_factory.getbasetemp()


@pytest.fixture(scope='module')
def runs(base, tmp_path_factory):
  """The same experiment on eight devices, on one, and on one but killed on the way; all at the same time."""
  dataset, root = make_dataset(base), tmp_path_factory.mktemp('runs')
  one = start_training(dataset, root / 'one')
  with concurrent.futures.ThreadPoolExecutor() as pool:
    killed = {name: pool.submit(run_and_kill, dataset, root / name, moments) for name, moments in KILLS.items()}
    found = dict(eight=trained(base), one=finish(one, root / 'one'))
    return found | {name: future.result() for name, future in killed.items()}


@pytest.fixture(scope='module')
def workdir(runs) -> Path:
  return runs['eight']


def test_what_a_run_leaves(workdir, base):
  dataset = make_dataset(base)
  names = ['checkpoints', 'config.json', 'curves.png', 'goodput.jsonl', 'lock', 'logs', LOG_NAME, 'tensorboard']
  assert sorted(path.name for path in workdir.iterdir()) == [*names, 'tokenizer']
  assert Experiment.from_dict(json.loads((workdir / 'config.json').read_text())) == experiment(dataset)
  assert fingerprint(load_tokenizer(workdir / 'tokenizer')) == fingerprint(load_tokenizer(dataset / 'tokenizer'))
  kept = [STEPS - 2 * SAVE_EVERY, STEPS - SAVE_EVERY, STEPS]
  assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == kept
  with Image.open(workdir / 'curves.png') as image:
    image.load()
    assert image.format == 'PNG' and min(image.size) > 200
    assert len(np.unique(np.asarray(image.convert('RGB')).reshape(-1, 3), axis=0)) > 10


def test_a_line_for_every_step(workdir):
  found = rows(workdir)
  assert [row['step'] for row in found] == list(range(1, STEPS + 1))
  for row in found:
    timed = row['step'] % LOG_EVERY == 0 and row['step'] > LOG_EVERY  # the first of them would time the compilation
    assert row.keys() == ALWAYS | (RATES if timed else set()), row
    assert all(math.isfinite(value) for value in row.values()), row
    assert row['skipped'] == 0
    assert row['target_tokens'] == 16  # eight answers of one token, and their ends
    if timed:
      assert row['tokens_per_second'] == pytest.approx(row['steps_per_second'] * 8 * 64)
      assert row['images_per_second'] == pytest.approx(row['steps_per_second'] * 8)
      assert row['mfu'] > 0


def test_the_learning_rate_of_every_step(workdir):
  """Linear over 0.03 of the steps, then half a cosine."""
  warmup = round(0.03 * STEPS)
  expected = [
    RATE * (step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2)
    for step in range(STEPS)
  ]
  np.testing.assert_allclose([row['learning_rate'] for row in rows(workdir)], expected, rtol=1e-5, atol=1e-9)


def test_it_learns_the_dataset_by_heart(workdir):
  found = rows(workdir)
  assert abs(found[0]['loss'] - math.log(512)) < 0.5  # at first any token is as likely
  assert found[-1]['loss'] < found[0]['loss'] / 50
  assert (found[0]['accuracy'], found[-1]['accuracy']) == (0, 1)


def events(directory: Path) -> list[Event]:
  """Every event of a directory in the order that it was written, its checksums verified (TFRecord framing)."""

  def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

  found = []
  for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from('<Q', data, at)
      body = data[at + 12 : at + 12 + length]
      assert struct.unpack_from('<I', data, at + 8) == (masked(data[at : at + 8]),), path
      assert struct.unpack_from('<I', data, at + 12 + length) == (masked(body),), path
      found.append(Event.FromString(body))
      at += length + 16
  return found


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
  """What TensorBoard draws: (step, value) by tag. A restart at a step hides what was there from that step on."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for event in events(directory):
    if event.session_log.status == SessionLog.START:
      curves = {tag: [point for point in points if point[0] < event.step] for tag, points in curves.items()}
    for value in event.summary.value:
      curves.setdefault(value.tag, []).append((event.step, value.simple_value))
  return curves


def test_tensorboard_shows_the_same(workdir):
  expected: dict[str, list] = {}
  for row in rows(workdir):
    for name, value in row.items():
      if name != 'step':
        expected.setdefault(f'train/{name}', []).append((row['step'], float(np.float32(value))))
  curves = shown(workdir / 'tensorboard')
  assert {tag: points for tag, points in curves.items() if tag.startswith('train/')} == expected
  spent = {tag for tag in curves if tag.startswith('goodput/')}
  assert expected.keys() | spent == curves.keys()
  for index in range(STEPS // LOG_EVERY):
    points = [curves[tag][index] for tag in spent]
    assert {step for step, _ in points} == {LOG_EVERY * (index + 1)}
    assert sum(share for _, share in points) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('kept', [0, 3])
def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path, kept):
  """Five steps; then, from the checkpoint of step `kept` or from the start, steps kept + 1 to 6."""
  for run, (start, end) in enumerate([(0, 5), (kept, 6)]):
    with MetricsLog(tmp_path, start_step=start, total_steps=6) as log:
      for step in range(start + 1, end + 1):
        log.write(step, {'loss': step + 100.0 * run, 'accuracy': 0.0})
    for file in (tmp_path / 'tensorboard').glob('events*'):  # named after the second it was made in: too coarse here
      file.rename(file.with_name(f'run {run}'))
  assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
  expected = [(row['step'], row['loss']) for row in rows(tmp_path)]
  assert shown(tmp_path / 'tensorboard')['train/loss'] == expected


@pytest.mark.parametrize('name', KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, name):
  """Every step once, in order, and every number equal to the last bit."""
  killed = runs[name]
  found, expected = exact(killed.workdir), exact(runs['one'])
  assert [row['step'] for row in found] == list(range(1, STEPS + 1)), killed.kills
  assert list(map(repr, found)) == list(map(repr, expected)), killed.kills
  assert sorted(path.name for path in killed.workdir.iterdir()) == sorted(path.name for path in runs['one'].iterdir())
  assert all(path.name.isdigit() for path in (killed.workdir / 'checkpoints').iterdir()), 'an unfinished save remains'


@pytest.mark.parametrize('name', KILLS)
def test_a_killed_run_goes_on_from_its_last_checkpoint(runs, name):
  killed = runs[name]
  log = killed.workdir.with_suffix('.log').read_text()
  starts = [int(line.split('; steps ')[1].split(' to ')[0]) for line in log.splitlines() if '; steps ' in line]
  assert starts == [0, *(checkpoint for _, checkpoint in killed.kills)]
  assert SAVE_EVERY <= starts[-1] <= killed.kills[-1][0] < STEPS


def test_the_mesh_does_not_matter(runs):
  """Eight devices, data parallel, against one, over the whole run."""
  found, expected = exact(runs['eight']), exact(runs['one'])
  for metric in ('loss', 'learning_rate'):
    np.testing.assert_allclose(
      [row[metric] for row in found], [row[metric] for row in expected], rtol=0, atol=1e-5, err_msg=metric
    )
  assert [row['accuracy'] for row in found] == [row['accuracy'] for row in expected]


def snapshot(workdir: Path) -> dict[str, bytes]:
  kept = [workdir / name for name in ('config.json', LOG_NAME)] + list((workdir / 'checkpoints').rglob('*'))
  return {str(path.relative_to(workdir)): path.read_bytes() for path in kept if path.is_file()}


def test_a_finished_run_stays_as_it_is(workdir, tmp_path, base, capsys):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  before = snapshot(copy)
  train(experiment(make_dataset(base)), copy)
  assert snapshot(copy) == before
  assert f'steps {STEPS} to {STEPS}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('change', 'lines'),
  [
    (
      dict(max_steps=STEPS + 1),
      [f'{field}: was {STEPS}, is {STEPS + 1}' for field in ('total_steps', 'config.train.max_steps')],
    ),
    (dict(seed=9, weight_decay=1.0), ['config.train.seed: was 0, is 9', 'config.train.weight_decay: was 0.0, is 1.0']),
    (dict(groups=(('.*', 3e-2),)), [f"config.train.groups: was [['.*', {RATE}]], is [['.*', 0.03]]"]),
  ],
)
def test_another_run_is_refused(workdir, tmp_path, base, change, lines):
  """Every field that differs is named, and nothing is changed."""
  copy = shutil.copytree(workdir, tmp_path / 'run')
  before = snapshot(copy)
  with pytest.raises(ConfigError) as error:
    train(experiment(make_dataset(base), **change), copy)
  head, *found = str(error.value).splitlines()
  assert head == f'{copy}/checkpoints: its run differs from this one; use another --workdir:'
  assert [line.strip() for line in found] == lines
  assert snapshot(copy) == before


def test_other_data_and_another_tokenizer_are_refused(workdir, tmp_path, base):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  other = experiment(make_dataset(base))
  meta = dict(total_steps=1, dataset='a', tokenizer='b', config=json.loads(json.dumps(other.to_dict())))
  assert differences(meta, meta | dict(dataset='c', tokenizer='d')) == {
    'dataset': "was 'a', is 'c'",
    'tokenizer': "was 'b', is 'd'",
  }
  with Checkpoints(copy / 'checkpoints') as checkpoints:
    stored = checkpoints.meta()
  inputs = load_inputs(other.data, other.model)
  assert stored['dataset'] == inputs.source.fingerprint and stored['tokenizer'] == fingerprint(inputs.tokenizer)


def test_what_changes_no_number_may_change(workdir, tmp_path, base):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  other = experiment(make_dataset(base), log_every=3, save_every=5, keep=1, mesh=(1, 8, 1))
  other = dataclasses.replace(other, data=dataclasses.replace(other.data, workers=1))
  with Checkpoints(copy / 'checkpoints') as checkpoints:
    stored = checkpoints.meta()['config']
  now = json.loads(json.dumps(other.to_dict()))
  assert stored != now and differences(dict(config=stored), dict(config=now)) == {}


@pytest.mark.slow
@pytest.mark.parametrize('most', [pytest.param(1, marks=pytest.mark.slow), 3])
def test_losses_that_are_not_finite_end_the_run(tmp_path, base, most):
  """After so many in a row; no step that came of them is in a checkpoint, and every line of the log can be read."""
  broken = experiment(make_dataset(base), groups=(('.*', 1e30),), save_every=1, log_every=1, max_skipped=most)
  with pytest.raises(TrainingError) as error:
    train(broken, tmp_path / 'run')
  head, *report = str(error.value).splitlines()
  found = rows(tmp_path / 'run')
  assert [row['skipped'] for row in found] == [0] * (len(found) - most) + [1] * most
  assert all(math.isfinite(row['loss']) for row in found[:-most])
  last = found[-1]['step']
  assert head.startswith(f'step {last}: {most} step(s) skipped in a row (train.max_skipped={most}); ')
  assert [line.split(': ')[0].strip() for line in report] == [f'step {last + 1 - k}' for k in range(most, 0, -1)]
  assert all(': expected finite numbers; found loss ' in line for line in report)
  with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
    assert checkpoints.latest_step == last - 1


def test_numbers_that_are_not_finite_are_shown(tmp_path):
  """null in the log, which is JSON; no point in TensorBoard; a gap in the curves."""

  def refuse(constant):
    raise AssertionError(constant)

  losses = [2.0, math.nan, math.inf, 1.0]
  with MetricsLog(tmp_path, start_step=0, total_steps=4) as log:
    for step, loss in enumerate(losses, 1):
      log.write(step, dict(loss=loss, accuracy=0.5, learning_rate=1e-3, skipped=float(not math.isfinite(loss))))
  lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
  assert [row['loss'] for row in lines] == [2.0, None, None, 1.0]
  curves = shown(tmp_path / 'tensorboard')
  assert curves['train/loss'] == [(1, 2.0), (4, 1.0)]
  assert curves['train/skipped'] == [(1, 0), (2, 1), (3, 1), (4, 0)]
  training_curves(tmp_path / LOG_NAME, tmp_path / 'curves.png')
  with Image.open(tmp_path / 'curves.png') as image:
    image.load()
  truncate(tmp_path / LOG_NAME, 2)
  assert [row['loss'] for row in rows(tmp_path)] == [2.0, None]


def test_smoothing_leaves_out_what_is_not_there():
  values = np.array([np.nan, 1.0, 3.0, np.nan, np.nan, 7.0])
  np.testing.assert_array_equal(smooth(values, 2), [np.nan, 1.0, 2.0, 3.0, np.nan, 7.0])


def test_lines_past_the_checkpoint_are_dropped(tmp_path):
  """So is a last line that a kill cut short."""
  log = tmp_path / LOG_NAME
  truncate(log, 2)
  assert not log.exists()
  text = ''.join(f'{{"step": {step}, "loss": 0.1}}\n' for step in range(1, 6))
  log.write_text(text + '{"step": 6, "lo')
  truncate(log, 9)
  assert log.read_text() == text
  truncate(log, 2)
  assert log.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.1}\n'
  truncate(log, 0)
  assert log.read_text() == ''


def test_no_steps_make_no_picture(tmp_path):
  (tmp_path / LOG_NAME).write_text('')
  training_curves(tmp_path / LOG_NAME, tmp_path / 'curves.png')
  assert not (tmp_path / 'curves.png').exists()

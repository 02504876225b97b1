"""What a real run does when its checkpoints are damaged, its disk is full, or it is told to end."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import largest, snapshot
from tiny_run import LOG_EVERY, experiment, finish, make_dataset, start_training

from llava_mini_jax.convert.run_parameters import host_mesh
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.train.errors import CheckpointError, DamagedError
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.metrics import LOG_NAME

STEPS, EVERY = 48, 8
SHORT = dict(max_steps=STEPS, save_every=EVERY)
FLAGS = [f'--config.train.{name}={value}' for name, value in SHORT.items()]
EXACT = ('step', 'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate')
PREEMPTED = 75  # EX_TEMPFAIL
LIMIT = 60  # seconds; the soak test, alone on its machine, holds it to 10


def curve(workdir: Path) -> list[dict]:
  """To the bit: what Python writes of a float is its shortest exact text."""
  rows = map(json.loads, (workdir / LOG_NAME).read_text().splitlines())
  return [{name: row[name] for name in EXACT} for row in rows]


def kept(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


def printed(workdir: Path) -> str:
  return workdir.with_suffix('.log').read_text()


def until(process: subprocess.Popen, workdir: Path, what: Callable[[], bool]) -> None:
  while not what():
    assert process.poll() is None, printed(workdir)
    time.sleep(0.005)


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
  return tmp_path_factory.getbasetemp()


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def whole(base, cache, tmp_path_factory) -> Path:
  """A run that nothing happened to. Never to be written to."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  return finish(start_training(make_dataset(base), workdir, *FLAGS, cache=cache), workdir)


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
  """Its copy, with one bit of the newest checkpoint flipped, in the arrays."""
  workdir = shutil.copytree(whole, tmp_path / 'run')
  flip(workdir, STEPS)
  return workdir


def flip(workdir: Path, step: int) -> None:
  file = largest(workdir / 'checkpoints' / str(step))
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def test_it_goes_on_from_the_last_whole_checkpoint(whole, damaged, base, cache):
  """Loudly; the damaged one is moved aside, and the curve is the one of a run that nothing happened to."""
  finish(start_training(make_dataset(base), damaged, *FLAGS, cache=cache), damaged)
  assert curve(damaged) == curve(whole)
  assert kept(damaged) == ['32', '40', '48', 'damaged-48']
  told = f'{damaged}/checkpoints/48 is damaged: '
  (warning,) = [line for line in printed(damaged).splitlines() if line.startswith('warning: ')]
  assert warning.startswith(f'warning: {told}')
  assert warning.endswith('; going on from step 40 instead of 48; moved aside: damaged-48')
  assert any(leaf in warning for leaf in ('params/', 'opt/')), 'no leaf is named'
  assert f'WARNING llava_mini_jax: {told}' in (damaged / 'logs/process_0.log').read_text()
  assert 'Traceback' not in printed(damaged)


def test_without_fallback_that_is_the_end(damaged, base):
  before = snapshot(damaged)
  with pytest.raises(DamagedError, match='/checkpoints/48 is damaged: .*(params|opt)/'):
    train(experiment(make_dataset(base), **SHORT), damaged, fallback=False)
  assert snapshot(damaged) == before


@pytest.mark.parametrize('how', ['flipped', 'emptied', 'moved aside'])
def test_never_anew_over_damaged_checkpoints(whole, tmp_path, base, how):
  workdir = shutil.copytree(whole, tmp_path / 'run')
  for step in (32, 40, 48):
    path = workdir / 'checkpoints' / str(step)
    if how == 'flipped':
      flip(workdir, step)
    elif how == 'emptied':  # Orbax does not see a checkpoint in it
      shutil.rmtree(path)
      path.mkdir() if step < 48 else path.write_text('')
    else:
      path.rename(path.with_name(f'damaged-{step}'))
  before = snapshot(workdir)
  with pytest.raises(CheckpointError) as error:
    train(experiment(make_dataset(base), **SHORT), workdir)
  assert snapshot(workdir) == before
  head, *lines = str(error.value).splitlines()
  if how == 'moved aside':
    assert head == (
      f'{workdir}/checkpoints: expected a checkpoint that is whole; found damaged ones alone: '
      'damaged-32, damaged-40, damaged-48; remove them to start anew'
    )
  else:
    assert head == f'{workdir}/checkpoints: no checkpoint is whole; the run does not start anew over them:'
    assert [line.split(' is damaged: ')[0] for line in lines] == [
      f'  {workdir}/checkpoints/{step}' for step in (48, 40, 32)
    ]


def test_readers_never_fall_back(damaged):
  """Whoever evaluates, exports or starts from it: an error that names step and leaf."""
  path = damaged / 'checkpoints/48'
  with pytest.raises(DamagedError, match=f'^{path} is damaged: '):
    load_run(damaged, host_mesh())
  assert load_run(damaged, host_mesh(), step=40).step == 40


def test_a_full_disk(whole, base, cache, tmp_path):
  """Files of the running program must not grow; saves fail, the run goes on; with room again they do not."""
  workdir = tmp_path / 'run'
  process = start_training(make_dataset(base), workdir, *FLAGS, '--config.train.failed_saves=99', cache=cache)
  until(process, workdir, lambda: (workdir / 'checkpoints/8').is_dir())
  unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
  size = largest(workdir / 'checkpoints/8').stat().st_size
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, unlimited[1]))
  log = workdir / 'logs/process_0.log'
  until(process, workdir, lambda: ' was not saved (1 of 99 in a row): ' in log.read_text())
  assert not (workdir / 'checkpoints/damaged-8').exists()
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
  finish(process, workdir)
  assert curve(workdir) == curve(whole)
  assert 'warning: ' in printed(workdir) and 'Traceback' not in printed(workdir)
  assert kept(workdir)[-1] == '48'


def test_told_to_end_and_started_again(whole, base, cache, tmp_path):
  """SIGTERM, twice: a checkpoint at the step it had come to, status 75, and the rest as if nothing had happened."""
  workdir = tmp_path / 'run'
  words = [*FLAGS, '--config.train.save_every=1000']
  process = start_training(make_dataset(base), workdir, *words, cache=cache)
  until(process, workdir, lambda: (workdir / LOG_NAME).exists() and (workdir / LOG_NAME).stat().st_size)
  begun = time.monotonic()
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == PREEMPTED, printed(workdir)
  assert time.monotonic() - begun < LIMIT
  (step,) = map(int, kept(workdir))
  assert LOG_EVERY <= step < STEPS
  assert [row['step'] for row in curve(workdir)] == list(range(1, step + 1))
  assert f'preempted: step {step} of {STEPS} is saved in {workdir}/checkpoints' in printed(workdir)
  finish(start_training(make_dataset(base), workdir, *FLAGS, cache=cache), workdir)
  assert curve(workdir) == curve(whole)

"""Where the time of a run went: every second once, over a kill, and no second trainer in between."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import SAVE_EVERY, STEPS, experiment, finish, make_dataset, start_training

from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.goodput import CATEGORIES, LEDGER_NAME, Goodput, describe, process_age, read_ledger, totals
from llava_mini_jax.train.lock import only_trainer
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.metrics import LOG_NAME

pytestmark = pytest.mark.usefixtures('quick_compilation')

BEGAN = time.perf_counter()
LEDGER = [
  {'start': 0, 'at': 100.0},
  {'step': 4, 'at': 120.0, 'seconds': {'start': 6.0, 'compile': 4.0, 'step': 8.0, 'data': 2.0}},
  {'step': 8, 'at': 130.0, 'seconds': {'step': 7.0, 'data': 1.0, 'save': 2.0}},
  {'start': 4, 'at': 135.0},
  {'step': 8, 'at': 150.0, 'seconds': {'restore': 5.0, 'step': 10.0}},
  {'start': 8, 'at': 151.0},
  {'step': 12, 'at': 160.0, 'seconds': {'step': 9.0}},
]


def spent(**seconds: float) -> dict[str, float]:
  return dict.fromkeys(CATEGORIES, 0.0) | seconds


def test_what_was_done_again_is_lost():
  """Steps 5 to 8 of the first life, their waiting for data too, but not the save; each second counts once."""
  found = totals(LEDGER)
  assert found == spent(start=6, compile=4, step=27, data=2, save=2, restore=5, lost=8, down=6)
  assert sum(found.values()) == 60
  assert totals([]) == spent()


def test_lost_steps_are_lost_once():
  assert totals([*LEDGER, {'start': 4, 'at': 160.0}]) == spent(
    start=6, compile=4, step=8, data=2, save=2, restore=5, lost=27, down=6
  )


def test_the_table():
  assert describe(totals(LEDGER)).splitlines() == [
    'goodput 50.0% of 54.0 s; 6.0 s between the lives of the run',
    '  start            6.0 s   11.1%',
    '  restore          5.0 s    9.3%',
    '  compile          4.0 s    7.4%',
    '  data             2.0 s    3.7%',
    '  step            27.0 s   50.0%',
    '  save             2.0 s    3.7%',
    '  lost             8.0 s   14.8%',
  ]


@pytest.fixture
def clock():
  clock = Goodput(BEGAN)
  yield clock
  clock.close()


def test_every_moment_has_one_category(clock, tmp_path):
  clock.open(tmp_path, 0)
  with clock.of('step'):
    time.sleep(0.02)
    with clock.of('data'):
      time.sleep(0.05)
    time.sleep(0.02)
  least = time.perf_counter() - BEGAN
  found = clock.write(4)
  assert found['data'] >= 0.05 and found['step'] >= 0.04
  assert least <= sum(found.values()) <= time.perf_counter() - BEGAN
  assert totals(read_ledger(tmp_path / LEDGER_NAME)) == pytest.approx(found)


def test_compiling_counts_once(clock):
  """A program that calls another, which is traced within: taken from what it happened in, and from nothing else."""
  inner = jax.jit(lambda x: jnp.sin(x) @ x)
  outer = jax.jit(lambda x: sum(inner(x + k) for k in range(40)))
  begun = time.perf_counter()
  with clock.of('step'):
    outer(jnp.ones((4, 4))).block_until_ready()
  wall = time.perf_counter() - begun
  found = clock.write(1)
  assert 0.5 * wall < found['compile'] < wall
  assert found['step'] >= 0 and found['compile'] + found['step'] <= wall
  with clock.of('step'):
    outer(jnp.ones((4, 4))).block_until_ready()
  assert clock.write(2)['compile'] == found['compile']


def test_a_line_cut_short_goes(clock, tmp_path):
  ledger = tmp_path / LEDGER_NAME
  ledger.write_text(''.join(json.dumps(line) + '\n' for line in LEDGER) + '{"step": 16, "at": 17')
  clock.open(tmp_path, 12)
  lines = read_ledger(ledger)
  assert lines[:-1] == LEDGER and lines[-1]['start'] == 12
  assert ledger.read_text().endswith('}\n')


def test_the_age_of_a_process():
  assert 0 < process_age() < time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclasses.dataclass
class Lives:
  """A run that was killed with SIGKILL and then ended well."""

  workdir: Path
  wall: float  # seconds from its first start to its last line
  away: float  # of these, between the kill and the second start
  done: int  # steps logged when it was killed
  refused: str  # what a second trainer was told while the first was running
  first: int  # its process id
  readable: int  # step of the checkpoint that a reader opened meanwhile


@pytest.fixture(scope='module')
def lives(tmp_path_factory) -> Lives:
  dataset, workdir = make_dataset(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp('lives') / 'run'

  def lines() -> int:
    return len((workdir / LOG_NAME).read_bytes().splitlines()) if (workdir / LOG_NAME).exists() else 0

  begun = time.time()
  process = start_training(dataset, workdir, '--config.train.keep=100')
  while lines() < SAVE_EVERY + 8 or not (workdir / 'checkpoints' / str(SAVE_EVERY)).exists():
    assert process.poll() is None, workdir.with_suffix('.log').read_text()
    time.sleep(0.01)
  process.send_signal(signal.SIGSTOP)  # else it may end while others look at it
  with pytest.raises(TrainingError) as refused:
    train(experiment(dataset), workdir)
  run = load_run(workdir, make_mesh((1, 1, 1), devices=jax.devices()[:1]), SAVE_EVERY)
  process.send_signal(signal.SIGKILL)
  process.wait()
  killed, done = time.time(), lines()
  again = start_training(dataset, workdir, '--config.train.keep=100')
  away = time.time() - killed
  finish(again, workdir)
  wall = (workdir / LEDGER_NAME).stat().st_mtime - begun
  return Lives(workdir, wall, away, done, str(refused.value), process.pid, run.step)


def test_a_second_trainer_is_refused(lives):
  """With the first one's host and process; the lock of one that was killed is nobody's, and readers need none."""
  expected = f'process {lives.first} on {socket.gethostname()}'
  assert lives.refused == f'{lives.workdir}: expected to be the only trainer there; found {expected}'
  assert lives.readable == SAVE_EVERY
  with only_trainer(lives.workdir):
    assert (lives.workdir / 'lock').read_text() == f'process {os.getpid()} on {socket.gethostname()}\n'
    with pytest.raises(TrainingError), only_trainer(lives.workdir):
      pass
  with only_trainer(lives.workdir):
    pass


def test_the_seconds_of_a_run_are_its_wall_time(lives):
  """Measured from outside, over both lives, from the first start of a process to the last line: within 1%."""
  found = totals(read_ledger(lives.workdir / LEDGER_NAME))
  print(f'\nledger {sum(found.values()):.3f} s, wall {lives.wall:.3f} s\n{describe(found)}')
  assert sum(found.values()) == pytest.approx(lives.wall, rel=0.01)
  assert all(value >= 0 for value in found.values()), found
  assert found['down'] >= lives.away
  for name in ('start', 'restore', 'compile', 'data', 'step', 'save'):
    assert found[name] > 0, name
  assert found['other'] < 0.1 * lives.wall


def test_steps_lost_to_a_kill(lives):
  """Those after the checkpoint that the second life went on from: exactly what the first life's lines say of them."""
  lines = read_ledger(lives.workdir / LEDGER_NAME)
  second = next(i for i, line in enumerate(lines) if i and 'start' in line)
  start = lines[second]['start']
  assert start >= SAVE_EVERY and lines[second - 1]['step'] == lives.done
  expected = sum(
    line['seconds'].get('step', 0) + line['seconds'].get('data', 0) for line in lines[1:second] if line['step'] > start
  )
  assert totals(lines)['lost'] == pytest.approx(expected)
  assert (expected > 0) == (lives.done > start)


def test_it_is_shown_at_the_end(lives):
  log = lives.workdir.with_suffix('.log').read_text()
  table = describe(totals(read_ledger(lives.workdir / LEDGER_NAME)))
  assert table in log and len(re.findall('^goodput ', log, re.MULTILINE)) == 1  # the killed life did not come to that
  assert table in (lives.workdir / 'logs' / 'process_0.log').read_text()
  assert read_ledger(lives.workdir / LEDGER_NAME)[-1]['step'] == STEPS

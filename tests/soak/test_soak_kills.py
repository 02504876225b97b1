"""Runs that are killed, told to end and moved, many times over: nothing is lost, and no number changes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from lives import PREEMPTED, Life, Run
from tiny_run import experiment, make_dataset

from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.record import by_path
from llava_mini_jax.train.start import trainer_for

pytestmark = pytest.mark.soak

SAVE_EVERY = 4
HEARTBEAT = 5


def flags(steps: int, save_every: int = SAVE_EVERY) -> list[str]:
  return [
    f'--config.train.max_steps={steps}',
    f'--config.train.save_every={save_every}',
    '--config.train.log_every=1',
    f'--heartbeat_timeout={HEARTBEAT}',
  ]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  return make_dataset(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def references(dataset, tmp_path_factory):
  """Runs that nothing happens to, by steps, processes and devices."""
  made = {}

  def reference(steps: int, processes: int, devices: int) -> Life:
    key = steps, processes, devices
    if key not in made:
      workdir = tmp_path_factory.mktemp('reference') / 'run'
      made[key] = Run(dataset, workdir, *flags(steps, 1000), processes=processes, devices=devices).finish()
    return made[key]

  return reference


def kill_again_and_again(run: Run, kills: int, in_saves: int, rng: random.Random) -> int:
  """Lets a run live `kills` times for one or two saves; how many died while a save was being written."""
  moments = ['in a save'] * in_saves + ['any'] * (kills - in_saves)
  rng.shuffle(moments)
  found = 0
  for number, moment in enumerate(moments):
    life, before = run.start(), run.newest
    if moment == 'in a save':
      life.until(lambda start=before: run.newest > start)
      life.until(lambda: run.checkpoints('*orbax-checkpoint-tmp*'))
    else:
      wanted = before + rng.randint(1, 2 * SAVE_EVERY)
      if len(life.processes) > 1:  # who waits for a process that never arrives waits for as long as hosts take to start
        life.until(lambda one=life: '; steps ' in one.printed)
      life.until(lambda at=wanted: run.logged >= at)
      time.sleep(rng.random() * 0.2)
    life.processes[number % len(life.processes)].send_signal(signal.SIGKILL)
    assert all(life.statuses(HEARTBEAT + 60)), 'it ended before it could be killed, or a survivor ended well'
    found += bool(run.checkpoints('*orbax-checkpoint-tmp*'))
    logged, kept = run.logged, run.newest
    assert logged - kept <= 2 * SAVE_EVERY, (logged, kept)  # an interval, and the save in flight
  return found


def check(run: Run, reference: Life, steps: int) -> None:
  assert run.curve == reference.run.curve
  assert len(run.curve) == steps
  assert all(name.isdigit() for name in run.checkpoints()), run.checkpoints()
  seen = set()
  for process in range(len(reference.processes)):
    expected = reference.samples(process)
    for life in run.lives:
      if '; steps ' in life.printed:
        found = {step: rows for step, rows in life.samples(process).items() if step <= steps}
        assert found == {step: expected[step] for step in found}
        seen |= set(found)
  assert seen == set(range(1, steps + 1))


@pytest.mark.parametrize('workers', [0, 2])
def test_r1_killed(dataset, references, tmp_path, workers):
  """kill -9, ten times for each number of workers, five of them in a save."""
  steps, rng = 200, random.Random(workers)
  run = Run(dataset, tmp_path / 'run', *flags(steps), f'--config.data.workers={workers}')
  in_saves = kill_again_and_again(run, 10, 6, rng)
  last = run.finish()
  print(f'\nkills 10, in a save {in_saves}, last life from step {last.first_step}')
  assert in_saves >= 4
  check(run, references(steps, 1, 1), steps)


def test_r2_one_of_two_processes_killed(dataset, references, tmp_path):
  """Either one, ten times; the other ends too."""
  steps, rng = 160, random.Random(2)
  run = Run(dataset, tmp_path / 'run', *flags(steps), processes=2, devices=4)
  in_saves = kill_again_and_again(run, 10, 4, rng)
  last = run.finish()
  print(f'\nkills 10, in a save {in_saves}, last life from step {last.first_step}')
  check(run, references(steps, 2, 4), steps)


@pytest.mark.parametrize(
  ('processes', 'devices', 'when'), [(1, 1, 'twice'), (1, 1, 'in a save'), (2, 4, 'any'), (2, 4, 'in a save')]
)
def test_r3_told_to_end(dataset, references, tmp_path, processes, devices, when):
  steps = 80
  run = Run(dataset, tmp_path / 'run', *flags(steps), processes=processes, devices=devices)
  life = run.start()
  life.until(lambda: run.newest >= SAVE_EVERY)
  if when == 'in a save':
    life.until(lambda: run.checkpoints('*orbax-checkpoint-tmp*'))
  begun = time.monotonic()
  for _ in range(2 if when == 'twice' else 1):
    life.processes[-1].send_signal(signal.SIGTERM)
  assert life.statuses() == [PREEMPTED] * processes, life.printed
  took = time.monotonic() - begun
  print(f'\n{processes} process(es), {when}: {took:.1f} s, step {run.newest} of {run.logged} logged')
  assert took <= 10
  assert run.newest == run.logged < steps
  again = run.finish()
  assert again.first_step == run.newest or again.first_step < run.newest
  check(run, references(steps, processes, devices), steps)


def test_r14_a_dead_peer(dataset, tmp_path):
  """Whichever dies, the other ends within the heartbeat and 5 s."""
  run = Run(dataset, tmp_path / 'run', *flags(10_000), processes=2, devices=1)
  for victim in range(2):
    life, before = run.start(), run.logged
    life.until(lambda at=before: run.logged > at)
    life.processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    statuses = life.statuses(HEARTBEAT + 60)
    took = time.monotonic() - begun
    print(f'\nprocess {victim} killed: the other ended with {statuses[1 - victim]} after {took:.1f} s')
    assert all(statuses) and took <= HEARTBEAT + 5
    if statuses[1 - victim] == 1:  # else the runtime has aborted it, in its own words
      last = Path(f'{life.stem}.log.{1 - victim}').read_text().splitlines()[-1]
      assert last == f'error: process {1 - victim} of 2: what all of them compute failed; is another one gone?'


MESHES = [((8, 1, 1), 1, 8), ((2, 4, 1), 1, 8), ((4, 2, 1), 1, 8), ((1, 8, 1), 1, 8), ((1, 1, 1), 1, 1)]
PROCESSES = [((8, 1, 1), 2, 4), ((8, 1, 1), 4, 2)]


@pytest.fixture(scope='module')
def halfway(dataset, tmp_path_factory) -> Life:
  """A run of 20 steps on (8, 1, 1) that keeps the checkpoint of step 10."""
  workdir = tmp_path_factory.mktemp('halfway') / 'run'
  return Run(dataset, workdir, *flags(20, 10), '--config.train.mesh=(8,1,1)', devices=8).finish()


@pytest.mark.parametrize(('mesh', 'processes', 'devices'), MESHES + PROCESSES)
def test_r4_on_another_mesh(halfway, dataset, tmp_path, mesh, processes, devices):
  """The same samples, and the next ten losses within 1e-5."""
  workdir = shutil.copytree(halfway.run.workdir, tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints/20')
  run = Run(dataset, workdir, *flags(20, 10), f'--config.train.mesh={mesh}'.replace(' ', ''))
  life = run.finish(processes=processes, devices=devices)
  assert life.first_step == 10
  losses = [[float.fromhex(row['loss']) for row in part.curve] for part in (run, halfway.run)]
  np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
  for step in range(11, 21):
    given = [life.samples(process)[step] for process in range(processes)]
    assert sorted(sum(given, [])) == sorted(halfway.samples()[step])


@pytest.mark.parametrize('mesh', [mesh for mesh, *_ in MESHES])
def test_r4_every_byte_on_another_mesh(halfway, dataset, mesh):
  devices = jax.devices()[: int(np.prod(mesh))]
  states = []
  for shape, chosen in (((1, 1, 1), jax.devices()[:1]), (mesh, devices)):
    there = make_mesh(shape, devices=chosen)
    with use_mesh(there), Checkpoints(halfway.run.workdir / 'checkpoints') as checkpoints:
      states.append(by_path(checkpoints.restore(trainer_for(experiment(dataset), there, 20).abstract, 10)[0]))
  assert states[0].keys() == states[1].keys()
  for path, leaf in states[0].items():
    assert np.asarray(leaf).tobytes() == np.asarray(states[1][path]).tobytes(), path


def test_r5_other_numbers_of_workers(dataset, tmp_path):
  """0, then 2, then 3: the same samples and the same curve. Pictures of one colour show no augmentation, which
  tests/data/test_pipeline.py compares over workers.
  """
  words = [*flags(120), '--config.data.flip=0.5', '--config.data.shift=2']
  reference = Run(dataset, tmp_path / 'reference', *words).finish()
  run = Run(dataset, tmp_path / 'run', *words)
  for workers in (0, 2):
    life, before = run.start(f'--config.data.workers={workers}'), run.logged
    life.until(lambda at=before: run.logged >= at + 3)
    os.killpg(life.processes[0].pid, signal.SIGTERM)  # and to its workers, as some schedulers do
    assert life.statuses() == [PREEMPTED], life.printed
  run.finish('--config.data.workers=3')
  check(run, reference, 120)

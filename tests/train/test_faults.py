"""Whole runs with batches that are not finite: what is skipped is as if it had never been, also over a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from faulty_run import Faulty
from tiny_run import experiment, make_dataset

from llava_mini_jax.config import ConfigError
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train import loop
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.metrics import LOG_NAME
from llava_mini_jax.train.start import trainer_for
from llava_mini_jax.train.step import saved_part

STEPS, SAVED = 12, 8
FAULTS = {1: np.nan, 8: np.inf, 9: np.nan}  # the first batch; and the last before a checkpoint, and the one after it
NUMBERS = ('loss', 'accuracy', 'grad_norm', 'learning_rate')

pytestmark = pytest.mark.usefixtures('quick_compilation')


def run(dataset: Path, workdir: Path, *, drop: bool = False, allowed: Sequence[str] = (), **train) -> Path:
  """A run with the faults, or one whose stream does not have these batches."""
  device_batches = loop.device_batches
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'device_batches', lambda rows, where: device_batches(Faulty(rows, FAULTS, drop), where))
    settings = dict(max_steps=STEPS, save_every=SAVED, log_every=2) | train
    loop.train(experiment(dataset, **settings), workdir, allowed=allowed)
  return workdir


def rows(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]


def curve(workdir: Path, count: int) -> list[str]:
  """The numbers of the first so many steps that counted, exactly."""
  return [repr([row[name] for name in NUMBERS]) for row in rows(workdir) if not row['skipped']][:count]


def state(dataset: Path, workdir: Path, step: int, **train) -> dict:
  trainer = trainer_for(experiment(dataset, max_steps=STEPS, **train), make_mesh((-1, 1, 1)), STEPS)
  with use_mesh(trainer.mesh), Checkpoints(workdir / 'checkpoints') as checkpoints:
    return jax.device_get(checkpoints.restore(saved_part(trainer, trainer.abstract), step)[0])


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  return make_dataset(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def whole(dataset, tmp_path_factory) -> Path:
  return run(dataset, tmp_path_factory.mktemp('faults') / 'whole')


def up_to(workdir: Path, copy: Path) -> Path:
  """A copy of the run as it was at the first checkpoint."""
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / 'checkpoints' / str(STEPS))
  return copy


def test_as_if_the_batches_had_never_been(dataset, whole, tmp_path):
  """A step is lost, nothing else: the first batch, and two in a row."""
  found = rows(whole)
  assert [row['step'] for row in found] == list(range(1, STEPS + 1))
  assert {row['step'] for row in found if row['skipped']} == set(FAULTS)
  assert {row['step'] for row in found if row['loss'] is None} == set(FAULTS)
  count = STEPS - len(FAULTS)
  without = run(dataset, tmp_path / 'without', drop=True, save_every=count)
  assert curve(whole, count) == curve(without, count)
  after, expected = state(dataset, whole, STEPS), state(dataset, without, count)
  for part in ('params', 'opt'):
    for a, b in zip(jax.tree.leaves(after[part]), jax.tree.leaves(expected[part]), strict=True):
      assert a.tobytes() == b.tobytes()


def test_counters_go_on_after_a_resume(dataset, whole, tmp_path):
  """From a checkpoint in the middle of two skipped steps, to the same numbers and counters."""
  middle = state(dataset, whole, SAVED)['guard']
  assert (middle['skipped'], middle['consecutive']) == (2, 1)
  again = run(dataset, up_to(whole, tmp_path / 'again'))
  plain = ({name: row[name] for name in (*NUMBERS, 'skipped')} for row in rows(again))
  assert list(map(repr, plain)) == [repr({n: row[n] for n in (*NUMBERS, 'skipped')}) for row in rows(whole)]
  found, expected = (state(dataset, workdir, STEPS)['guard'] for workdir in (again, whole))
  assert found == expected and (found['skipped'], found['consecutive']) == (3, 0)


@pytest.mark.slow
def test_too_many_over_a_resume(dataset, whole, tmp_path):
  with pytest.raises(TrainingError) as error:
    run(dataset, up_to(whole, tmp_path / 'again'), max_skipped=2)
  assert str(error.value).splitlines() == [
    'step 9: 2 step(s) skipped in a row, 1 of them before it was resumed (train.max_skipped=2); '
    'parameters are those from before the first:',
    '  step 9: expected finite numbers; found loss nan, grad_norm nan',
  ]


@pytest.mark.slow
def test_a_change_that_is_allowed(dataset, whole, tmp_path):
  """Here a spike rule. By its name alone; it is logged, and what the run is compared with from then on."""
  again, name = up_to(whole, tmp_path / 'again'), 'config.train.spike_sigmas'
  with pytest.raises(ConfigError, match=f'{name}: was 0.0, is 6.0$'):
    run(dataset, again, spike_sigmas=6.0)
  for place in (again, tmp_path / 'new'):
    with pytest.raises(ConfigError) as error:
      run(dataset, place, allowed=(name, 'spike_sigmas'), spike_sigmas=6.0)
    assert str(error.value) == f"allow_config_change: expected a name as '{name}'; found 'spike_sigmas'"
  for _ in range(2):  # the same command starts it again
    run(dataset, again, allowed=(name, 'config.train.seed'), spike_sigmas=6.0)
  said = f'allowed to differ from step {SAVED} on: {name}: was 0.0, is 6.0'
  assert said in (again / 'logs' / 'process_0.log').read_text()
  with Checkpoints(again / 'checkpoints') as checkpoints:
    assert checkpoints.meta(STEPS)['config']['train']['spike_sigmas'] == 6.0
  counters = state(dataset, again, STEPS, spike_sigmas=6.0)['guard']
  assert (counters['skipped'], counters['consecutive'], counters['accepted']) == (3, 0, 3)
  assert curve(again, STEPS) == curve(whole, STEPS)


@pytest.mark.slow
def test_a_checkpoint_from_before_there_was_a_guard(dataset, whole, tmp_path):
  """Its counters begin anew, and its curve goes on."""
  old = tmp_path / 'old'
  up_to(whole, old)
  kept = state(dataset, whole, SAVED)
  with Checkpoints(whole / 'checkpoints') as checkpoints:
    meta = checkpoints.meta(SAVED)
  for field in ('max_skipped', 'spike_sigmas', 'spike_window'):
    del meta['config']['train'][field]
  shutil.rmtree(old / 'checkpoints')
  with Checkpoints(old / 'checkpoints', keep=3) as checkpoints:
    checkpoints.save(SAVED, {name: part for name, part in kept.items() if name != 'guard'}, meta)
    checkpoints.wait()
  run(dataset, old)
  counters = state(dataset, old, STEPS)['guard']
  assert (counters['skipped'], counters['consecutive']) == (1, 0)
  # The schedule's own count is in the optimizer; only what is reported of it has forgotten the two skipped steps.
  assert [row['loss'] for row in rows(old)] == [row['loss'] for row in rows(whole)]

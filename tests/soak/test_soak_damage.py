"""Damage to every file of a checkpoint, bit by bit and whole, and saves while their buffers are overwritten."""

from __future__ import annotations

import collections
import logging
import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import DAMAGES, files, flip_bit
from tiny_run import experiment, finish, make_dataset, start_training

from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import DamagedError
from llava_mini_jax.train.record import by_path
from llava_mini_jax.train.start import trainer_for

# Orbax leaves reads alone when one of them fails; `llava_mini_jax.train.quiet` is what hides that from users.
left_alone = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
pytestmark = [pytest.mark.soak, left_alone]

STEPS = 8


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
  """Checkpoints that the real program wrote."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  words = [f'--config.train.max_steps={STEPS}', f'--config.train.save_every={STEPS}']
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  return finish(start_training(dataset, workdir, *words), workdir) / 'checkpoints'


@pytest.fixture
def restore(saved):
  trainer = trainer_for(experiment('any'), make_mesh((1, 1, 1), devices=jax.devices()[:1]), STEPS)

  def read(directory: Path) -> tuple[dict[str, bytes], dict]:
    state, meta = Checkpoints(directory).restore(trainer.abstract, STEPS)
    return {path: np.asarray(leaf).tobytes() for path, leaf in by_path(state).items()}, meta

  return read


def test_r6_single_bits(saved, restore, tmp_path):
  """300 of them, over all files, as many in each as it is large or more: found out, or nothing is other than it was."""
  directory = shutil.copytree(saved, tmp_path / 'checkpoints')
  expected, rng = restore(directory), random.Random(0)
  there, found = files(directory), collections.Counter()
  weights = [path.stat().st_size for path in there]
  for n in range(300):
    path = rng.choice(there) if n % 2 else rng.choices(there, weights)[0]
    good = path.read_bytes()
    flip_bit(path, rng)
    try:
      outcome = 'nothing changed' if restore(directory) == expected else 'silent'
    except DamagedError as error:
      assert str(error).startswith(f'{directory}/{STEPS} is damaged: ')
      leaf = re.search(r'(params|opt)/\w+|metadata', str(error))
      outcome = 'found out' if leaf else 'nothing named'
    found[outcome] += 1
    path.write_bytes(good)
  print(f'\n{dict(found)}')
  assert found.keys() <= {'nothing changed', 'found out'}


@pytest.mark.parametrize('damage', DAMAGES)
def test_r7_every_file(saved, restore, tmp_path, damage, caplog):
  expected, found = restore(saved), collections.Counter()
  for path in files(saved):
    directory = shutil.copytree(saved, tmp_path / 'checkpoints')
    DAMAGES[damage](directory / path.relative_to(saved))
    try:
      assert restore(directory) == expected
      found['nothing changed'] += 1
    except DamagedError as error:
      assert str(error).startswith(f'{directory}/{STEPS} is damaged: ') and '\n' not in str(error)
      found['found out'] += 1
    shutil.rmtree(directory)
  print(f'\n{damage}: {dict(found)}')


def test_r10_fifty_saves_of_donated_buffers(tmp_path, caplog):
  """Each is on disk as it was when `save` returned, though three more steps have overwritten it since."""

  @jax.jit
  def value(n):
    return {'params': {str(i): jax.random.normal(jax.random.key(n * 50 + i), (512, 512)) for i in range(4)}}

  step = jax.jit(lambda state: jax.tree.map(lambda x: jax.numpy.sin(3 * x) + x, state), donate_argnums=0)
  expected, different = {}, 0
  with Checkpoints(tmp_path, verify=False) as checkpoints, caplog.at_level(logging.INFO, 'llava_mini_jax'):
    for n in range(1, 51):
      state = step(value(n))
      expected[n] = {path: np.array(leaf) for path, leaf in state['params'].items()}
      checkpoints.save(n, state, {'n': n})
      for _ in range(3):
        state = step(state)
    checkpoints.wait()
    shardings = {path: leaf.sharding for path, leaf in state['params'].items()}
    for n, leaves in expected.items():
      found = checkpoints.restore_parameters(shardings, n)
      different += sum(
        int((np.asarray(found[path]).view(np.uint8) != leaf.view(np.uint8)).sum()) for path, leaf in leaves.items()
      )
  said = [re.search(r': ([\d.]+) s blocked: ([\d.]+) s by the one before', text) for text in caplog.messages]
  blocked = [[float(seconds) for seconds in found.groups()] for found in said if found]
  print(f'\n50 saves of 4 MiB: {different} bytes differ')
  total, before = np.median(blocked, axis=0)
  print(f'blocked {total:.3f} s (median) a save, {before:.3f} s of them by the one before, which never has time to end')
  assert len(blocked) == 50 and different == 0

"""The recipes for clusters: clean shell scripts that say what they would run on which host."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / 'launch'
CONFIG = '--config=configs/llava_mini_vicuna_7b.py:stage2'
WORDS = [CONFIG, '--workdir=/shared/a run', '--config.train.mesh=(1,-1,1)']
ENVIRONMENT = {
  'tpu_vm': dict(TPU='pod', ZONE='z', HOSTS='3', REPOSITORY='https://host/a b.git'),
  'gke_xpk': dict(CLUSTER='c', ZONE='z', IMAGE='image', HOSTS_PER_SLICE='2', SLICES='2'),
  'slurm': dict(SLURM_JOB_NUM_NODES='2', SLURM_NTASKS_PER_NODE='2'),
}


def dry_run(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ['bash', LAUNCH / f'{name}.sh', *words],
    env=dict(PATH=os.environ['PATH'], DRY_RUN='1', **environment),
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def lines() -> dict[str, list[str]]:
  found = {}
  for name, environment in ENVIRONMENT.items():
    done = dry_run(name, *WORDS, **environment)
    assert (done.returncode, done.stderr) == (0, ''), name
    found[name] = done.stdout.splitlines()
  return found


@pytest.mark.parametrize('script', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_shellcheck(script):
  done = subprocess.run([Path(sys.executable).with_name('shellcheck'), script], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, '')


@pytest.mark.parametrize(
  ('name', 'where'),
  [
    ('tpu_vm', [f'host {i}' for i in range(3)]),
    ('gke_xpk', [f'slice {s} host {h}' for s in range(2) for h in range(2)]),
    ('slurm', [f'node {i // 2} task {i}' for i in range(4)]),
  ],
)
def test_every_host_gets_the_command(lines, name, where):
  """Once each, with the user's words as they were."""
  training = [line.split(': ', 1) for line in lines[name] if re.match(r'(host|slice|node) .*launch/train.py', line)]
  assert [place for place, _ in training] == where
  for _, command in training:
    words = shlex.split(command.split(' && ')[-1])
    assert words[1] == 'launch/train.py'
    assert [word for word in words[2:] if word in WORDS] == WORDS


def test_slices_of_gke(lines):
  """The mesh is laid over them before the user's own flags, of which the last counts; xpk gets the same command."""
  submitted, first = shlex.split(lines['gke_xpk'][0]), lines['gke_xpk'][1].split(': ', 1)[1]
  assert submitted[:3] == ['xpk', 'workload', 'create']
  assert {'--num-slices=2', f'--command={first}'} <= set(submitted)
  flags = ['--config.train.slices=2', '--config.train.mesh=(2,-1,1)']
  assert shlex.split(first)[2:] == [CONFIG, *flags, *WORDS[1:]]
  one = dry_run('gke_xpk', *WORDS, **ENVIRONMENT['gke_xpk'] | dict(SLICES='1')).stdout
  assert 'train.slices' not in one


def test_a_tpu_is_made_and_installed_first(lines):
  created, *rest = lines['tpu_vm']
  assert shlex.split(created)[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'pod']
  assert 'git clone' in rest[0] and shlex.quote('https://host/a b.git').strip("'") in rest[0].replace('\\', '')


@pytest.mark.parametrize('name', ['tpu_vm', 'gke_xpk'])
def test_what_is_missing_is_named(name):
  done = dry_run(name, *WORDS)
  assert done.returncode != 0
  assert re.search(r': (TPU|CLUSTER): set (TPU|CLUSTER) to the name of the ', done.stderr)


def test_slurm_does_not_start_outside_of_a_job():
  done = subprocess.run(
    ['bash', LAUNCH / 'slurm.sh'], env=dict(PATH=os.environ['PATH']), capture_output=True, text=True
  )
  assert done.returncode != 0 and 'start it with sbatch' in done.stderr

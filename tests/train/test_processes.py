"""Two processes on one machine train, resume and evaluate as one process does that has the devices of both."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from faulty_run import FAULTS
from processes import start_processes
from tiny_run import make_dataset

from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.lock import only_trainer
from llava_mini_jax.train.metrics import LOG_NAME

STEPS, HALF = 12, 6
EXACT = ('step', 'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate', 'skipped')


@dataclasses.dataclass
class Run:
  workdir: Path
  printed: list[str]  # by each process, stdout and stderr together

  @property
  def rows(self) -> list[dict]:
    found = [json.loads(line) for line in (self.workdir / LOG_NAME).read_text().splitlines()]
    return [{name: row[name] for name in EXACT} for row in found]

  def samples(self, process: int) -> list[list[str]]:
    """Hashes of the rows of each batch that the process gave."""
    path = self.workdir.with_name(f'{self.workdir.name}.{process}.jsonl')
    return [json.loads(line) for line in path.read_text().splitlines()][:STEPS]  # more were prepared ahead


def start(program: list, count: int, devices: int, *, ends_well: bool = True) -> list[str]:
  """Runs it as so many processes of so many devices each; what each of them printed."""
  started = start_processes(program, count, devices)
  printed = [process.communicate()[0] for process in started]
  assert [process.returncode == 0 for process in started] == [ends_well] * count, '\n'.join(printed)
  return printed


def train(dataset: Path, workdir: Path, count: int, devices: int, *overrides: str) -> Run:
  program = [
    'tests/faulty_run.py',
    f'{workdir}.{{process}}.jsonl',
    f'--config=tests/tiny_run.py:{dataset}',
    f'--workdir={workdir}',
    f'--config.train.max_steps={STEPS}',
    f'--config.train.save_every={HALF}',
    *overrides,
  ]
  return Run(workdir, start(program, count, devices))


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> dict[str, Run]:
  """`two` processes of four devices and `one` of eight; `again`, from the checkpoint in the middle of `two`."""
  dataset, root = make_dataset(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp('processes')
  with concurrent.futures.ThreadPoolExecutor() as pool:
    jobs = {
      'two': pool.submit(train, dataset, root / 'two', 2, 4),
      'one': pool.submit(train, dataset, root / 'one', 1, 8),
    }
    found = {name: job.result() for name, job in jobs.items()}
  return found | {'again': train(dataset, resumable(found['two'], root / 'again'), 2, 4)}


@pytest.fixture(scope='module')
def layered(runs, tmp_path_factory) -> dict[str, Run]:
  """A parameter over two processes (`split`) and over two devices of one (`whole`); `two` resumed on two slices."""
  dataset, root = make_dataset(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp('layered')
  tensor, slices = '--config.train.mesh=(1,1,2)', ('--config.train.mesh=(2,4,1)', '--config.train.slices=2')
  with concurrent.futures.ThreadPoolExecutor() as pool:
    jobs = {
      'split': pool.submit(train, dataset, root / 'split', 2, 1, tensor),
      'whole': pool.submit(train, dataset, root / 'whole', 1, 2, tensor),
      'moved': pool.submit(train, dataset, resumable(runs['two'], root / 'moved'), 2, 4, *slices),
    }
    return {name: job.result() for name, job in jobs.items()}


def resumable(run: Run, workdir: Path) -> Path:
  """A copy that ends with the checkpoint in the middle."""
  shutil.copytree(run.workdir, workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  return workdir


def close(found: list[dict], expected: list[dict]) -> None:
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    numbers = (np.array([row[name] for name in EXACT], float) for row in (a, b))  # null is NaN
    np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-5)


def test_same_numbers_as_one_process(runs):
  assert [row['step'] for row in runs['two'].rows] == list(range(1, STEPS + 1))
  close(runs['two'].rows, runs['one'].rows)


def test_processes_agree_on_what_they_skip(runs):
  """The numbers that are none come from one of two processes; neither takes the step."""
  for run in runs.values():
    assert {row['step'] for row in run.rows if row['skipped']} == set(FAULTS)
    assert {row['step'] for row in run.rows if row['loss'] is None} == set(FAULTS)


def test_same_samples_as_one_process(runs):
  """Each process gives half of every batch, and together they are the batch of one process."""
  whole = runs['one'].samples(0)
  halves = [runs['two'].samples(process) for process in range(2)]
  for batch, *parts in zip(whole, *halves, strict=True):
    assert [len(part) for part in parts] == [4, 4]
    assert sorted(parts[0] + parts[1]) == sorted(batch)
  assert len({row for batch in whole for row in batch}) == 12  # that there is something to confuse


@pytest.mark.slow
def test_processes_of_one_parameter_read_the_same_rows(layered):
  """Of a row, every process that holds parts of the parameters needs all."""
  assert layered['split'].samples(0) == layered['split'].samples(1) == layered['whole'].samples(0)
  assert len(layered['split'].rows) == STEPS
  close(layered['split'].rows, layered['whole'].rows)


def test_resumed_by_two_processes(runs):
  assert 'steps 6 to 12' in runs['again'].printed[0]
  assert runs['again'].rows == runs['two'].rows


@pytest.mark.slow
def test_resumed_on_a_mesh_of_two_slices(runs, layered):
  """`data` over the processes, `fsdp` within them."""
  assert "'data': 2, 'fsdp': 4" in layered['moved'].printed[0]
  assert layered['moved'].rows[:HALF] == runs['two'].rows[:HALF]
  close(layered['moved'].rows, runs['two'].rows)


def test_one_writes_and_each_logs(runs):
  two, one = runs['two'], runs['one']
  names = sorted(path.name for path in one.workdir.iterdir())
  assert sorted(path.name for path in two.workdir.iterdir()) == names
  assert len(list((two.workdir / 'tensorboard').iterdir())) == 1
  assert [path.name for path in sorted((two.workdir / 'logs').iterdir())] == ['process_0.log', 'process_1.log']
  for index in range(2):
    lines = (two.workdir / 'logs' / f'process_{index}.log').read_text().splitlines()
    assert f'process {index} of 2 on ' in lines[0]
    assert any(f'step {STEPS}: loss ' in line for line in lines[-20:]) and lines[-1].endswith('finished')
  gloo = re.compile('Gloo|peer ranks')  # its threads write into each other's lines
  shown = [line for line in two.printed[1].splitlines() if not gloo.search(line)]
  assert shown == [], 'only the first process shows progress'
  assert 'parameters train' in two.printed[0]


def test_a_checkpoint_of_both(runs):
  with Checkpoints(runs['two'].workdir / 'checkpoints') as checkpoints:
    assert checkpoints.latest_step == STEPS
    assert checkpoints.meta()['data'] == {'global_next_index': STEPS * 8}


def test_two_processes_are_refused_where_another_trains(tmp_path, tmp_path_factory):
  """Only the first asks for the lock, and both end with the same line."""
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  program = ['launch/train.py', f'--config=tests/tiny_run.py:{dataset}', f'--workdir={tmp_path}']
  with only_trainer(tmp_path):
    printed = start(program, 2, 1, ends_well=False)
  for text in printed:
    assert f'error: {tmp_path}: expected to be the only trainer there; found process {os.getpid()} on ' in text
  assert sorted(path.name for path in tmp_path.iterdir()) == ['lock']


def evaluated(run: Path, dataset: Path, out: Path, count: int) -> tuple[dict, list[list[int]]]:
  """Eleven questions by so many processes: what was written, and what each process read in order to ask."""
  out.mkdir()
  words = [f'--workdir={run}', f'--dataset={dataset}', '--split=train', '--batch_size=8', '--limit=11', f'--out={out}']
  printed = start(['tests/recorded_evaluation.py', f'{out}/read.{{process}}', *words], count, 4 // count)
  assert 'exact match' in printed[0]
  assert all('exact match' not in text for text in printed[1:])
  assert (out / 'contact_sheet_real_first_11.png').exists()
  read = [json.loads((out / f'read.{process}').read_text()) for process in range(count)]
  return json.loads((out / 'answers_real_first_11.json').read_text()), read


@pytest.fixture(scope='module')
def alone(runs, tmp_path_factory):
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  return evaluated(runs['two'].workdir, dataset, tmp_path_factory.mktemp('alone') / 'out', 1)


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluated_by_several_processes(runs, alone, tmp_path_factory, tmp_path, count):
  """Each reads its own questions, all are asked, and the answers are those of one process; 11 do not divide."""
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  written, read = evaluated(runs['two'].workdir, dataset, tmp_path / 'out', count)
  assert written == alone[0] and len(written['answers']) == 11
  assert alone[1] == [list(range(11))]
  last = [part for part in read if part[-1:] == [10]]  # a process without a row in the last batch repeats its last one
  assert sorted(index for part in read for index in part) == [*range(11), *[10] * (len(last) - 1)]
  rows = 8 // count
  assert [part[:rows] for part in read] == [list(range(p * rows, (p + 1) * rows)) for p in range(count)]

"""Two processes of one run: one is told to end, killed, or reads another checkpoint than it was; both do the same."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import files
from processes import start_processes
from tiny_run import make_dataset

from llava_mini_jax.train.metrics import LOG_NAME

STARTED: list[subprocess.Popen] = []
LIMIT = 60  # seconds; the soak test, alone on its machine, holds it to 10
STEPS, HEARTBEAT, PREEMPTED = 60, 5, 75
EXACT = ('step', 'loss', 'accuracy', 'target_tokens', 'grad_norm', 'learning_rate')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  return make_dataset(tmp_path_factory.getbasetemp())


def start(dataset: Path, workdir: Path, *overrides: str) -> list[subprocess.Popen]:
  words = [f'--config=tests/tiny_run.py:{dataset}', f'--workdir={workdir}', f'--heartbeat_timeout={HEARTBEAT}']
  flags = [f'--config.train.max_steps={STEPS}', '--config.train.log_every=1', *overrides]
  found = start_processes(['launch/train.py', *words, *flags], 2, 4, log=workdir)
  STARTED.extend(found)
  return found


@pytest.fixture(autouse=True)
def nothing_stays():
  yield
  while STARTED:
    process = STARTED.pop()
    process.kill()
    process.wait()


def printed(workdir: Path) -> str:
  return ''.join(Path(f'{workdir}.{index}').read_text() for index in range(2))


def curve(workdir: Path) -> list[dict]:
  rows = map(json.loads, (workdir / LOG_NAME).read_text().splitlines())
  return [{name: row[name] for name in EXACT} for row in rows]


def until(processes: list[subprocess.Popen], workdir: Path, what: Callable[[], bool]) -> None:
  while not what():
    assert all(process.poll() is None for process in processes), printed(workdir)
    time.sleep(0.005)


def steps(workdir: Path) -> int:
  return (workdir / LOG_NAME).read_bytes().count(b'\n') if (workdir / LOG_NAME).exists() else 0


def checkpoints(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


def ended(processes: list[subprocess.Popen], within: float) -> list[int]:
  until = time.monotonic() + within
  return [process.wait(max(0.1, until - time.monotonic())) for process in processes]


@pytest.mark.slow
def test_one_is_told_to_end_then_one_dies_then_a_checkpoint_is_damaged(dataset, tmp_path):
  """One story, since every start takes long: each time both processes do the same, and the curve stays one curve."""
  workdir = tmp_path / 'run'

  told = start(dataset, workdir, '--config.train.save_every=1000')
  until(told, workdir, lambda: steps(workdir) >= 2)
  told[1].send_signal(signal.SIGTERM)
  assert ended(told, LIMIT) == [PREEMPTED] * 2, printed(workdir)
  (first,) = checkpoints(workdir)
  assert [row['step'] for row in curve(workdir)] == list(range(1, int(first) + 1))
  assert f'preempted: step {first} of {STEPS} is saved in {workdir}/checkpoints' in printed(workdir)

  killed = start(dataset, workdir, '--config.train.save_every=4')
  until(killed, workdir, lambda: len([name for name in checkpoints(workdir) if name.isdigit()]) >= 3)
  killed[1].kill()
  assert all(ended(killed, HEARTBEAT + LIMIT)), 'a survivor ended as if all were well'
  before = curve(workdir)

  newest = max((workdir / 'checkpoints').glob('[0-9]*'), key=lambda path: int(path.name) if path.name.isdigit() else 0)
  for file in files(newest / 'state' / 'ocdbt.process_1' / 'd'):  # what the second process wrote, and reads
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 64):
      data[at] ^= 16
    file.write_bytes(data)
  again = start(dataset, workdir, '--config.train.save_every=1000')
  assert ended(again, 300) == [0, 0], printed(workdir)
  assert f'{newest} is damaged: ' in printed(workdir)
  assert f'damaged-{newest.name}' in checkpoints(workdir)
  assert all(name.isdigit() or name == f'damaged-{newest.name}' for name in checkpoints(workdir))
  after = curve(workdir)
  assert [row['step'] for row in after] == list(range(1, STEPS + 1))
  assert after[: len(before)] == before

"""Two processes of one run: one is told to end, killed, or reads another checkpoint than it was; both do the same."""

from __future__ import annotations

import signal

import pytest
from damage import files
from lives import PREEMPTED, Run
from tiny_run import make_dataset

LIMIT = 60  # seconds; the soak test, alone on its machine, holds it to 10
STEPS, HEARTBEAT = 60, 5


@pytest.mark.slow
def test_one_is_told_to_end_then_one_dies_then_a_checkpoint_is_damaged(tmp_path, tmp_path_factory):
  """One story, since every start takes long: each time both processes do the same, and the curve stays one curve."""
  flags = f'--heartbeat_timeout={HEARTBEAT}', f'--config.train.max_steps={STEPS}', '--config.train.log_every=1'
  dataset, workdir = make_dataset(tmp_path_factory.getbasetemp()), tmp_path / 'run'
  run = Run(dataset, workdir, *flags, processes=2, devices=4)

  told = run.start('--config.train.save_every=1000')
  told.until(lambda: run.logged >= 2)
  told.processes[1].send_signal(signal.SIGTERM)
  assert told.statuses(LIMIT) == [PREEMPTED] * 2, told.printed
  (first,) = run.checkpoints()
  assert [float.fromhex(row['step']) for row in run.curve] == list(range(1, int(first) + 1))
  assert f'preempted: step {first} of {STEPS} is saved in {workdir}/checkpoints' in told.printed

  killed = run.start('--config.train.save_every=4')
  killed.until(lambda: len([name for name in run.checkpoints() if name.isdigit()]) >= 3)
  killed.processes[1].kill()
  assert all(killed.statuses(HEARTBEAT + LIMIT)), 'a survivor ended as if all were well'
  before = run.curve

  newest = workdir / 'checkpoints' / str(run.newest)
  for file in files(newest / 'state' / 'ocdbt.process_1' / 'd'):  # what the second process wrote, and reads
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 64):
      data[at] ^= 16
    file.write_bytes(data)
  again = run.start('--config.train.save_every=1000')
  assert again.statuses(300) == [0, 0], again.printed
  assert f'{newest} is damaged: ' in again.printed
  assert f'damaged-{newest.name}' in run.checkpoints()
  assert all(name.isdigit() or name == f'damaged-{newest.name}' for name in run.checkpoints())
  after = run.curve
  assert [float.fromhex(row['step']) for row in after] == list(range(1, STEPS + 1))
  assert after[: len(before)] == before

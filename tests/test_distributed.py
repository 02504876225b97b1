"""Who a process is, by flags, by JAX's variables and by schedulers; what is told when they contradict."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_run import command, environment

from llava_mini_jax.config import ConfigError
from llava_mini_jax.distributed import SINGLE, Cluster, find_cluster
from llava_mini_jax.sharding import MESH_AXES, MeshError, make_mesh, process_rows

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '16',
  'SLURM_PROCID': '3',
  'SLURM_LOCALID': '3',
}
GKE = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2', 'MEGASCALE_NUM_SLICES': '2'}
JAX = {'JAX_COORDINATOR_ADDRESS': '10.0.0.1:8476', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}


@pytest.fixture
def no_chips(tmp_path):
  return tmp_path


@pytest.fixture
def chips(tmp_path):
  return pci_devices(tmp_path, {'0000:00:03.0': ('0x1af4', '0x1000'), '0000:00:04.0': ('0x1ae0', '0x0063')})


def pci_devices(path, found):
  for name, (vendor, device) in found.items():
    (path / name).mkdir()
    (path / name / 'vendor').write_text(f'{vendor}\n')
    (path / name / 'device').write_text(f'{device}\n')
  return path


def test_a_network_card_of_the_same_maker_is_no_chip(tmp_path):
  devices = pci_devices(tmp_path, {'0000:00:04.0': ('0x1ae0', '0x0042')})
  assert find_cluster(None, None, None, environment={}, devices=devices) == SINGLE


@pytest.mark.parametrize(
  ('flags', 'environment', 'expected'),
  [
    ((None, None, None), {}, SINGLE),
    (('10.0.0.1:8476', 4, 0), {}, Cluster('flags', '10.0.0.1:8476', 4, 0)),
    ((None, None, None), JAX, Cluster('flags', '10.0.0.1:8476', 4, 3)),
    ((None, 4, None), JAX, Cluster('flags', '10.0.0.1:8476', 4, 3)),
    ((None, None, None), SLURM, Cluster('slurm', None, 16, 3)),
    ((None, None, None), SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, SINGLE),
    ((None, None, None), {name: SLURM[name] for name in ('SLURM_JOB_ID', 'SLURM_NTASKS')}, SINGLE),  # not in srun
    (('node1:1234', 16, 3), SLURM, Cluster('flags', 'node1:1234', 16, 3)),
    ((None, 1, None), SLURM, SINGLE),
    ((None, None, None), GKE, Cluster('gke', None, 8, None)),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'localhost'}, SINGLE),
    ((None, None, None), GKE | {'JAX_PLATFORMS': 'cpu'}, SINGLE),
  ],
)
def test_who_the_processes_are(no_chips, flags, environment, expected):
  assert find_cluster(*flags, environment=environment, devices=no_chips) == expected


def test_a_tpu_vm_is_known_by_its_chips(chips, tmp_path):
  assert find_cluster(environment={}, devices=chips) == Cluster('tpu_vm')
  assert find_cluster(environment={'JAX_PLATFORMS': 'cpu'}, devices=chips) == SINGLE
  assert find_cluster(environment={'TPU_SKIP_MDS_QUERY': '1'}, devices=chips) == SINGLE
  assert find_cluster(num_processes=1, environment={}, devices=chips) == SINGLE


@pytest.mark.parametrize(
  ('flags', 'environment', 'message'),
  [
    (
      ('10.0.0.1:8476', None, 0),
      {},
      "processes: expected --coordinator, --num_processes and --process_id; missing ['--num_processes']",
    ),
    (
      (None, 2, None),
      {},
      "processes: expected --coordinator, --num_processes and --process_id; missing ['--coordinator', '--process_id']",
    ),
    (('10.0.0.1', 2, 0), {}, "--coordinator: expected HOST:PORT; found '10.0.0.1'"),
    (('10.0.0.1:8476', 2, 2), {}, '--process_id: expected 0 to 1; found 2'),
    (('10.0.0.1:8476', 8, 3), SLURM, '--num_processes: expected 16, which slurm says; found 8'),
    (('10.0.0.1:8476', 16, 4), SLURM, '--process_id: expected 3, which slurm says; found 4'),
    (('10.0.0.1:8476', 4, 0), GKE, '--num_processes: expected 8, which gke says; found 4'),
    ((None, 2, None), JAX, '--num_processes: expected 4, which JAX_NUM_PROCESSES says; found 2'),
    (
      ('10.0.0.2:8476', None, None),
      JAX,
      "--coordinator: expected '10.0.0.1:8476', which JAX_COORDINATOR_ADDRESS says; found '10.0.0.2:8476'",
    ),
    ((None, None, None), JAX | {'JAX_PROCESS_ID': 'x'}, "JAX_PROCESS_ID: expected an integer; found 'x'"),
  ],
)
def test_contradictions(no_chips, flags, environment, message):
  with pytest.raises(ConfigError) as caught:
    find_cluster(*flags, environment=environment, devices=no_chips)
  assert str(caught.value) == message


def test_processes_that_do_not_meet():
  """The coordinator alone, and another without a coordinator: one line each, in time, and no trace of the runtime."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  absent = f'127.0.0.1:{port + 1 if port < 65535 else port - 1}'
  flags = ['--config=configs/tiny_easy_vqa.py', '--workdir=runs/never', '--num_processes=2', '--start_timeout=3']
  begun = time.monotonic()
  started = {
    (0, f'127.0.0.1:{port}'): command('train', *flags, f'--coordinator=127.0.0.1:{port}', '--process_id=0'),
    (1, absent): command('train', *flags, f'--coordinator={absent}', '--process_id=1'),
  }
  for (index, address), process in started.items():
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.splitlines() == [
      f'error: process {index} of 2 (flags): the others did not meet it at {address} within 3 s; '
      'are all of them started, with the same --coordinator, and may they reach each other?'
    ]
  assert time.monotonic() - begun < 100


SUSPENDED = """
import os, signal, subprocess, time
import jax
from llava_mini_jax.distributed import SINGLE, processes

with processes(SINGLE, heartbeat=1):
  assert jax.distributed.is_initialized()
  subprocess.Popen(['sh', '-c', f'sleep 5; kill -CONT {os.getpid()}'])
  os.kill(os.getpid(), signal.SIGSTOP)
  time.sleep(5)
  print(jax.process_count())
assert not jax.distributed.is_initialized()
"""


def test_a_single_process_may_be_suspended():
  """A laptop that slept, a job that was put aside: nobody waited for it."""
  done = subprocess.run([sys.executable, '-c', SUSPENDED], capture_output=True, text=True, env=environment(1))
  assert (done.returncode, done.stdout) == (0, '1\n'), done.stderr


class Device:
  """As much of a device of another process as a mesh needs."""

  platform = device_kind = 'cpu'

  def __init__(self, index: int, process_index: int, slice_index: int = 0):
    self.id, self.process_index, self.slice_index = index, process_index, slice_index
    self.client = jax.devices()[0].client


def mesh_of(shape: tuple[int, int, int], processes: int) -> Mesh:
  count = int(np.prod(shape))
  devices = [Device(i, i * processes // count) for i in range(count)]
  return Mesh(np.array(devices).reshape(shape), MESH_AXES)


@pytest.mark.parametrize(
  ('shape', 'processes', 'expected'),
  [
    ((8, 1, 1), 1, [(0, 1)]),
    ((8, 1, 1), 2, [(0, 2), (1, 2)]),
    ((2, 4, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 2, 2), 2, [(0, 2), (1, 2)]),
    ((1, 2, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes hold the same rows
    ((1, 1, 8), 4, [(0, 1)] * 4),
  ],
)
def test_rows_of_a_process(shape, processes, expected):
  mesh = mesh_of(shape, processes)
  assert [process_rows(mesh, process) for process in range(processes)] == expected


def test_rows_that_processes_half_share():
  devices = [Device(i, p) for i, p in enumerate([0, 0, 1, 0, 1, 1])]
  mesh = Mesh(np.array(devices).reshape(3, 1, 2), MESH_AXES)
  with pytest.raises(MeshError, match='2 processes share some rows of a batch, but not all of them'):
    process_rows(mesh, 0)


@pytest.mark.parametrize('by', ['slices', 'processes'])
def test_data_lies_over_the_slices(by):
  """Whole slices along `data`, outermost, in whatever order the devices come."""
  devices = [Device(i, 0, i // 4) if by == 'slices' else Device(i, i // 4) for i in range(8)]
  for shape, per_slice in (((2, 4, 1), (1, 4, 1)), ((4, 1, -1), (2, 1, 2)), ((2, 2, 2), (1, 2, 2))):
    mesh = make_mesh(shape, devices[::-1], slices=2)
    assert mesh.axis_names == MESH_AXES
    halves = np.split(mesh.devices, 2)
    assert [half.shape for half in halves] == [per_slice] * 2
    for index, half in enumerate(halves):
      assert {device.id // 4 for device in half.flat} == {index}
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_slices_that_are_not_there():
  with pytest.raises(MeshError) as caught:
    make_mesh((2, 4, 1), slices=2)
  assert str(caught.value) == 'mesh: expected devices of 2 slices or processes; found 1 slice(s) and 1 process(es)'
  with pytest.raises(MeshError) as caught:
    make_mesh((1, 8, 1), slices=2)
  assert str(caught.value) == 'mesh: expected data to be a multiple of slices=2; found 1'


def test_slices_that_nobody_counted():
  """What chips of one slice exchange all the time would go over the network between slices."""
  devices = [Device(i, 0, i // 4) for i in range(8)]
  for device in devices:
    device.platform = 'tpu'
  with pytest.raises(MeshError) as caught:
    make_mesh((1, 8, 1), devices)
  assert str(caught.value) == 'mesh: the devices are of 2 slices; expected train.slices=2, found 1'

"""How many processes a run has, and their meeting: the one place that starts `jax.distributed`.

Enters: the flags --coordinator, --num_processes, --process_id, and the environment of the scheduler. Leaves: processes
that see each other's devices, or a single one. What JAX knows how to find (SLURM, GKE, TPU VM metadata) is left to it:
https://docs.jax.dev/en/latest/multi_process.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_mini_jax.config import ConfigError

_LONGEST = 1024  # bytes of a fault that the others are told of
TIMEOUT = 300  # seconds that processes wait for each other at the start, as JAX's
HEARTBEAT = 100  # seconds without a sign of life, as JAX's
_NEVER = 10**8  # seconds
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
_GOOGLE = '0x1ae0'  # PCI vendor, of its network cards too
_TPU_CHIPS = ('0x0027', '0x0056', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')  # PCI devices: v2 to 7x


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Who the processes are."""

  found_in: str  # none = a single process; flags, slurm, gke, tpu_vm
  coordinator: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None  # None = only JAX can find out
  process_id: int | None = None

  @property
  def several(self) -> bool:
    return self.num_processes != 1


SINGLE = Cluster('none', num_processes=1, process_id=0)


def is_writer() -> bool:
  """Whether this process is the one that writes what is written once, and shows progress."""
  return jax.process_index() == 0


def meet(name: str) -> None:
  """Waits for the other processes to come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def texts_of_all(text: str, size: int | None = None) -> list[str]:
  """What each process has, in their order, on all of them.

  Args:
    size: bytes, the same on all, after which a text is cut; None = they first agree on the longest.
  """
  if jax.process_count() == 1:
    return [text]
  mine = text.encode()
  if size is None:
    size = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
  padded = np.frombuffer(mine[:size].ljust(size, b'\0'), np.uint8)
  everyone = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, size)
  return [row.astype(np.uint8).tobytes().rstrip(b'\0').decode(errors='replace') for row in everyone]


def first_fault(fault: str) -> str:
  """What the first process that has a fault says of it, on all of them; '' = none has one."""
  return next(filter(None, texts_of_all(fault, _LONGEST)), '')


def as_first(numbers: Sequence[int]) -> list[int]:
  """Those of the first process, on all of them."""
  if jax.process_count() == 1:
    return list(numbers)
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
  mine = np.resize(np.array([*numbers, 0], np.int32), count)  # another process's may be more or fewer
  return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]


def find_cluster(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  environment: Mapping[str, str] | None = None,
  devices: Path = Path('/sys/bus/pci/devices'),
) -> Cluster:
  """A single process unless flags, JAX's variables or a scheduler say otherwise.

  Args:
    coordinator, num_processes, process_id: the flags; None = not given, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
      and JAX_PROCESS_ID count. All three or none, but num_processes=1 alone overrules whatever is found.
    environment: None = that of this process. devices: where Linux lists PCI devices.
  Raises:
    ConfigError: some of the three without the others, values that cannot be, or ones that differ from the scheduler's.
  """
  environment = os.environ if environment is None else environment
  given = dict(
    coordinator=_choose('coordinator', coordinator, 'JAX_COORDINATOR_ADDRESS', environment),
    num_processes=_choose('num_processes', num_processes, 'JAX_NUM_PROCESSES', environment),
    process_id=_choose('process_id', process_id, 'JAX_PROCESS_ID', environment),
  )
  if given['num_processes'] == 1 and not given['coordinator'] and not given['process_id']:
    return SINGLE
  scheduled = _scheduled(environment, devices)
  if all(value is None for value in given.values()):
    return scheduled
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if missing:
    raise ConfigError(f'processes: expected --coordinator, --num_processes and --process_id; missing {missing}')
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isdecimal():
    raise ConfigError(f'--coordinator: expected HOST:PORT; found {given["coordinator"]!r}')
  if not 0 <= given['process_id'] < given['num_processes']:
    raise ConfigError(f'--process_id: expected 0 to {given["num_processes"] - 1}; found {given["process_id"]}')
  for name in ('num_processes', 'process_id'):
    theirs = getattr(scheduled, name)
    if scheduled.found_in != 'none' and theirs not in (None, given[name]):
      raise ConfigError(f'--{name}: expected {theirs}, which {scheduled.found_in} says; found {given[name]}')
  return Cluster('flags', **given)


def _choose(name: str, flag: str | int | None, variable: str, environment: Mapping[str, str]) -> str | int | None:
  """The flag, else the variable, which must not differ."""
  text = environment.get(variable)
  if not text:
    return flag
  value = _integer(variable, text) if name != 'coordinator' else text
  if flag not in (None, value):
    raise ConfigError(f'--{name}: expected {value!r}, which {variable} says; found {flag!r}')
  return value


def _integer(name: str, text: str) -> int:
  if not text.isdecimal():
    raise ConfigError(f'{name}: expected an integer; found {text!r}')
  return int(text)


def _scheduled(environment: Mapping[str, str], devices: Path) -> Cluster:
  """What the scheduler says; a TPU VM says it only to JAX, which asks its metadata server."""
  if all(environment.get(name) for name in _SLURM):
    count, index = (_integer(name, environment[name]) for name in ('SLURM_NTASKS', 'SLURM_PROCID'))
    return Cluster('slurm', None, count, index) if count > 1 else SINGLE
  platforms = environment.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return SINGLE
  hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  if hosts:
    slices = _integer('MEGASCALE_NUM_SLICES', environment.get('MEGASCALE_NUM_SLICES') or '1')
    count = slices * len(hosts.split(','))
    return Cluster('gke', num_processes=count) if count > 1 else SINGLE
  if 'TPU_SKIP_MDS_QUERY' not in environment and any(_is_tpu_chip(device) for device in devices.glob('*')):
    return Cluster('tpu_vm')
  return SINGLE


def _is_tpu_chip(device: Path) -> bool:
  vendor, kind = ((device / name) for name in ('vendor', 'device'))
  return vendor.exists() and vendor.read_text().strip() == _GOOGLE and kind.read_text().strip() in _TPU_CHIPS


@contextlib.contextmanager
def processes(cluster: Cluster, *, timeout: int = TIMEOUT, heartbeat: int = HEARTBEAT) -> Iterator[None]:
  """Inside, `jax.devices()` are those of all processes; must be entered before JAX computes anything.

  If they have not met after `timeout` seconds, the process prints one line and ends with status 1. One that fails ends
  at once, and the runtime then aborts the others; at the end of a run that does not, all wait for the slowest.

  Args:
    heartbeat: seconds without a sign of life after which a process counts as dead, and the others abort. A single
      process may be suspended for as long as one likes.
  Raises:
    ConfigError: JAX cannot find out who the processes are.
  """
  jax.config.update('jax_enable_preemption_service', False)  # it keeps SIGTERM to itself; see `train.preemption`
  if not cluster.several:
    with _alone():
      yield
    return
  explicit = cluster.found_in == 'flags'
  # When a connection fails, the runtime aborts the process from C++ instead of raising, so ours has to be the first.
  timer = threading.Timer(timeout, _give_up, [cluster, timeout])
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes if explicit else None,
      cluster.process_id if explicit else None,
      cluster_detection_method='deactivate' if explicit else None,
      initialization_timeout=2 * timeout,
      heartbeat_timeout_seconds=heartbeat,
    )
  except (RuntimeError, ValueError, OSError) as error:  # OSError: what asks the metadata server raises
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(f'processes ({cluster.found_in}): {reason}; --num_processes=1 runs a single one') from error
  finally:
    timer.cancel()
  try:
    yield
  except BaseException as error:  # a shutdown would wait for the others, and abort all when its time is up
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    if isinstance(error, jax.errors.JaxRuntimeError):
      who = f'process {jax.process_index()} of {jax.process_count()}'
      print(f'error: {who}: what all of them compute failed; is another one gone?', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
  multihost_utils.sync_global_devices('end')  # the first process may still be drawing, longer than a shutdown waits
  jax.distributed.shutdown()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  """A cluster of one, which nothing outside this machine can reach."""
  with socket.socket() as held:  # until the coordinator has the port: one that is taken ends the process from C++
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{held.getsockname()[1]}'
    jax.distributed.initialize(
      address,
      1,
      0,
      cluster_detection_method='deactivate',
      coordinator_bind_address=address,
      heartbeat_timeout_seconds=_NEVER,  # one that was suspended would count as dead, and abort itself
    )
  try:
    yield
  finally:
    jax.distributed.shutdown()


def _give_up(cluster: Cluster, timeout: int) -> None:
  who = 'process' if cluster.process_id is None else f'process {cluster.process_id} of {cluster.num_processes}'
  where = f' at {cluster.coordinator}' if cluster.coordinator else ''
  print(
    f'error: {who} ({cluster.found_in}): the others did not meet it{where} within {timeout} s; '
    'are all of them started, with the same --coordinator, and may they reach each other?',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)

"""Accelerators that programs can be compiled for without having them, and what is published about their chips.

`v5e-64` is 64 chips; `2xv5e-64` is two slices of 64; `cpu-8` is eight emulated CPU devices. TPUs need the `[tpu]`
extra, which brings the real compiler; nothing is executed.

Sources: peak FLOP/s, memory and its bandwidth, link rates: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm;
memory that a program may use: what the compiler reports; clock and collective bandwidth: what the compiler's own
latency-hiding scheduler assumes (its estimated cycles against its estimated times; v4 and tpu7x: scaled by link rate);
data-center network: the same pages (v5e 6.4 Tbit/s per 256 chips, v5p 50, v6e and tpu7x 100 Gbit/s per chip).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from llava_mini_jax.config import ConfigError
from llava_mini_jax.sharding import MeshError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device; rates per second."""

  clock: float  # Hz
  peak_flops: float  # bf16
  hbm_bandwidth: float  # bytes
  hbm_bytes: float  # that a program may use
  gather_bandwidth: float  # bytes of the whole buffer, of an all-gather or a reduce-scatter
  reduce_bandwidth: float  # bytes of the whole buffer, of an all-reduce
  network_bandwidth: float  # bytes each way, between slices: this device's share of the data-center network
  # Share of the peak that a well-blocked attention kernel is taken to reach, masked blocks counted. The compiler's own
  # cycles say 0.62 (v5e) and 0.22 to 0.45 (v6e) of a forward pass over 1,024 tokens in blocks of 512.
  kernel_efficiency: float
  note: str = ''  # what is known to be off in predictions for it


CHIPS = {
  'v4': Chip(
    1.05e9, 275e12, 1228e9, 30.75 * GIB, 93.3e9, 140e9, 6.25e9, 0.5, note='collective and network bandwidth as if v5p'
  ),
  'v5e': Chip(1.5e9, 197e12, 819e9, 15.75 * GIB, 93.3e9, 93.3e9, 3.125e9, 0.5),
  'v5p': Chip(1.75e9, 459e12, 2765e9, 95.74 * GIB, 186.7e9, 280e9, 6.25e9, 0.5),
  'v6e': Chip(1.75e9, 918e12, 1640e9, 31.25 * GIB, 186.7e9, 186.7e9, 12.5e9, 0.3),
  'tpu7x': Chip(
    1.9e9,
    1153.5e12,
    3690e9,
    94.75 * GIB,
    186.7e9,
    280e9,
    6.25e9,
    0.3,
    'its cycle estimates inside loops are unreliable',
  ),
}
_MEGACORE = ('v4', 'v5p')  # one JAX device per chip, of two cores

# Chips -> shape. A shape that is not here can be asked for by its own name, `v5p:2x4x4`.
SHAPES = {
  'v4': {1: '1x1x1', 4: '2x2x1', 8: '2x2x2', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8'},
  'v5e': {1: '1x1', 4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'},
  'v5p': {1: '1x1x1', 4: '2x2x1', 8: '2x2x2', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8'},
  'v6e': {1: '1x1', 4: '2x2', 16: '4x4', 64: '8x8', 256: '16x16'},
  'tpu7x': {1: '1x1x1', 4: '2x2x1', 8: '2x2x2', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8'},
}


@dataclasses.dataclass(frozen=True)
class Topology:
  name: str  # as asked for
  kind: str  # v4, v5e, v5p, v6e, tpu7x; cpu
  shape: tuple[int, ...]  # chips along each axis of one slice
  slices: int = 1

  @property
  def chip(self) -> Chip | None:
    """None for CPUs."""
    return CHIPS.get(self.kind)

  @property
  def wrap(self) -> tuple[bool, ...]:
    """Which axes are rings: v5e and v6e wrap a full axis of 16, the others from cubes of 4 on."""
    if len(self.shape) == 2:
      return tuple(size == 16 for size in self.shape) + (False,)
    return (all(size % 4 == 0 for size in self.shape),) * 3

  def devices(self) -> Sequence[jax.Device]:
    """Descriptions of TPU devices, or this process's first CPU devices.

    Raises:
      ConfigError: no libtpu. MeshError: fewer CPU devices than asked for.
    """
    if self.kind == 'cpu':
      found = jax.devices('cpu')
      if len(found) < self.shape[0]:
        raise MeshError(f'{self.name}: expected {self.shape[0]} CPU devices; found {len(found)}')
      return found[: self.shape[0]]
    if importlib.util.find_spec('libtpu') is None:
      raise ConfigError(f'{self.name}: compiling for TPUs needs libtpu; pip install "jax[tpu]"')
    with _no_metadata_server():
      return topologies.get_topology_desc(
        platform='tpu',
        topology_name=f'{self.kind}:{"x".join(map(str, self.shape))}',
        chip_config_name='megacore' if self.kind in _MEGACORE else 'default',
        chips_per_host_bounds=_host(self.shape),
        num_slices=self.slices,
        wrap=self.wrap,
      ).devices


def _host(shape: tuple[int, ...]) -> tuple[int, int, int]:
  return (2, 2, 1) if min(shape[:2]) > 1 else (1, 1, 1)


@contextlib.contextmanager
def _no_metadata_server():
  """While it loads, libtpu asks a metadata server what machine this is, takes the TPU for itself, and complains."""
  settings = dict(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-4',  # any that exists: the topology asked for is what counts
  )
  before = {name: os.environ.get(name) for name in settings}
  os.environ.update(settings)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def topology(name: str) -> Topology:
  """`v5e-64`, `v5p:2x4x4`, `2xv5e-256` (two slices), `cpu-8`. Raises ConfigError naming what can be asked for."""
  found = re.fullmatch(rf'(?:([1-9]\d*)x)?({"|".join(SHAPES)}|cpu)([:-])(\d+(?:x\d+)*)', name)
  slices, kind, separator, size = found.groups() if found else (None, '', '', '')
  if kind == 'cpu' and not slices and size.isdigit() and int(size):
    return Topology(name, kind, (int(size),))
  table = SHAPES.get(kind, {})
  shape = table.get(int(size), '') if separator == '-' and size.isdigit() else size if separator == ':' else ''
  if not shape or shape.count('x') not in {usual.count('x') for usual in table.values()}:
    listed = ', '.join(f'{kind}-{"|".join(map(str, sizes))}' for kind, sizes in SHAPES.items())
    raise ConfigError(f'topology: expected one of {listed}, cpu-N, or a shape as v5e:4x8; found {name!r}')
  return Topology(name, kind, tuple(map(int, shape.split('x'))), int(slices or 1))


def start_without_devices(topologies: Sequence[Topology]) -> None:
  """Keeps JAX on the CPU, with as many emulated devices as the topologies ask for; before anything is computed."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)  # a program for absent devices cannot be read from it
  emulated = max((t.shape[0] for t in topologies if t.kind == 'cpu'), default=0)
  if emulated and 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', emulated)


def parse_options(options: Sequence[str]) -> dict[str, bool | str]:
  """`NAME=VALUE` each, true and false as such. Raises ConfigError for one that is not of that form."""
  found = {}
  for option in options:
    name, equals, value = option.partition('=')
    if not equals:
      raise ConfigError(f'compiler_options: expected NAME=VALUE; found {option!r}')
    found[name] = {'true': True, 'false': False}.get(value.lower(), value)
  return found

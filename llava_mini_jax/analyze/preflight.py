"""What a step would take on a pod, before there is one: memory, FLOPs, collectives, predicted time.

Enters: a Program (`programs.make_program`). Leaves: a Preflight, from the real compiler's output for those devices;
nothing is executed. `step_cost` says what the prediction rests on.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax.analyze import hlo, jaxpr_flops
from llava_mini_jax.analyze.programs import Program
from llava_mini_jax.analyze.step_cost import Collective, StepCost, step_cost
from llava_mini_jax.analyze.topologies import GIB, Chip, Topology

_UNTIMED = Chip(*[math.inf] * 8)


@dataclasses.dataclass(frozen=True)
class Preflight:
  """One program on one topology. bytes: per device. flops: of all devices."""

  name: str  # of the experiment
  step: str
  topology: str
  kind: str  # of chip
  devices: int
  mesh: Mapping[str, int]
  rows: int
  sizes: Mapping[str, int]
  options: Mapping[str, Any]  # of the compiler
  versions: Mapping[str, str]
  compile_seconds: float
  fits: bool
  capacity: float | None  # bytes; None = of a CPU's memory nothing is known
  used: float  # bytes; if it does not fit, what the compiler says it would take
  memory: Mapping[str, float]  # bytes by kind
  model_flops: float  # without recomputation
  hardware_flops: float  # with recomputation and padding
  kernel_flops: Mapping[str, float]  # of hardware_flops: in Pallas kernels, by name
  peak_flops: float | None  # of one device, per second
  collectives: tuple[Collective, ...]  # on CPUs they take no time
  cost: StepCost | None  # None if it does not compile for lack of memory, or for a CPU
  note: str = ''
  micro_steps: int = 1
  parameter_bits: int = 32  # of those that train

  def mfu(self, seconds: float) -> float:
    """Model FLOPs utilisation, if a step takes so long."""
    return self.model_flops / (seconds * self.peak_flops * self.devices)

  def hfu(self, seconds: float) -> float:
    """As `mfu`, of what the hardware computes."""
    return self.hardware_flops / (seconds * self.peak_flops * self.devices)

  def rows_per_second(self, seconds: float) -> float:
    """Per device."""
    return self.rows / seconds / self.devices


def preflight(
  program: Program,
  topology: Topology,
  *,
  name: str = '',
  options: Mapping[str, Any] | None = None,
  kernel_efficiency: float | None = None,
) -> tuple[Preflight, str]:
  """Compiles a program.

  Args:
    name: of the experiment, for the report.
    options: of the compiler, besides those that the program has; they win.
    kernel_efficiency: share of the peak that Pallas kernels reach; None = the chip's.
  Returns:
    The report, and the scheduled text of the compiled program ('' if there is none).
  Raises:
    Whatever the compiler raises, other than that memory does not suffice.
  """
  chip = topology.chip
  options = dict(options or {})
  traced = program.trace()
  counted = jaxpr_flops.count(traced.jaxpr)
  memory = {kind: _device_bytes(tree) for kind, tree in program.kinds.items()}
  begin = time.perf_counter()
  text, cost, fits = '', None, True
  try:
    compiled = program.lower(traced).compile(options or None)
  except jax.errors.JaxRuntimeError as error:
    fits, used = False, _asked_for(str(error))
    if used is None:
      raise
    memory['activations and gradients'] = max(0.0, used - sum(memory.values()))
  else:
    found = compiled.memory_analysis()
    rest = found.argument_size_in_bytes - sum(memory.values())
    memory |= {
      'activations and gradients': found.temp_size_in_bytes,
      'results': found.output_size_in_bytes - found.alias_size_in_bytes,
      'padding': max(0, rest),
    }
    used = sum(memory.values())
    fits = chip is None or used <= chip.hbm_bytes  # parameters that this program does not touch are there all the same
    text = compiled.as_text()
    module = hlo.parse(text)
    cost = step_cost(module, chip or _UNTIMED, counted.kernel_calls, kernel_efficiency)
  return Preflight(
    name=name,
    step=program.step,
    topology=topology.name,
    kind=topology.kind,
    devices=program.mesh.size,
    mesh=dict(program.mesh.shape),
    rows=program.rows,
    sizes=dict(program.sizes),
    options={**program.options, **options},
    versions=_versions(topology),
    compile_seconds=time.perf_counter() - begin,
    fits=fits,
    capacity=chip.hbm_bytes if chip else None,
    used=used,
    memory=memory,
    model_flops=program.model_flops,
    hardware_flops=counted.total,
    kernel_flops=dict(counted.kernels),
    peak_flops=chip.peak_flops if chip else None,
    collectives=cost.collectives if cost else (),
    cost=cost if chip else None,
    note=chip.note if chip else '',
    micro_steps=program.micro_steps,
    parameter_bits=max((_bits(leaf.dtype) for leaf in jax.tree.leaves(program.kinds['parameters'])), default=0),
  ), text


def suggestion(report: Preflight) -> str:
  """What to change so that it fits; '' if it does."""
  if report.fits:
    return ''
  state = sum(size for kind, size in report.memory.items() if 'param' in kind or kind in ('optimizer', 'cache'))
  rest, training = report.used - state, report.step == 'train'
  if state > 0.9 * report.capacity:
    shards = report.mesh['fsdp'] * report.mesh['tensor']
    wider = f'--mesh=1,{report.devices},1' if shards < report.devices else 'a larger topology'
    smaller = ', or adapters (docs/training.md, LoRA)' if training else ''
    if training and report.parameter_bits > 16:
      smaller = f', --config.train.param_dtype=bfloat16{smaller}'
    return f'what stays in memory takes {state / GIB:.1f} GiB per device: {wider}{smaller}'
  rows = report.rows // (report.mesh['data'] * report.mesh['fsdp'] * report.micro_steps)
  fitting = int(rows * (report.capacity - state) / rest)
  if fitting:
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= fitting)
    change = (
      f'--config.train.accumulate={report.micro_steps * parts}' if training else f'--batch={report.rows // parts}'
    )
    return f'rows take {rest / rows / GIB:.1f} GiB each: {change}, or more chips'
  chunk = ', --config.model.visual_chunk=4' if report.sizes.get('visuals', 1) > 1 else ''
  return (
    f'one row takes {rest / rows / GIB:.1f} GiB: a shorter --config.data.row_length{chunk}, or a tensor axis in --mesh'
  )


def _device_bytes(tree: Any) -> float:
  """Of one device, by the shardings of a tree of ShapeDtypeStructs."""
  leaves = jax.tree.leaves(tree)
  return sum(_bits(leaf.dtype) / 8 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def _bits(dtype: Any) -> int:
  """As TPUs keep it: two int4 in a byte, of which a host's array makes two."""
  return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def _asked_for(error: str) -> float | None:
  """Bytes of HBM that a program would use, from the compiler's message; None if that is about something else.

  What one of its messages calls temporaries are the arguments too: a smaller frozen base makes them smaller.
  """
  units = dict(K=2**10, M=2**20, G=2**30, T=2**40)
  found = re.search(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm', error)
  found = found or re.search(r'out of memory on HBM, .*HLO temporaries \(([\d.]+)([KMGT])\)', error)
  return float(found.group(1)) * units[found.group(2)] if found else None


def _versions(topology: Topology) -> dict[str, str]:
  names = ['jax', 'jaxlib', *([] if topology.kind == 'cpu' else ['libtpu'])]
  return {name: importlib.metadata.version(name) for name in names}

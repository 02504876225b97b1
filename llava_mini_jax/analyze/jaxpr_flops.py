"""FLOPs that a traced program computes on the hardware: everything recomputed or padded counts, and scans multiply.

Enters: a jaxpr, as `jax.make_jaxpr(f)(*arguments)` or `jax.jit(f).trace(*arguments).jaxpr` give it. Leaves: 2 per
multiply-add of every matrix product and convolution. A compiled program's own `cost_analysis()` counts the body of a
loop once, which for scanned layers is useless.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

Call = tuple[str, tuple[tuple[int, ...], ...]]
_BRANCHES, _LOOP, _KERNEL, _MANUAL = 'cond', 'while', 'pallas_call', 'shard_map'


@dataclasses.dataclass(frozen=True)
class Count:
  """Of all devices together.

  Attributes:
    total: every product, those of kernels included.
    kernels: of Pallas kernels, by name: FLOPs of all calls.
    kernel_calls: by name and shapes of the results: FLOPs of one call on one device.
    open_loops: `while` loops, whose turns are not known when tracing; their bodies count once.
  """

  total: float
  kernels: Mapping[str, float]
  kernel_calls: Mapping[Call, float]
  open_loops: int


def count(program: Any) -> Count:
  """Counts a (closed) jaxpr. Of the branches of a condition the costliest counts."""
  tally = _Tally()
  total = tally.walk(getattr(program, 'jaxpr', program), 1.0, 1)
  return Count(total, dict(tally.kernels), dict(tally.calls), tally.open_loops)


class _Tally:
  def __init__(self):
    self.kernels: collections.Counter[str] = collections.Counter()
    self.calls: dict[Call, float] = {}
    self.open_loops = 0

  def walk(self, jaxpr: Any, times: float, copies: int) -> float:
    """FLOPs of one run on all devices. times: runs of it. copies: devices that each run it on a part of their own."""
    total = 0.0
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      if name == 'dot_general':
        total += copies * _dot(eqn)
      elif name == 'conv_general_dilated':
        total += copies * _convolution(eqn)
      elif name == _KERNEL:
        total += self._kernel(eqn, times, copies)
      elif name == _BRANCHES:
        total += max((self.walk(inner, times, copies) for inner in _programs(eqn)), default=0.0)
      elif name == _MANUAL:
        ways = math.prod(eqn.params['mesh'].shape[axis] for axis in _manual_axes(eqn))
        total += sum(self.walk(inner, times, copies * ways) for inner in _programs(eqn))
      else:
        self.open_loops += name == _LOOP
        turns = eqn.params['length'] if name == 'scan' else 1
        total += turns * sum(self.walk(inner, times * turns, copies) for inner in _programs(eqn))
    return total

  def _kernel(self, eqn: Any, times: float, copies: int) -> float:
    """What the kernel says that it costs, else its products times the points of its grid."""
    estimate = eqn.params.get('cost_estimate')
    if estimate is not None and estimate.flops:
      flops = float(estimate.flops)
    else:
      grid = [size for size in eqn.params['grid_mapping'].grid if isinstance(size, int)]
      flops = math.prod(grid) * self.walk(eqn.params['jaxpr'], 0.0, 1)
    name = eqn.params.get('name') or str(eqn.params.get('name_and_src_info', 'pallas_call')).split()[0]
    self.calls[name, tuple(tuple(out.aval.shape) for out in eqn.outvars)] = flops
    self.kernels[name] += flops * copies * times
    return flops * copies


def _manual_axes(eqn: Any) -> Any:
  """The mesh axes that a `shard_map` splits its arguments over; what the parameter is called depends on the version."""
  return eqn.params.get('newly_manual_axes', eqn.params.get('manual_axes'))


def _programs(eqn: Any) -> Iterator[Any]:
  """The programs inside one operation: of jit, scan, checkpoint, custom gradients."""
  for value in eqn.params.values():
    for leaf in value if isinstance(value, tuple | list) else (value,):
      leaf = getattr(leaf, 'jaxpr', leaf)
      if hasattr(leaf, 'eqns'):
        yield leaf


def _dot(eqn: Any) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[a] for a in contracted)


def _convolution(eqn: Any) -> float:
  kernel = eqn.invars[1].aval.shape
  features = eqn.params['dimension_numbers'].rhs_spec[0]
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[features]

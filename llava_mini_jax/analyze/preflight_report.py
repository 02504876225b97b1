"""A Preflight as text, as JSON, and two of them side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llava_mini_jax.analyze.hlo import Line
from llava_mini_jax.analyze.preflight import Preflight, suggestion
from llava_mini_jax.analyze.step_cost import InstructionCost
from llava_mini_jax.analyze.topologies import GIB

_STATIONS = {
  'vision': 'vision',
  'projector': 'projector',
  'compressor': 'compressor',
  'prefusion': 'pre-fusion',
  'decoder': 'decoder',
  'loss': 'loss',
  'optimizer': 'optimizer',
}


def describe(report: Preflight, top: int = 10) -> str:
  """Everything, in lines of text. top: how many of the costliest instructions."""
  mesh = ' × '.join(f'{axis} {size}' for axis, size in report.mesh.items())
  sizes = ', '.join(f'{name.replace("_", " ")} {size}' for name, size in report.sizes.items())
  versions = ', '.join(f'{name} {version}' for name, version in report.versions.items())
  lines = [
    f'{report.name or "program"}: {report.step} on {report.topology}, {report.devices} devices ({mesh})',
    f'  rows {report.rows}, {sizes}; compiled in {report.compile_seconds:.0f} s with {versions}',
  ]
  if report.options:
    lines.append('  options ' + ' '.join(f'{name}={value}' for name, value in report.options.items()))
  lines += [*_memory(report), *_flops(report)]
  if report.fits or report.cost:
    lines += [*_time(report), *_collectives(report), *_instructions(report, top)]
  return '\n'.join(lines)


def to_json(report: Preflight, top: int = 10) -> dict[str, Any]:
  """Plain values; seconds, bytes and FLOPs. Of the instructions the costliest."""
  values = dataclasses.asdict(report)
  values['suggestion'] = suggestion(report)
  if report.cost:
    cost = report.cost
    values['cost']['instructions'] = [
      dict(dataclasses.asdict(i), source=source_text(i)) for i in cost.instructions[:top]
    ]
    values |= figures(report)
  return values


def figures(report: Preflight) -> dict[str, float]:
  """What two programs are compared by; {} of a prediction that there is none of."""
  if not report.cost:
    return {}
  cost = report.cost
  return dict(
    seconds=cost.seconds,
    seconds_low=cost.seconds_low,
    seconds_high=cost.seconds_high,
    mfu=report.mfu(cost.seconds),
    mfu_high=report.mfu(cost.seconds_low),
    mfu_low=report.mfu(cost.seconds_high),
    hfu=report.hfu(cost.seconds),
    rows_per_second_per_device=report.rows_per_second(cost.seconds),
    compute_seconds=cost.compute_seconds,
    communication_seconds=cost.communication_seconds,
    exposed_seconds=cost.exposed_seconds,
  )


_COMPARED = (  # label, key, scale, digits
  ('devices', 'devices', 1, 0),
  ('rows', 'rows', 1, 0),
  ('memory, GiB per device', 'used', 1 / GIB, 2),
  ('model TFLOP per step', 'model_flops', 1e-12, 1),
  ('hardware TFLOP per step', 'hardware_flops', 1e-12, 1),
  ('predicted ms', 'seconds', 1e3, 1),
  ('  full overlap, ms', 'seconds_low', 1e3, 1),
  ('  no overlap, ms', 'seconds_high', 1e3, 1),
  ('computation, ms', 'compute_seconds', 1e3, 1),
  ('communication, ms', 'communication_seconds', 1e3, 1),
  ('  exposed, ms', 'exposed_seconds', 1e3, 1),
  ('MFU', 'mfu', 1, 3),
  ('rows/s per device', 'rows_per_second_per_device', 1, 3),
)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
  """Two reports (`to_json`) side by side, and the second's ratio to the first."""
  heads = [f'{r["name"]} {r["step"]} {r["topology"]}' for r in (first, second)]
  width = max(len(label) for label, *_ in _COMPARED)
  columns = [max(12, len(head)) for head in heads]

  def line(label: str, cells: Sequence[str], ratio: str) -> str:
    return f'{label:<{width}}' + ''.join(f'  {c:>{n}}' for c, n in zip(cells, columns, strict=True)) + f'  {ratio:>6}'

  lines = [line('', heads, 'ratio'), line('fits', ['yes' if r['fits'] else 'NO' for r in (first, second)], '')]
  for label, key, scale, digits in _COMPARED:
    a, b = (report.get(key) for report in (first, second))
    cells = ['-' if value is None else f'{value * scale:.{digits}f}' for value in (a, b)]
    lines.append(line(label, cells, f'{b / a:.3f}' if a and b else ''))
  if first['versions'] != second['versions']:
    lines.append('the two were compiled by different versions: their ratio means little')
  return '\n'.join(lines)


def source_text(cost: InstructionCost) -> str:
  """`decoder backward: models/layers.py:182 LlamaMLP.__call__ > linear`, as far as it is known."""
  lines = cost.source
  if not lines:
    return cost.operation[-60:]
  station = next((name for line in lines for part, name in _STATIONS.items() if line.file.endswith(f'{part}.py')), '')
  phase = ' backward' if 'transpose(' in cost.operation else ''
  phase = ' recomputed' if 'rematted_computation' in cost.operation else phase
  place = next((line for line in lines if '__call__' in line.function), lines[0])
  inner = f' > {_short(lines[0])}' if place is not lines[0] else ''
  return f'{station}{phase}: {place.file}:{place.number} {_short(place)}{inner}'.lstrip(': ')


def _short(line: Line) -> str:
  return line.function.replace('.<locals>', '')


def _memory(report: Preflight) -> Sequence[str]:
  used = report.used / GIB
  if report.capacity is None:
    head = f'memory: {_size(report.used)} per device'
  else:
    capacity = report.capacity / GIB
    verdict = (
      f'fits, {capacity - used:.2f} GiB left' if report.fits else f'DOES NOT FIT, {used - capacity:.2f} GiB over'
    )
    head = f'memory: {verdict}; {used:.2f} of {capacity:.2f} GiB per device'
  lines = [head, *_table({kind: f'{_size(size):>11}' for kind, size in report.memory.items() if size})]
  if not report.fits:
    lines.append(f'  change: {suggestion(report)}')
  return lines


def _flops(report: Preflight) -> Sequence[str]:
  model, hardware = report.model_flops, report.hardware_flops
  lines = [
    f'FLOPs per step: model {model / 1e12:.4g} T, hardware {hardware / 1e12:.4g} T '
    f'({hardware / model:.3f} times: recomputation and padding)'
  ]
  if report.kernel_flops:
    kernels = ', '.join(f'{name} {flops / 1e12:.3g} T' for name, flops in report.kernel_flops.items())
    at = f'; timed at {report.cost.kernel_efficiency:.0%} of the peak' if report.cost else ''
    lines.append(f'  of these in Pallas kernels: {kernels}{at}')
  return lines


def _time(report: Preflight) -> Sequence[str]:
  cost = report.cost
  if cost is None:
    return ['time: not predicted for CPUs']
  span = f'{cost.seconds_low * 1e3:.4g} (full overlap) to {cost.seconds_high * 1e3:.4g} (none)'
  lines = [
    f'predicted time: {_ms(cost.seconds)}, {span}',
    f'  MFU {report.mfu(cost.seconds):.3f} ({report.mfu(cost.seconds_high):.3f} to {report.mfu(cost.seconds_low):.3f})'
    f', HFU {report.hfu(cost.seconds):.3f}; {report.rows_per_second(cost.seconds):.4g} rows/s per device',
    f'  computation {cost.compute_seconds * 1e3:.4g} ms: products {cost.product_seconds * 1e3:.4g}, '
    f'memory {cost.memory_seconds * 1e3:.4g}, kernels {cost.kernel_seconds * 1e3:.4g}; '
    f'exposed communication {cost.exposed_seconds * 1e3:.4g} ms',
  ]
  if cost.untimed:
    shown = ', '.join(cost.untimed[:3]) + (' …' if len(cost.untimed) > 3 else '')
    lines.append(f'  beware: {len(cost.untimed)} without FLOPs or cycles, timed by their bytes alone: {shown}')
  return [*lines, *([f'  beware: {report.note}'] if report.note else [])]


def _collectives(report: Preflight) -> Sequence[str]:
  if not report.collectives:
    return ['collectives: none']
  lines = ['collectives:']
  width = max(len(c.kind) + len(c.overlap) for c in report.collectives)
  for c in report.collectives:
    time = (
      f': {_ms(c.seconds)}, {_ms(max(0.0, c.seconds - c.exposed_seconds))} overlapped, {_ms(c.exposed_seconds)} exposed'
    )
    lines.append(
      f'  {c.kind + ", " + c.overlap:<{width + 2}} over {c.group:<3d} {c.count:5d} calls {_size(c.bytes):>11}'
      + (time if report.cost else '')
    )
  return lines


def _instructions(report: Preflight, top: int) -> Sequence[str]:
  if report.cost is None:
    return []
  lines = ['costliest instructions:']
  for i in report.cost.instructions[:top]:
    share = i.seconds / report.cost.compute_seconds
    lines.append(f'  {_ms(i.seconds):>10} {share:5.1%} ×{i.count:<4d} {i.kind:8} {i.name:24} {source_text(i)}')
  return lines


def _size(size: float) -> str:
  return f'{size / GIB:.3f} GiB' if size >= GIB / 10 else f'{size / 2**20:.3f} MiB'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:.4g} ms'


def _table(rows: Mapping[str, str]) -> list[str]:
  width = max(map(len, rows), default=0)
  return [f'  {label:<{width}} {text}' for label, text in rows.items()]

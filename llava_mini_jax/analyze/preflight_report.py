"""A Preflight as text, as JSON, and two of them side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava_mini_jax.analyze.hlo import Line
from llava_mini_jax.analyze.preflight import Preflight, suggestion
from llava_mini_jax.analyze.step_cost import Collective, InstructionCost
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
  if report.cost:
    lines += [*_time(report), *_collectives(report), *_instructions(report, top)]
  elif report.fits:
    lines.append('time: not predicted for CPUs')
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


def compare(first: Preflight, second: Preflight) -> str:
  """Two programs side by side, and the second's ratio to the first."""
  rows: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
    ('fits', *((float(r.fits)) for r in (first, second)), lambda x: 'yes' if x else 'NO'),
    ('devices', first.devices, second.devices, '{:.0f}'.format),
    ('rows', first.rows, second.rows, '{:.0f}'.format),
    ('memory, GiB per device', first.used / GIB, second.used / GIB, '{:.2f}'.format),
    ('model TFLOP per step', first.model_flops / 1e12, second.model_flops / 1e12, '{:.1f}'.format),
    ('hardware TFLOP per step', first.hardware_flops / 1e12, second.hardware_flops / 1e12, '{:.1f}'.format),
  ]
  one, two = figures(first), figures(second)
  shown = {
    'seconds': ('predicted ms', 1e3),
    'seconds_low': ('  full overlap, ms', 1e3),
    'seconds_high': ('  no overlap, ms', 1e3),
    'compute_seconds': ('computation, ms', 1e3),
    'communication_seconds': ('communication, ms', 1e3),
    'exposed_seconds': ('  exposed, ms', 1e3),
    'mfu': ('MFU', 1.0),
    'rows_per_second_per_device': ('rows/s per device', 1.0),
  }
  for key, (label, scale) in shown.items():
    if one or two:
      values = [found[key] * scale if found else None for found in (one, two)]
      rows.append((label, *values, '{:.3f}'.format if scale == 1.0 else '{:.1f}'.format))
  width = max(len(label) for label, *_ in rows)
  heads = [f'{r.name} {r.step} {r.topology}' for r in (first, second)]
  columns = [max(12, len(head)) for head in heads]
  lines = [' ' * width + ''.join(f'  {head:>{size}}' for head, size in zip(heads, columns, strict=True)) + '   ratio']
  for label, a, b, text in rows:
    cells = ''.join(f'  {"-" if x is None else text(x):>{size}}' for x, size in zip((a, b), columns, strict=True))
    ratio = f'  {b / a:6.3f}' if a and b and label not in ('fits', 'devices') else ''
    lines.append(f'{label:<{width}}{cells}{ratio}')
  if first.versions != second.versions:
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
    head = f'memory: {used:.2f} GiB per device'
  else:
    capacity = report.capacity / GIB
    verdict = (
      f'fits, {capacity - used:.2f} GiB left' if report.fits else f'DOES NOT FIT, {used - capacity:.2f} GiB over'
    )
    head = f'memory: {verdict}; {used:.2f} of {capacity:.2f} GiB per device'
  lines = [head, *_table({kind: f'{size / GIB:8.3f} GiB' for kind, size in report.memory.items() if size})]
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
  span = f'{cost.seconds_low * 1e3:.4g} (full overlap) to {cost.seconds_high * 1e3:.4g} (none)'
  lines = [
    f'predicted time: {cost.seconds * 1e3:.4g} ms, {span}',
    f'  MFU {report.mfu(cost.seconds):.3f} ({report.mfu(cost.seconds_high):.3f} to {report.mfu(cost.seconds_low):.3f})'
    f', HFU {report.hfu(cost.seconds):.3f}; {report.rows_per_second(cost.seconds):.4g} rows/s per device',
    f'  computation {cost.compute_seconds * 1e3:.4g} ms: products {cost.product_seconds * 1e3:.4g}, '
    f'memory {cost.memory_seconds * 1e3:.4g}, kernels {cost.kernel_seconds * 1e3:.4g}; '
    f'exposed communication {cost.exposed_seconds * 1e3:.4g} ms',
  ]
  if cost.unknown_kernels:
    lines.append(f'  beware: kernels of unknown FLOPs, timed by their bytes alone: {", ".join(cost.unknown_kernels)}')
  return [*lines, *([f'  beware: {report.note}'] if report.note else [])]


def _collectives(report: Preflight) -> Sequence[str]:
  def row(c: Collective) -> str:
    hidden = c.seconds - c.exposed_seconds
    return (
      f'{c.count:5d} calls {c.bytes / 1e9:9.3f} GB {c.seconds * 1e3:9.2f} ms: '
      f'{hidden * 1e3:.2f} overlapped, {c.exposed_seconds * 1e3:.2f} exposed'
    )

  if not report.cost.collectives:
    return ['collectives: none']
  rows = [(f'{c.kind}, {c.overlap}, over {c.group}', row(c)) for c in report.cost.collectives]
  width = max(len(label) for label, _ in rows)
  return ['collectives:', *(f'  {label:<{width}} {text}' for label, text in rows)]


def _instructions(report: Preflight, top: int) -> Sequence[str]:
  lines = ['costliest instructions:']
  for i in report.cost.instructions[:top]:
    share = i.seconds / report.cost.compute_seconds
    lines.append(f'  {i.seconds * 1e3:8.2f} ms {share:5.1%} ×{i.count:<4d} {i.kind:8} {i.name:24} {source_text(i)}')
  return lines


def _table(rows: Mapping[str, str]) -> list[str]:
  width = max(map(len, rows), default=0)
  return [f'  {label:<{width}} {text}' for label, text in rows.items()]

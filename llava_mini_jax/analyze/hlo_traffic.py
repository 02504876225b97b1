"""What one scheduled instruction moves between HBM and the core, and what is inside a fusion.

A fusion that slices an operand reads the slice alone; one that updates an operand in place writes the update alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llava_mini_jax.analyze.hlo import Instruction, Module

_SLICES = ('dynamic-slice', 'slice', 'gather')


def has_product(module: Module, computation: str) -> bool:
  """Whether a fusion multiplies matrices."""
  return any(
    i.opcode in ('convolution', 'dot') or (i.opcode == 'fusion' and has_product(module, i.called()))
    for i in module.computations[computation]
  )


def collective_in(module: Module, computation: str, opcodes: Sequence[str]) -> Instruction | None:
  """The collective that a fusion, or an asynchronous computation, carries a step of."""
  return next((i for i in module.computations.get(computation, ()) if i.opcode in opcodes), None)


def hbm_traffic(module: Module, computation: str, instruction: Instruction) -> float:
  """Bytes that one run of an instruction of a computation reads from and writes to HBM."""
  written = instruction.hbm_bytes
  if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  called = instruction.called()
  read = 0.0
  for index, name in enumerate(instruction.operands):
    operand = module.find(computation, name)
    whole = operand.hbm_bytes if operand else 0.0
    if not whole:
      continue
    if called is None:
      read += whole
      continue
    seen, updated = _use(module, called, index, whole)
    read += min(whole, seen)
    if updated is not None:
      written -= whole - updated
  return max(0.0, read + written)


def _use(module: Module, computation: str, index: int, whole: float) -> tuple[float, float | None]:
  """Of a fusion's operand: bytes read, and bytes written if the result is that operand, updated in place."""
  parameter = module.parameter(computation, index)
  if parameter is None:
    return whole, None
  return _uses(module, computation, parameter.name, whole)


def _uses(module: Module, computation: str, name: str, whole: float) -> tuple[float, float | None]:
  read, updated = 0.0, None
  for user in module.computations[computation]:
    if name not in user.operands:
      continue
    if user.opcode in _SLICES:
      read += user.bytes
      continue
    if user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      update = module.find(computation, user.operands[1])
      more, written = 0.0, update.bytes if update else 0.0
    elif user.opcode == 'bitcast':
      more, written = _uses(module, computation, user.name, whole)
    elif user.opcode == 'fusion':
      found = [_use(module, user.called(), i, whole) for i, operand in enumerate(user.operands) if operand == name]
      more = sum(m for m, _ in found)
      written = functools.reduce(lambda a, b: b if a is None else a + (b or 0.0), (w for _, w in found))
    else:
      return whole, updated
    read += more
    updated = updated if written is None else (updated or 0.0) + written
  return read, updated

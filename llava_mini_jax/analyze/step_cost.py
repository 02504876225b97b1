"""Predicts how long a compiled TPU program takes, from its scheduled text alone.

- Products: the compiler's estimated cycles, times the turns of the loops around them, or the time that their bytes
  take from memory, whichever is longer.
- Everything else: bytes from and to memory over its bandwidth; the cycles estimated for that are about three times
  too many. What stays in on-core memory (a space other than 0) costs nothing.
- Pallas kernels: the text has no cycles for them. Their FLOPs (from the kernel's own cost estimate, else from the
  traced program) over a stated share of the peak (`Chip.kernel_efficiency`), or their bytes, whichever is longer.
- Collectives: bytes of the whole buffer over the bandwidth that the compiler's scheduler assumes. One that is woven
  into computations hides behind those; one that is started and later awaited hides behind what is scheduled in
  between, one after the other; any other is exposed.
- Between slices the compiler sends and receives through the hosts: bytes over the data-center network's bandwidth per
  device, in ring steps, hidden behind what is scheduled between the send and the end of its receive.

The prediction lies between full overlap of computation and communication, and none. Checked against published
hardware results for compute-bound steps only (docs/preflight.md); communication has not been checked on hardware.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping

from llava_mini_jax.analyze.hlo import Instruction, Line, Module
from llava_mini_jax.analyze.hlo_traffic import collective_in, has_product, hbm_traffic
from llava_mini_jax.analyze.jaxpr_flops import Call
from llava_mini_jax.analyze.topologies import Chip

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id')
_FREE += ('opt-barrier', 'copy-start', 'copy-done', 'slice-start', 'slice-done', 'async-update', 'send', 'recv')
_BETWEEN_SLICES = 'xla_megascale_runtime'
_KERNEL = 'tpu_custom_call'
_NO_CYCLES = 2**53  # what the compiler cannot estimate, it says takes for ever


@dataclasses.dataclass(frozen=True)
class Collective:
  # An opcode; `reduce-scatter (fused)` = an all-reduce of which each device keeps its part; `… between slices` = each
  # device's own part with those of other slices.
  kind: str
  overlap: str  # woven = in steps inside computations; started = awaited later; exposed = nothing runs meanwhile
  count: int  # calls per step
  bytes: float  # per step, of the whole buffers
  seconds: float
  exposed_seconds: float
  group: int  # devices that take part


@dataclasses.dataclass(frozen=True)
class InstructionCost:
  name: str
  kind: str  # product, memory, kernel
  seconds: float  # per step
  count: int  # times per step
  hbm_bytes: float  # each time
  operation: str  # as JAX names it
  source: tuple[Line, ...]  # innermost first


@dataclasses.dataclass(frozen=True)
class StepCost:
  """Seconds per step of one device."""

  product_seconds: float
  memory_seconds: float
  kernel_seconds: float
  kernel_calls: int
  kernel_efficiency: float  # share of the peak that kernels are taken to reach
  untimed: tuple[str, ...]  # kernels without FLOPs and products without cycles: timed by their bytes alone
  collectives: tuple[Collective, ...]
  instructions: tuple[InstructionCost, ...]  # costliest first

  @property
  def compute_seconds(self) -> float:
    return self.product_seconds + self.memory_seconds + self.kernel_seconds

  @property
  def communication_seconds(self) -> float:
    return sum(c.seconds for c in self.collectives)

  @property
  def exposed_seconds(self) -> float:
    return sum(c.exposed_seconds for c in self.collectives)

  @property
  def seconds(self) -> float:
    """The prediction: what the schedule hides is hidden."""
    return self.compute_seconds + self.exposed_seconds

  @property
  def seconds_low(self) -> float:
    """Full overlap."""
    return max(self.compute_seconds, self.communication_seconds)

  @property
  def seconds_high(self) -> float:
    """No overlap."""
    return self.compute_seconds + self.communication_seconds


@dataclasses.dataclass
class _Transfer:
  """A collective under way."""

  kind: str
  overlap: str
  count: int
  bytes: float
  seconds: float  # one call
  group: int
  waited: float = 0.0  # one call: how long nothing else runs
  beside: float = 0.0  # all calls: computation that it is woven into

  @property
  def exposed_seconds(self) -> float:
    """All calls."""
    return max(0.0, self.count * self.seconds - self.beside) if self.overlap == 'woven' else self.count * self.waited


def step_cost(
  module: Module, chip: Chip, kernel_flops: Mapping[Call, float] | None = None, kernel_efficiency: float | None = None
) -> StepCost:
  """The cost of one run of a module's entry.

  Args:
    kernel_flops: `jaxpr_flops.Count.kernel_calls` of the program, for kernels without a cost estimate of their own.
    kernel_efficiency: instead of the chip's.
  Raises:
    ValueError: a loop without a constant number of turns.
  """
  walk = _Walk(module, chip, kernel_flops or {}, kernel_efficiency or chip.kernel_efficiency)
  walk.run(module.entry, 1)
  return walk.result()


class _Walk:
  """Adds up instructions in schedule order."""

  def __init__(self, module: Module, chip: Chip, kernel_flops: Mapping[Call, float], kernel_efficiency: float):
    self.module, self.chip = module, chip
    self.kernel_flops, self.kernel_efficiency = kernel_flops, kernel_efficiency
    self.untimed: set[str] = set()
    self.seconds = collections.Counter()
    self.kernel_calls = 0
    self.costs: list[InstructionCost] = []
    self.transfers: list[_Transfer] = []
    self.woven: dict[str, _Transfer] = {}  # by channel: its steps may lie in several fusions, even of another loop

  def run(self, computation: str, times: int) -> float:
    """Returns how long one run takes, what is woven into computation apart."""
    clock, free, network = 0.0, 0.0, 0.0  # when the links, and the hosts' network, have done what was started before
    started: dict[str, tuple[_Transfer, float]] = {}  # and when each is done; those between slices by their rendezvous
    for instruction in self.module.computations[computation]:
      opcode = instruction.opcode
      if opcode == 'while':
        turns = self.module.trip_count(instruction)
        clock += turns * self.run(instruction.called('body'), times * turns)
      elif opcode in ('call', 'conditional'):
        clock += sum(self.run(branch, times) for branch in _first_branch(instruction))
      elif instruction.opcode == 'send' and (transfer := self._between_slices(instruction, times)):
        self.transfers.append(transfer)
        network = max(network, clock) + transfer.seconds
        started[_rendezvous(instruction)] = transfer, network
      elif transfer := self._transfer(computation, instruction, times):
        self.transfers.append(transfer)
        behind = max(0.0, free - clock)
        free = clock + behind + transfer.seconds
        if transfer.overlap == 'started':
          started[instruction.name] = transfer, free
          transfer.waited = transfer.seconds  # unless it is awaited here; else that happens in another turn
        else:
          transfer.waited = behind + transfer.seconds
          clock = free
      elif (awaited := self._awaited(computation, instruction)) in started:
        transfer, until = started.pop(awaited)
        transfer.waited = max(0.0, until - clock)
        clock += transfer.waited
      else:
        clock += self._compute(computation, instruction, times)
    return clock

  def _transfer(self, computation: str, instruction: Instruction, times: int) -> _Transfer | None:
    """Of a collective that is an instruction of its own."""
    opcode, inner = instruction.opcode, instruction
    if opcode == 'async-start' and (called := instruction.called()):
      inner = collective_in(self.module, called, COLLECTIVES)
      opcode = f'{inner.opcode}-start' if inner else ''
    kind = opcode.removesuffix('-start')
    if kind not in COLLECTIVES:
      return None
    overlap = 'started' if opcode.endswith('-start') else 'exposed'
    operands = [self.module.find(computation, name) for name in instruction.operands]
    before, after = sum(operand.bytes for operand in operands if operand), instruction.bytes
    if overlap == 'started':
      after = max(before, after - before)  # the result lists the operands too
    return self._moved(kind, overlap, max(before, after) if kind == 'reduce-scatter' else after, inner, times)

  def _moved(self, kind: str, overlap: str, size: float, inner: Instruction, times: int) -> _Transfer:
    chip = self.chip
    seconds = size / (chip.reduce_bandwidth if kind == 'all-reduce' else chip.gather_bandwidth)
    return _Transfer(kind, overlap, times, size, seconds, inner.group_size)

  def _between_slices(self, send: Instruction, times: int) -> _Transfer | None:
    """Each device's part of a collective, which hosts exchange; None for any other transfer to the host."""
    if send.string('_xla_host_transfer_handler_name') != _BETWEEN_SLICES:
      return None
    kind = (send.string('_xla_megascale_transfer_type') or 'transfer').lower().replace('_', '-')
    slices, size = _listed(send.string('_xla_megascale_target') or ''), send.arrays[0].bytes
    steps = (slices - 1) / slices * (2 if kind == 'all-reduce' else 1)
    seconds = size * steps / self.chip.network_bandwidth
    return _Transfer(f'{kind} between slices', 'started', times, size, seconds, slices, waited=seconds)

  def _awaited(self, computation: str, done: Instruction) -> str:
    """Under which name in `started` the transfer is that ends here; '' = none does."""
    if not done.opcode.endswith('-done') or not done.operands:
      return ''
    start = self.module.find(computation, done.operands[0])
    return _rendezvous(start) if done.opcode == 'recv-done' and start else done.operands[0]

  def _compute(self, computation: str, instruction: Instruction, times: int) -> float:
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
      return 0.0
    module, chip = self.module, self.chip
    called = instruction.called()
    target = instruction.string('custom_call_target')
    if target is not None and target != _KERNEL:
      return 0.0
    collective = collective_in(module, called, COLLECTIVES) if called else None
    moved = 0.0 if collective else hbm_traffic(module, computation, instruction)
    seconds, kind = moved / chip.hbm_bandwidth, 'memory'
    if target == _KERNEL:
      kind = 'kernel'
      seconds = max(seconds, self._flops_of(instruction) / (self.kernel_efficiency * chip.peak_flops))
      self.kernel_calls += times
    elif instruction.opcode in ('dot', 'convolution') or (called and has_product(module, called)):
      kind = 'product'
      cycles = int(instruction.string('estimated_cycles') or 0)
      if not 0 < cycles < _NO_CYCLES:
        self.untimed.add(instruction.name)
        cycles = 0
      seconds = max(seconds, cycles / chip.clock)
    if collective:
      self._weave(instruction, called, collective, seconds, times)
    self.seconds[kind] += seconds * times
    if seconds:
      cost = InstructionCost(
        instruction.name,
        kind,
        seconds * times,
        times,
        moved,
        instruction.string('op_name') or '',
        module.source(instruction),
      )
      self.costs.append(cost)
    return seconds

  def _weave(self, fusion: Instruction, called: str, collective: Instruction, seconds: float, times: int) -> None:
    """A step of a collective inside a fusion."""
    channel = re.search(r'channel_id=(\d+)', collective.attributes)
    channel = channel.group(1) if channel else fusion.name
    kind, size = collective.opcode, collective.bytes
    scatters = 'all-reduce-scatter' in collective.attributes or 'all-reduce-scatter' in called
    if scatters:
      kind = 'reduce-scatter'
    if channel not in self.woven:
      moved = self._moved(kind, 'exposed', size, collective, times)
      label = 'reduce-scatter (fused)' if scatters else kind
      self.woven[channel] = dataclasses.replace(moved, kind=label, waited=moved.seconds)
    transfer = self.woven[channel]
    if seconds:
      transfer.overlap = 'woven'
    transfer.count = min(transfer.count, times)
    transfer.beside += seconds * times

  def _flops_of(self, kernel: Instruction) -> float:
    """Of one call: its own estimate, else that of the traced kernel of this name and these shapes."""
    if estimate := re.search(r'"flops":"?(\d+)', kernel.attributes):
      return float(estimate.group(1))
    shapes = tuple(array.shape for array in kernel.arrays)
    same = {of: flops for (name, of), flops in self.kernel_flops.items() if kernel.name.startswith(name)}
    if not same:
      self.untimed.add(kernel.name)
    return same.get(shapes, max(same.values(), default=0.0))

  def result(self) -> StepCost:
    groups: dict[tuple[str, str, int], list[_Transfer]] = collections.defaultdict(list)
    for transfer in (*self.transfers, *self.woven.values()):
      groups[transfer.kind, transfer.overlap, transfer.group].append(transfer)
    collectives = [
      Collective(
        kind,
        overlap,
        count=sum(t.count for t in group),
        bytes=sum(t.count * t.bytes for t in group),
        seconds=sum(t.count * t.seconds for t in group),
        exposed_seconds=sum(t.exposed_seconds for t in group),
        group=size,
      )
      for (kind, overlap, size), group in groups.items()
    ]
    return StepCost(
      product_seconds=self.seconds['product'],
      memory_seconds=self.seconds['memory'],
      kernel_seconds=self.seconds['kernel'],
      kernel_calls=self.kernel_calls,
      kernel_efficiency=self.kernel_efficiency,
      untimed=tuple(sorted(self.untimed)),
      collectives=tuple(sorted(collectives, key=lambda c: -c.seconds)),
      instructions=tuple(sorted(self.costs, key=lambda c: -c.seconds)),
    )


def _rendezvous(instruction: Instruction) -> str:
  return instruction.string('_xla_host_transfer_rendezvous') or ''


def _listed(target: str) -> int:
  """How many slices a target such as `{1,2}x{0:3}` lists, which has them first; at least two."""
  count = 0
  for part in target.partition('}')[0].strip('{').split(','):
    first, _, last = part.partition(':')
    count += int(last or first) - int(first) + 1 if first.isdigit() else 0
  return max(2, count)


def _first_branch(instruction: Instruction) -> list[str]:
  """The computation that a call runs, or the first of a condition's."""
  for attribute in ('to_apply', 'calls', 'true_computation'):
    if called := instruction.called(attribute):
      return [called]
  return re.findall(r'branch_computations=\{%([\w.-]+)', instruction.attributes)

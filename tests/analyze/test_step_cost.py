"""The cost model on schedules short enough to add up by hand."""

from __future__ import annotations

import pytest

from llava_mini_jax.analyze.hlo import parse
from llava_mini_jax.analyze.step_cost import Collective, step_cost
from llava_mini_jax.analyze.topologies import Chip

# 1 cycle = 1 ms; 1 B from memory, 2 B gathered, 4 B reduced and 0.5 B sent to other slices per ms; a kernel does 1 FLOP
# per ms
CHIP = Chip(1e3, 2e3, 1e3, 1e9, 2e3, 4e3, 5e2, 0.5)

HEAD = """HloModule jit_step, is_scheduled=true

%dot (p: s8[10], q: s8[10]) -> s8[10] {
  %p = s8[10]{0} parameter(0)
  %q = s8[10]{0} parameter(1)
  ROOT %d = s8[10]{0} convolution(%p, %q)
}

%add (p.1: s8[10]) -> s8[10] {
  %p.1 = s8[10]{0} parameter(0)
  ROOT %a = s8[10]{0} add(%p.1, %p.1)
}

%async_collective_fusion (p.2: s8[10], q.2: s8[10], r.2: s8[10]) -> s8[10] {
  %p.2 = s8[10]{0} parameter(0)
  %q.2 = s8[10]{0} parameter(1)
  %r.2 = s8[10]{0} parameter(2)
  %g.2 = s8[80]{0:S(1)} all-gather(%r.2), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %d.2 = s8[10]{0} convolution(%p.2, %q.2)
}

%all-reduce-scatter (p.3: s8[80]) -> s8[10] {
  %p.3 = s8[80]{0} parameter(0)
  %r.3 = s8[80]{0} all-reduce(%p.3), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s.3 = s8[10]{0} dynamic-slice(%r.3), dynamic_slice_sizes={10}
}

%below (arg: s32[]) -> pred[] {
  %arg = s32[] parameter(0)
  %bound = s32[] constant(5)
  ROOT %c = pred[] compare(%arg, %bound), direction=LT
}

%body (arg.1: s32[]) -> s32[] {
  %arg.1 = s32[] parameter(0)
  %u = s8[10]{0} constant({...})
  %inside = s8[10]{0} fusion(%u, %u), kind=kOutput, calls=%dot, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (x: s8[10], y: s8[10]) -> s8[10] {
  %x = s8[10]{0} parameter(0)
  %y = s8[10]{0} parameter(1)
  %z = s8[10]{0:S(1)} parameter(2)
  %n = s32[] parameter(3)
"""
PRODUCT = 'fusion(%x, %y), kind=kOutput, calls=%dot, backend_config={"estimated_cycles":"40"}'


def cost(*lines: str, **options):
  return step_cost(parse('\n'.join([HEAD, *(f'  {line}' for line in lines), '}'])), CHIP, **options)


def milliseconds(found) -> tuple[float, ...]:
  return tuple(
    round(1e3 * seconds, 9)
    for seconds in (found.product_seconds, found.memory_seconds, found.kernel_seconds, found.exposed_seconds)
  )


def test_a_product_takes_its_cycles_or_its_bytes():
  assert milliseconds(cost(f'%a = s8[10]{{0}} {PRODUCT}')) == (40, 0, 0, 0)
  starved = PRODUCT.replace('"40"', '"4"')
  assert milliseconds(cost(f'%a = s8[10]{{0}} {starved}')) == (30, 0, 0, 0)  # two operands and a result


@pytest.mark.parametrize('cycles', ['9223372036854775807', '0'])
def test_a_product_that_the_compiler_cannot_estimate(cycles):
  found = cost(f'%a = s8[10]{{0}} {PRODUCT.replace("40", cycles)}')
  assert milliseconds(found) == (30, 0, 0, 0) and found.untimed == ('a',)


def test_memory():
  assert milliseconds(cost('%a = s8[10]{0} fusion(%x), kind=kLoop, calls=%add')) == (0, 20, 0, 0)
  assert milliseconds(cost('%a = s8[10]{0} fusion(%z), kind=kLoop, calls=%add')) == (0, 10, 0, 0)
  assert milliseconds(cost('%a = s8[10]{0:S(1)} fusion(%z), kind=kLoop, calls=%add')) == (0, 0, 0, 0)
  assert milliseconds(cost('%a = (s8[10]{0}) tuple(%x)', '%b = s8[10]{0} bitcast(%x)')) == (0, 0, 0, 0)


def test_a_loop_multiplies():
  found = cost('%w = s32[] while(%n), condition=%below, body=%body', f'%a = s8[10]{{0}} {PRODUCT}')
  assert milliseconds(found) == (540, 0, 0, 0)
  assert [(i.name, i.count, round(1e3 * i.seconds, 9)) for i in found.instructions] == [
    ('inside', 5, 500.0),
    ('a', 1, 40.0),
  ]


def test_exposed_collectives():
  found = cost(
    '%g = s8[80]{0} all-gather(%x), replica_groups=[1,8]<=[8]',
    '%r = s8[80]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add',
    '%s = s8[10]{0} reduce-scatter(%r), replica_groups=[1,8]<=[8], to_apply=%add',
    '%f = s8[10]{0} fusion(%r), kind=kCustom, calls=%all-reduce-scatter',
    f'%a = s8[10]{{0}} {PRODUCT}',
  )
  expected = [('all-gather', 40.0), ('reduce-scatter', 40.0), ('reduce-scatter (fused)', 40.0), ('all-reduce', 20.0)]
  assert [(c.kind, round(1e3 * c.seconds, 9)) for c in found.collectives] == expected
  assert {(c.overlap, c.count, c.bytes, c.group) for c in found.collectives} == {('exposed', 1, 80, 8)}
  assert [round(1e3 * s) for s in (found.seconds_low, found.seconds, found.seconds_high)] == [140, 180, 180]


@pytest.mark.parametrize(('products', 'exposed'), [(0, 40), (1, 0), (2, 0)])
def test_a_collective_that_is_awaited_hides_behind_what_comes_between(products, exposed):
  found = cost(
    '%g = (s8[10]{0}, s8[80]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]',
    *(f'%a{i} = s8[10]{{0}} {PRODUCT}' for i in range(products)),
    '%h = s8[80]{0} all-gather-done(%g)',
    f'%after = s8[10]{{0}} {PRODUCT}',
  )
  assert milliseconds(found) == (40 * (products + 1), 0, 0, exposed)
  assert [(c.overlap, c.bytes) for c in found.collectives] == [('started', 80)]


def test_two_that_are_awaited_share_the_links():
  found = cost(
    '%g = (s8[10]{0}, s8[80]{0}) all-gather-start(%x)',
    '%h = (s8[10]{0}, s8[80]{0}) all-gather-start(%y)',
    f'%a = s8[10]{{0}} {PRODUCT}',
    '%gd = s8[80]{0} all-gather-done(%g)',
    '%hd = s8[80]{0} all-gather-done(%h)',
  )
  assert milliseconds(found) == (40, 0, 0, 40)


def test_the_clock_goes_on_while_one_is_awaited():
  """The second begins when the first is done, and then hides behind a product; an exposed one waits for the links."""
  found = cost(
    '%g = (s8[10]{0}, s8[80]{0}) all-gather-start(%x)',
    '%gd = s8[80]{0} all-gather-done(%g)',
    '%h = (s8[10]{0}, s8[80]{0}) all-gather-start(%x)',
    f'%a = s8[10]{{0}} {PRODUCT}',
    '%hd = s8[80]{0} all-gather-done(%h)',
  )
  assert milliseconds(found) == (40, 0, 0, 40)
  behind = cost(
    '%g = (s8[10]{0}, s8[80]{0}) all-gather-start(%x)',
    '%r = s8[80]{0} all-reduce(%x), to_apply=%add',
    '%gd = s8[80]{0} all-gather-done(%g)',
  )
  assert milliseconds(behind) == (0, 0, 0, 60)


def test_a_collective_that_is_awaited_in_another_turn_is_exposed():
  assert milliseconds(cost('%g = (s8[10]{0}, s8[80]{0}) all-gather-start(%x)'))[3] == 40


def test_a_collective_that_is_woven_into_products():
  woven = 'fusion(%x, %y, %x), kind=kOutput, calls=%async_collective_fusion, backend_config={"estimated_cycles":"15"}'
  found = cost(f'%a = s8[10]{{0}} {woven}', f'%b = s8[10]{{0}} {woven}')
  assert milliseconds(found) == (30, 0, 0, 10)
  assert found.collectives == (Collective('all-gather', 'woven', 1, 80.0, pytest.approx(0.04), pytest.approx(0.01), 8),)


KERNEL = 'custom-call(%x), custom_call_target="tpu_custom_call"'


def test_kernels():
  """By their own estimate; else as traced, by name and shapes; else by their bytes, and named."""
  estimated = f'%splash.1 = s8[10]{{0}} {KERNEL}, backend_config={{"cost_estimate":{{"flops":"700"}}}}'
  assert milliseconds(cost(estimated)) == (0, 0, 700, 0)
  traced = {('splash', ((10,),)): 300.0, ('splash', ((20,),)): 500.0, ('other', ((10,),)): 9.0}
  found = cost(f'%splash.1 = s8[10]{{0}} {KERNEL}', kernel_flops=traced)
  assert milliseconds(found) == (0, 0, 300, 0) and not found.untimed and found.kernel_calls == 1
  assert milliseconds(cost(f'%splash.1 = s8[30]{{0}} {KERNEL}', kernel_flops=traced)) == (0, 0, 500, 0)
  assert milliseconds(cost(f'%splash.1 = s8[10]{{0}} {KERNEL}', kernel_flops=traced, kernel_efficiency=0.25))[2] == 600
  unknown = cost(f'%splash.1 = s8[10]{{0}} {KERNEL}')
  assert milliseconds(unknown) == (0, 0, 20, 0) and unknown.untimed == ('splash.1',)


def test_what_is_no_kernel_takes_no_time():
  assert milliseconds(cost('%c = s8[10]{0} custom-call(%x), custom_call_target="Sharding"')) == (0, 0, 0, 0)


def between(name: str, slices: str = '{1,2}x{0:3}', kind: str = 'ALL_REDUCE') -> tuple[str, str, str]:
  """A send, its receive, and the end of that."""
  handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
  ends = f'is_host_transfer=true, frontend_attributes={{{handler},_xla_host_transfer_rendezvous="{name}",'
  ends += f'_xla_megascale_target="{slices}",_xla_megascale_transfer_type="{kind}"}}'
  return (
    f'%send.{name} = (s8[10]{{0}}, u32[], token[]) send(%x, %t), channel_id=3, {ends}',
    f'%recv.{name} = (s8[10]{{0}}, u32[], token[]) recv(%t), channel_id=2, {ends}',
    f'%done.{name} = (s8[10]{{0}}, token[]) recv-done(%recv.{name}), channel_id=2, is_host_transfer=true',
  )


def test_what_slices_exchange_hides_behind_what_runs_meanwhile():
  send, recv, done = between('a')
  product = f'%p = s8[10]{{0}} {PRODUCT}'
  assert milliseconds(cost(send, recv, done)) == (0, 0, 0, 20)  # 10 B once each way
  found = cost(send, recv, product, done)
  assert milliseconds(found) == (40, 0, 0, 0)
  assert found.collectives == (Collective('all-reduce between slices', 'started', 1, 10, pytest.approx(0.02), 0, 2),)
  first, second = between('a'), between('b')
  queued = cost(*first[:2], *second[:2], product, first[2], second[2], *between('c'))
  assert milliseconds(queued) == (40, 0, 0, 20)  # b comes after a; c waits for nobody
  assert milliseconds(cost(send, recv, product)) == (40, 0, 0, 20)  # awaited in another turn


def test_a_ring_of_four_slices():
  assert milliseconds(cost(*between('a', '{1:4}x{0:3}'))) == (0, 0, 0, 30)
  assert milliseconds(cost(*between('a', '{1,2,3,4}x{0:3}', 'ALL_GATHER'))) == (0, 0, 0, 15)
  (found,) = cost(*between('a', '{1,2,3,4}x{0:3}', 'ALL_GATHER')).collectives
  assert (found.kind, found.group) == ('all-gather between slices', 4)


def test_other_transfers_to_the_host_are_no_communication():
  words = [line.replace('xla_megascale_runtime', 'tf_rendezvous') for line in between('a')]
  assert cost(*words).collectives == ()

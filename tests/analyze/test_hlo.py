"""What is read from the scheduled text of a compiled program, on lines as the TPU compiler writes them."""

from __future__ import annotations

import pytest

from llava_mini_jax.analyze.hlo import Array, Instruction, arrays_in, parse
from llava_mini_jax.analyze.hlo_traffic import collective_in, has_product, hbm_traffic

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

FileNames
1 "/usr/lib/python/main.py"
2 "/home/user/llava_mini_jax/models/layers.py"

FunctionNames
1 "<module>"
2 "LlamaMLP.__call__"
3 "linear"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=40 end_line=40 column=1 end_column=9}
3 {file_name_id=2 function_name_id=3 line=50 end_line=50 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=FIRST}
2 {file_location_id=2 parent_frame_id=SECOND}
3 {file_location_id=3 parent_frame_id=THIRD}

%inner (param_0.1: bf16[6,8,128]) -> bf16[8,128] {
  %param_0.1 = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %zero), dynamic_slice_sizes={1,8,128}
}

%product (param_0.2: bf16[6,8,128], param_1.2: bf16[128,16]) -> bf16[8,16] {
  %param_1.2 = bf16[128,16]{1,0} parameter(1)
  %param_0.2 = bf16[6,8,128]{2,1,0} parameter(0)
  %part = bf16[8,128]{1,0} fusion(%param_0.2), kind=kLoop, calls=%inner
  ROOT %dot.1 = bf16[8,16]{1,0} convolution(%part, %param_1.2), dim_labels=bf_io->bf
}

%update (param_0.3: f32[100,8], param_1.3: f32[1,8]) -> f32[100,8] {
  %param_0.3 = f32[100,8]{1,0} parameter(0)
  %param_1.3 = f32[1,8]{1,0} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %written = f32[100,8]{1,0} dynamic-update-slice(%param_0.3, %param_1.3, %zero.1)
}

%step_of_gather (param_0.4: bf16[4,8]) -> bf16[16,8] {
  %param_0.4 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%param_0.4), channel_id=3, dimensions={0}
}

%below (arg: (s32[], f32[8,4])) -> pred[] {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %bound = s32[]{:T(128)} constant(32)
  ROOT %compare.1 = pred[]{:T(512)} compare(%turn, %bound), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %layers = bf16[6,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %kernel = bf16[128,16]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %table = f32[100,8]{1,0} parameter(3)
  %row = f32[1,8]{1,0} parameter(4)
  %start = (s32[], f32[8,4]{1,0}, /*index=2*/bf16[2]{0:T(128)(2,1)S(1)}) tuple(%x, %layers)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%below, body=%below, metadata={op_name="jit(step)/while"}
  %known = (s32[], f32[8,4]{1,0}) while(%start), condition=%below, body=%below, backend_config={"known_trip_count":{"n":"5"}}
  %mlp = bf16[8,16]{1,0} fusion(%layers, %kernel), kind=kOutput, calls=%product, metadata={op_name="jit(step)/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"123"}}
  %kept = f32[100,8]{1,0} fusion(%table, %row), kind=kLoop, calls=%update
  %splash.1 = (bf16[2,4]{1,0}, f32[2]{0}) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="jit(step)/splash" stack_frame_id=1}, backend_config={"custom_call_config":{"body":"x"}}
  ROOT %all-reduce.1 = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%below
}
"""  # noqa: E501  as long as the compiler writes them


def module(parents=(0, 1, 2)):
  text = TEXT
  for name, parent in zip(('FIRST', 'SECOND', 'THIRD'), parents, strict=True):
    text = text.replace(f'parent_frame_id={name}', f'parent_frame_id={parent}')
  return parse(text)


def entry(name: str) -> Instruction:
  return module().find('main', name)


def test_instructions():
  parsed = module()
  assert parsed.entry == 'main'
  assert [i.name for i in parsed.computations['inner']] == ['param_0.1', 'zero', 'slice.1']
  assert [i.is_root for i in parsed.computations['inner']] == [False, False, True]
  mlp = entry('mlp')
  assert (mlp.opcode, mlp.operands, mlp.called()) == ('fusion', ('layers', 'kernel'), 'product')
  assert mlp.string('estimated_cycles') == '123' and mlp.string('op_name') == 'jit(step)/dot_general'
  assert mlp.string('absent') is None and entry('x').called() is None


def test_sizes_and_memory_spaces():
  assert entry('kernel').arrays == (Array('bf16', (128, 16), 1),)
  assert (entry('kernel').bytes, entry('kernel').hbm_bytes) == (128 * 16 * 2, 0)
  assert [array.bytes for array in entry('start').arrays] == [4, 8 * 4 * 4, 4]
  assert [a.bytes for a in arrays_in('(s4[8]{0}, pred[3]{0}, f8e4m3fn[5]{0}, u32[]{:S(2)})')] == [4, 3, 5, 4]


def test_an_instruction_of_several_lines():
  """Two lines of what a kernel says of itself, and the rest of the instruction after them."""
  splash = entry('splash.1')
  assert splash.string('custom_call_target') == 'tpu_custom_call'
  assert splash.string('op_name') == 'jit(step)/splash'
  assert entry('all-reduce.1').is_root


def test_turns_of_a_loop():
  assert module().trip_count(entry('loop')) == 32
  assert module().trip_count(entry('known')) == 5
  unknown = parse(TEXT.replace('constant(32)', 'parameter(1)').replace('parent_frame_id=', 'parent_frame_id=0'))
  with pytest.raises(ValueError, match='^loop: expected a loop with a constant number of turns; found another$'):
    unknown.trip_count(unknown.find('main', 'loop'))


@pytest.mark.parametrize('parents', [(0, 1, 2), (1, 2, 3)], ids=['plain', 'one too high'])
def test_source_lines(parents):
  found = module(parents).source(entry('mlp'))
  assert [(line.file, line.number, line.function) for line in found] == [
    ('models/layers.py', 50, 'linear'),
    ('models/layers.py', 40, 'LlamaMLP.__call__'),
  ]
  assert module(parents).source(entry('splash.1')) == module(parents).source(entry('x')) == ()


GROUPS = {
  'replica_groups={{0,1,2,3},{4,5,6,7}}, x': 4,
  'replica_groups=[8,16]<=[128], x': 16,
  "replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_1'}, x": 16,
  "replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_0','axis_1'}, x": 64,
  "replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([8,2]T(1,0)) {'axis_1'}, x": 8,
  "replica_groups=mesh['axis_0'=64] {'axis_0':(2)8}, x": 8,
  'source_target_pairs={{0,1},{1,0}}': 2,
  'channel_id=1': 0,
}


@pytest.mark.parametrize('attributes', GROUPS)
def test_group_sizes(attributes):
  assert Instruction('c', 'all-gather', (), (), '', attributes, False).group_size == GROUPS[attributes]


def test_traffic():
  parsed = module()
  one_layer, result = 8 * 128 * 2, 8 * 16 * 2
  assert hbm_traffic(parsed, 'main', entry('mlp')) == one_layer + result  # the kernel lies on the core
  assert hbm_traffic(parsed, 'main', entry('kept')) == 2 * 8 * 4  # a row read, a row written in place
  assert hbm_traffic(parsed, 'main', entry('splash.1')) == 8 * 4 * 4 + 2 * 4 * 2 + 2 * 4
  assert hbm_traffic(parsed, 'inner', parsed.find('inner', 'slice.1')) == 2 * one_layer


def test_what_is_inside_a_fusion():
  assert has_product(module(), 'product') and not has_product(module(), 'update')
  assert collective_in(module(), 'step_of_gather', ('all-gather',)).name == 'all-gather.1'
  assert collective_in(module(), 'update', ('all-gather',)) is None


def test_no_entry():
  with pytest.raises(ValueError, match='^HLO text: expected an ENTRY computation; found none$'):
    parse('HloModule empty\n')

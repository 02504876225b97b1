"""Programs compiled for devices that are not there: CPUs in this process, TPUs in one of their own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess

import jax
import numpy as np
import pytest
from small_model import small_config
from tiny_run import command

from llava_mini_jax.analyze.hlo import Line
from llava_mini_jax.analyze.jaxpr_flops import count
from llava_mini_jax.analyze.preflight import preflight, suggestion
from llava_mini_jax.analyze.preflight_report import compare, describe, source_text, to_json
from llava_mini_jax.analyze.programs import make_program
from llava_mini_jax.analyze.step_cost import InstructionCost
from llava_mini_jax.analyze.topologies import GIB, topology
from llava_mini_jax.config import ConfigError
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.sharding import MeshError, use_mesh
from llava_mini_jax.train.tree import parameter_shapes

QUICK = dict(xla_backend_optimization_level=0)
SMALL = Experiment(
  small_config(),
  DataConfig(row_length=40, fused_text=24, video_max_frames=6),
  TrainConfig(groups=(('vision/.*', 'frozen'), ('.*', 1e-3)), batch_size=16, mesh=(-1, 1, 1)),
)


@functools.cache
def on_cpus(step: str = 'train', mesh: tuple[int, int, int] | None = None):
  place = topology('cpu-8')
  program = make_program(SMALL, place, step=step, mesh=mesh, text=20, new_tokens=12)
  return program, preflight(program, place, name='small', options=QUICK)[0]


def parameters(*stations: str) -> int:
  shapes = parameter_shapes(SMALL.model)
  return sum(4 * int(np.prod(shape)) for path, shape in shapes.items() if path.split('/')[0] in stations)


def test_memory_by_kind():
  """Parameters and optimizer by hand, whole on each device and split over eight; pixels are most of the batch."""
  trained, tower = parameters('projector', 'compressor', 'prefusion', 'decoder'), parameters('vision')
  whole, split = on_cpus()[1].memory, on_cpus(mesh=(1, 8, 1))[1].memory
  assert (whole['parameters'], whole['frozen parameters']) == (trained, tower)
  assert 2 * trained < whole['optimizer'] < 2 * trained + 100
  assert trained / 8 < split['parameters'] < 0.2 * trained
  pixels = 2 * 32 * 32 * 3
  assert whole['batch'] == split['batch'] and pixels < whole['batch'] < 2 * pixels
  assert whole['activations and gradients'] > trained  # the gradients alone


def test_a_program_runs_on_what_it_is_compiled_for():
  """Arrays of the shapes, types and shardings of its arguments: one new token, in caches of eight rows."""
  program, report = on_cpus('decode')
  fill = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)  # noqa: E731
  with use_mesh(program.mesh):
    logits, cache = program.function(*jax.tree.map(fill, program.arguments))
  assert logits.shape == (8, SMALL.model.decoder.vocab_size) and cache.length.tolist() == [1] * 8
  assert (report.rows, report.sizes) == (8, dict(length=1, slots=32 + 12))


def test_flops():
  """Model FLOPs are the formula's; without remat the hardware does hardly more, with it more."""
  program, report = on_cpus()
  assert 0.95 < report.hardware_flops / report.model_flops < 1.05
  remat = dataclasses.replace(SMALL, model=small_config(scan=dict(remat='full')))
  repeated = make_program(remat, topology('cpu-8'))
  assert repeated.model_flops == program.model_flops
  traced = repeated.trace()
  assert count(traced.jaxpr).total > 1.1 * report.hardware_flops


def test_asking():
  """What decoding counts is what it computes; a prompt computes logits at its end alone; a video no decoder."""
  decode, prefill, video = (on_cpus(step)[1] for step in ('decode', 'prefill', 'video'))
  assert decode.hardware_flops == decode.model_flops
  assert decode.memory['cache'] > 0
  assert 0.9 < video.hardware_flops / video.model_flops < 1.1 and video.sizes['visuals'] == 8
  assert prefill.rows == 8 and 0.9 < prefill.hardware_flops / prefill.model_flops < 1.5
  assert all('optimizer' not in report.memory for report in (decode, prefill, video))


def test_rows_of_text_alone():
  """The decoder alone computes: its share of the formula is all that is traced."""
  data = dataclasses.replace(SMALL.data, visuals_per_row=0)
  program = make_program(dataclasses.replace(SMALL, data=data), topology('cpu-8'))
  assert program.arguments[1].pixels.shape[:2] == (16, 0)
  assert count(program.trace().jaxpr).total == pytest.approx(program.model_flops, rel=0.05)
  assert program.model_flops < on_cpus()[0].model_flops / 2


def test_features_that_are_read():
  """The tower, which is frozen, computes nothing; its features come with the batch instead of pixels."""
  data = dataclasses.replace(SMALL.data, features='features')
  program = make_program(dataclasses.replace(SMALL, data=data), topology('cpu-8'))
  batch, vision = program.arguments[1], SMALL.model.vision
  assert batch.features.shape == (16, 1, 1, vision.num_patches, vision.hidden_size) and not batch.pixels.size
  assert count(program.trace().jaxpr).total == pytest.approx(program.model_flops, rel=0.05)
  assert program.model_flops < on_cpus()[0].model_flops


def test_mistakes():
  with pytest.raises(ConfigError, match="^step: expected one of train, prefill, decode, video; found 'run'$"):
    make_program(SMALL, topology('cpu-8'), step='run')
  with pytest.raises(MeshError, match='^batch size 12 is not a multiple of data × fsdp = 8$'):
    make_program(SMALL, topology('cpu-8'), batch=12)
  long = dataclasses.replace(SMALL, data=DataConfig(row_length=9999))
  with pytest.raises(ConfigError, match='^data.row_length: expected at most 4096; found 9999$'):
    make_program(long, topology('cpu-8'))


@pytest.mark.parametrize('step', ['decode', 'video'])
@pytest.mark.parametrize(
  'compressor',
  [
    dict(kind='voco', keep=2),
    dict(kind='llama_vid'),
    dict(kind='prumerge', keep=3, neighbours=2, elastic=True),
    dict(space='llm', within=1),
  ],
  ids=['voco', 'llama_vid', 'elastic', 'within'],
)
def test_steps_that_would_be_those_of_another_model(compressor, step):
  asked = dataclasses.replace(SMALL, model=small_config(compressor=compressor))
  found = asked.model.compressor
  with pytest.raises(ConfigError) as error:
    make_program(asked, topology('cpu-8'), step=step)
  assert str(error.value) == (
    f'step {step}: expected a compressor whose tokens are the same for every question, all of them, outside the '
    f'decoder; found kind={found.kind!r}, within={found.within}, elastic={found.elastic}'
  )
  assert make_program(asked, topology('cpu-8'), step='prefill').model_flops > 0


def test_the_report_of_a_cpu():
  text = describe(on_cpus(mesh=(1, 8, 1))[1])
  assert text.startswith('small: train on cpu-8, 8 devices (data 1 × fsdp 8 × tensor 1)\n')
  assert 'time: not predicted for CPUs' in text and 'all-gather' in text and 'costliest' not in text


def test_suggestions():
  assert on_cpus()[1].parameter_bits == 32
  report = dataclasses.replace(on_cpus()[1], capacity=10 * GIB, fits=False, rows=64)
  assert suggestion(dataclasses.replace(report, fits=True)) == ''
  heavy = dataclasses.replace(report, used=30 * GIB, memory=dict(parameters=5 * GIB, optimizer=10 * GIB))
  bytes_that_stay = 'what stays in memory takes 15.0 GiB per device: '
  adapters = ', or adapters (docs/training.md, LoRA)'
  assert suggestion(heavy) == f'{bytes_that_stay}--mesh=1,8,1, --config.train.param_dtype=bfloat16{adapters}'
  halved = dataclasses.replace(heavy, parameter_bits=16)
  assert suggestion(halved) == f'{bytes_that_stay}--mesh=1,8,1{adapters}'
  spread = dataclasses.replace(heavy, mesh=dict(data=1, fsdp=8, tensor=1), step='decode')
  assert suggestion(spread) == f'{bytes_that_stay}a larger topology'
  rows = dataclasses.replace(report, used=18 * GIB, memory=dict(parameters=2 * GIB))
  assert suggestion(rows) == 'rows take 2.0 GiB each: --config.train.accumulate=2, or more chips'
  halves = dataclasses.replace(rows, micro_steps=2)
  assert suggestion(halves) == 'rows take 4.0 GiB each: --config.train.accumulate=4, or more chips'
  tight = dataclasses.replace(rows, used=26 * GIB, step='prefill')  # two of eight fit
  assert suggestion(tight) == 'rows take 3.0 GiB each: --batch=16, or more chips'
  one = dataclasses.replace(rows, rows=8)
  assert suggestion(one).startswith('one row takes 16.0 GiB: a shorter --config.data.row_length, or a tensor axis')


def test_the_place_of_an_instruction():
  lines = (
    Line('models/layers.py', 49, 'linear'),
    Line('models/layers.py', 182, 'LlamaMLP.__call__'),
    Line('models/prefusion.py', 44, 'Prefusion.__call__.<locals>.body'),
  )
  cost = InstructionCost('fusion.1', 'product', 1.0, 1, 0.0, 'jit(step)/transpose(jvp())/dot_general', lines)
  assert source_text(cost) == 'pre-fusion backward: models/layers.py:182 LlamaMLP.__call__ > linear'
  again = dataclasses.replace(cost, operation='jit(step)/transpose(jvp())/rematted_computation/dot_general')
  assert source_text(again).startswith('pre-fusion recomputed: ')
  assert source_text(dataclasses.replace(cost, source=())) == cost.operation


def test_json():
  values = to_json(on_cpus()[1])
  again = json.loads(json.dumps(values))
  assert again['memory'] == values['memory'] and 'all-reduce' in {c['kind'] for c in again['collectives']}
  assert (again['cost'], again['suggestion'], again['step']) == (None, '', 'train')


# -- TPUs --------------------------------------------------------------------------------------------------------------

tpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu has no wheel for this platform')


def compile_tpu(*arguments: str) -> subprocess.CompletedProcess:
  """A process of its own: libtpu stays away from the tests that run on CPUs."""
  process = command('compile_tpu', '--config=tests/tiny_run.py:none', *arguments)
  stdout, stderr = process.communicate()
  return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory) -> tuple[dict, str]:
  """A training step for four v5e: the report, and what was printed."""
  file = tmp_path_factory.mktemp('tpu') / 'report.json'
  done = compile_tpu('--topology=v5e-4', '--mesh=1,-1,1', f'--json={file}', '--top=5')
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text()), done.stdout


@tpu
def test_a_step_for_a_tpu(compiled):
  report, printed = compiled
  assert report['fits'] and report['devices'] == 4 and report['mesh'] == dict(data=1, fsdp=4, tensor=1)
  assert 0 < report['used'] < report['capacity'] == 15.75 * GIB
  cost = report['cost']
  assert 0 < report['seconds_low'] <= report['seconds'] <= report['seconds_high'] < 0.1
  assert report['compute_seconds'] == pytest.approx(cost['product_seconds'] + cost['memory_seconds'])
  assert report['mfu'] == pytest.approx(report['model_flops'] / report['seconds'] / 4 / 197e12)
  assert report['rows_per_second_per_device'] == pytest.approx(8 / report['seconds'] / 4)
  gathered = [c for c in report['collectives'] if c['kind'] == 'all-gather']
  assert gathered and all(c['group'] == 4 and c['bytes'] > 0 for c in gathered)
  assert set(report['versions']) == {'jax', 'jaxlib', 'libtpu'}
  assert printed.startswith('tiny_run.py:none: train on v5e-4, 4 devices (data 1 × fsdp 4 × tensor 1)\n')


@tpu
def test_the_costliest_instructions_name_their_lines(compiled):
  report, printed = compiled
  rows = report['cost']['instructions']
  assert len(rows) == 5 and [row['seconds'] for row in rows] == sorted((r['seconds'] for r in rows), reverse=True)
  assert all('.py:' in row['source'] for row in rows)
  assert all(row['source'] in printed for row in rows)


@tpu
def test_two_side_by_side(compiled):
  report = compiled[0]
  slower = dict(report, seconds=2 * report['seconds'], versions={})
  lines = compare(report, slower).splitlines()
  assert lines[0].split() == ['tiny_run.py:none', 'train', 'v5e-4'] * 2 + ['ratio']
  times = next(line.split() for line in lines if line.startswith('predicted ms'))
  assert times[-1] == '2.000' and float(times[2]) == pytest.approx(1e3 * report['seconds'], abs=0.05)
  assert lines[-1] == 'the two were compiled by different versions: their ratio means little'


@tpu
def test_a_cache_that_does_not_fit():
  done = compile_tpu('--topology=v5e-1', '--step=decode', '--batch=4096', '--new_tokens=16000')
  assert done.returncode == 0, done.stderr
  assert 'memory: DOES NOT FIT, ' in done.stdout and '  change: ' in done.stdout

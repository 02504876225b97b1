"""What is compared in asking does the same work: torch and the engine, LLaVA-Mini and LLaVA-v1.5's arithmetic."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_model import small_config

from llava_mini_jax.analyze.flops import prompt_flops
from llava_mini_jax.benchmark import asking, few_bits, sessions, train_step
from llava_mini_jax.benchmark.asking import MINI, V15, Speed
from llava_mini_jax.benchmark.train_step import Size
from llava_mini_jax.config import ConfigError
from llava_mini_jax.train.tree import flatten

pytestmark = pytest.mark.usefixtures('quick_compilation')
MODEL = small_config(
  detach_text=False,
  compressor=dict(grid=2),
  prefusion=dict(num_layers=1),
  decoder=dict(vocab_size=512, max_position_embeddings=512),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setitem(train_step.SIZES, 'small', lambda: Size(MODEL, rows=3, length=24, question=7, answer=5))


def found(kinds, **options) -> list[Speed]:
  options = dict(tokens=4, rounds=2, torch=False, tell=lambda line: None) | options
  return list(asking.measure_all('small', kinds, [1, 2], **options))


@pytest.mark.slow
def test_every_kind_is_asked_of_whom_it_can_be():
  speeds = found(['text', 'images'])
  assert [(s.kind, s.requests, s.system) for s in speeds] == [
    ('text', 1, MINI),
    ('text', 2, MINI),
    ('images', 1, MINI),
    ('images', 1, V15),
    ('images', 2, MINI),
    ('images', 2, V15),
  ]
  assert all(len(s.first) == len(s.rest) == 2 and min(*s.first, *s.rest) > 0 for s in speeds)
  mini, v15 = (s.prompt_flops for s in speeds[2:4])
  text = mini - 4 * (prompt_flops(MODEL, 0).total - prompt_flops(MODEL, 0).decoder)
  assert text > 0 and mini != v15


def test_v15_has_the_same_weights_and_no_compressor():
  mesh = jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'), devices=jax.devices()[:1])
  mini = asking.random_run(MODEL, mesh)
  ours, theirs = flatten(mini.params), flatten(asking.as_v15(mini).params)
  assert {path.split('/')[0] for path in ours.keys() - theirs.keys()} == {'compressor', 'prefusion'}
  assert theirs.keys() < ours.keys() and all(theirs[path] is ours[path] for path in theirs)


@pytest.mark.slow
def test_torch_gives_the_same_answers(monkeypatch):
  speeds = found(['text', 'image', 'images', 'video'], torch=True)
  assert sum(s.system.endswith(', torch') for s in speeds) == len(speeds) / 2
  from llava_mini_jax.benchmark.torch_twin import Twin

  compress = Twin.compress
  monkeypatch.setattr(Twin, 'compress', lambda self, x: 10 * compress(self, x))
  with pytest.raises(ArithmeticError, match='LLaVA-Mini, image: expected the same answers; found'):
    found(['image'], torch=True)


def test_the_table():
  ours = Speed('x', MINI, 'image', 4, 11, (0.2, 0.1), (2.0, 1.0), 5e9, 2**21)
  peers = [
    Speed('x', f'{MINI}, torch', 'image', 4, 11, (0.4,), (2.0,), 5e9, 0),
    Speed('x', V15, 'image', 4, 11, (0.3,), (2.0,), 9e9, 2**22),
  ]
  lines = asking.describe([ours, *peers]).splitlines()
  assert lines[2] == '| x | image | 4 | LLaVA-Mini | 100.0 | 40 | 40.0 | 5.00 | 2 | 0.25 | 0.50 | 3.00 |'
  assert lines[4] == '| x | image | 4 | LLaVA-v1.5 style | 300.0 | 20 | 13.3 | 9.00 | 4 |  |  |  |'


@pytest.mark.parametrize(
  'build',
  [lambda: asking.model_of('other'), lambda: list(found(['smell'])), lambda: list(few_bits.few_bits('vicuna_7b'))],
)
def test_what_is_not_measured(build):
  with pytest.raises(ConfigError, match='expected one of'):
    build()


@pytest.mark.slow
def test_few_bits():
  """Kernels of decoder and pre-fusion alone get smaller; packed, int4 takes half of int8."""
  by_kind = {kept.kernels or kept.dtype: kept for kept in few_bits.few_bits('small')}
  assert by_kind['float32'].error == 0 and by_kind['float32'].same == 1
  assert 0 < by_kind['int8'].error < by_kind['int4'].error
  assert by_kind['int4'].bytes < by_kind['int8'].bytes < by_kind['float32'].bytes
  assert by_kind['bfloat16'].bytes < 0.6 * by_kind['float32'].bytes
  assert few_bits.packed_bytes([np.zeros(6, jax.numpy.int4), np.zeros(3, np.float32)]) == 3 + 12


@pytest.mark.slow
def test_later_questions():
  """All that is vision is saved; with features on the host, the tower alone."""
  gains = {(g.kind, g.keep): g for g in sessions.gains('small', rounds=2)}
  assert set(gains) == {(kind, keep) for kind, ways in sessions.KEPT.items() for keep in ways}
  assert all(g.afresh > 0 and g.later > 0 for g in gains.values())
  seen, features = gains['video', 'seen'], gains['video', 'features']
  assert seen.flops_afresh == features.flops_afresh > features.flops_later > seen.flops_later
  assert len(sessions.describe_gains(list(gains.values())).splitlines()) == 2 + len(gains)


def test_a_video_takes_no_memory_for_seeing():
  """Features are on the host; of what is on the device only the row grows."""
  short, long = sessions.video_sessions('small', [40, 8], chunk=4)
  assert (short.frames, long.frames) == (8, 40)
  assert long.host == 5 * short.host > 0 and long.slot > short.slot
  assert long.seeing == short.seeing

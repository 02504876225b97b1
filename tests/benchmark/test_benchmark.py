"""What is compared computes the same: the step in torch, and the step on several devices."""

from __future__ import annotations

import re

import pytest
from small_model import small_config

from llava_mini_jax.benchmark import scaling, torch_twin, train_step
from llava_mini_jax.benchmark.train_step import Clock, Result, Size
from llava_mini_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures('quick_compilation')
MODEL = small_config(detach_text=False, compressor=dict(grid=2), prefusion=dict(num_layers=1))


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """A size that compiles quickly, with grouped heads, four tokens per image, and rows that are not full."""
  monkeypatch.setitem(train_step.SIZES, 'small', lambda: Size(MODEL, rows=3, length=24, question=7, answer=5))


@pytest.fixture(scope='module')
def tolerance():
  return 1e-5


@pytest.mark.slow
def test_torch_takes_the_same_steps(monkeypatch, tolerance):
  """Losses of three steps, so gradients, clipping and AdamW too; a twin of another rate is found out."""
  monkeypatch.setattr(train_step, 'TOLERANCE', tolerance)
  monkeypatch.setattr(train_step, 'RATE', 1e-2)
  result = train_step.compare('small', rounds=2)
  assert result.losses[0][0] - result.losses[-1][0] > 0.1, 'there is something to agree on'
  assert [len(times) for clock in (result.jax, result.torch) for times in (clock.wall, clock.processor)] == [2] * 4
  init = torch_twin.Twin.__init__
  monkeypatch.setattr(torch_twin.Twin, '__init__', lambda *a, rate, **k: init(*a, rate=0.9 * rate, **k))
  with pytest.raises(ArithmeticError, match='small: expected the losses of both to agree within'):
    train_step.compare('small', rounds=1)


def test_what_the_twin_does_not_compute():
  with pytest.raises(ConfigError, match='torch twin: expected a released compressor'):
    torch_twin.check(small_config(detach_text=True))


@pytest.mark.slow
def test_devices_take_the_same_steps(tolerance):
  found = scaling.scaling('small')
  assert list(found.losses) == [1, 2, 4, 8]
  assert found.worst < tolerance
  assert scaling.describe(found).splitlines()[-1] == f'largest difference from one device: {found.worst:.1e}'


def test_the_ratio():
  """Of minima and of medians, JAX over torch."""
  result = Result('x', Clock((2.0, 3.0, 9.0), (1.0,) * 3), Clock((4.0, 5.0, 6.0), (2.0,) * 3), 2, ())
  line = train_step.describe([result]).splitlines()[2]
  assert line == '| x | 2 | wall | 2000.0 / 3000.0 | 4000.0 / 5000.0 | 0.50 / 0.60 |'


def test_an_unknown_size():
  with pytest.raises(ConfigError, match=re.escape("size: expected one of tiny, medium, small; found 'huge'")):
    train_step.compare('huge')

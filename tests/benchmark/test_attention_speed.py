"""Attention of three systems is timed on the same numbers."""

from __future__ import annotations

import pytest

from llava_mini_jax.benchmark import attention_speed

SHAPES = ((2, 9, 4, 4, 8, False), (1, 12, 4, 2, 8, True))


def test_all_give_the_same_and_have_a_line(monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(attention_speed, 'SHAPES', SHAPES)
  found = list(attention_speed.speeds(rounds=1))
  assert [(s.shape, s.system) for s in found] == [
    (shape, system) for shape in SHAPES for system in ('attend_on_cpu', 'jax.nn', 'torch')
  ]
  assert all(min(s.forward, s.both) > 0 for s in found)
  lines = attention_speed.describe(found).splitlines()
  assert len(lines) == 2 + 6 and lines[2].startswith('| 2, 9, 4, 4, 8, False | attend_on_cpu |')


def test_one_that_computes_something_else_is_found_out(monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(attention_speed, 'SHAPES', SHAPES)
  attend = attention_speed.attend_on_cpu
  monkeypatch.setattr(attention_speed, 'attend_on_cpu', lambda *heads, mask: 1.01 * attend(*heads, mask=mask))
  with pytest.raises(ArithmeticError, match='^attention: expected values within 0.001; jax.nn differs by '):
    list(attention_speed.speeds(rounds=1))

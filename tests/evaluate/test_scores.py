"""Exact match, by category, and a contact sheet of many images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.evaluate.contact_sheet import _answer, contact_sheet
from llava_mini_jax.evaluate.exact_match import accuracy, is_match


@pytest.mark.parametrize(
  ('answer', 'truth', 'equal'),
  [
    ('red', 'red', True),
    (' Red\n', 'rED', True),
    ('red', 'blue', False),
    ('red', 'red.', False),
    ('dark red', 'red', False),
    ('', '', True),
    ('', 'red', False),
  ],
)
def test_exact_match(answer, truth, equal):
  assert is_match(answer, truth) is equal


def test_accuracy_by_category():
  rows = [dict(category=c, correct=r) for c, r in (('b', True), ('a', False), ('b', False), ('', True), ('b', True))]
  found = accuracy(rows)
  assert found == {
    'accuracy': 3 / 5,
    'count': 5,
    'by_category': {
      'a': {'accuracy': 0.0, 'count': 1},
      'b': {'accuracy': 2 / 3, 'count': 3},
      'uncategorised': {'accuracy': 1.0, 'count': 1},
    },
  }
  assert list(found['by_category']) == ['a', 'b', 'uncategorised']
  assert accuracy([]) == {'accuracy': 0.0, 'count': 0, 'by_category': {}}


def test_a_contact_sheet_with_more_images_than_a_row_holds(tmp_path):
  rows = [dict(question='what ' * 20, answer='', truth='red', correct=False)] * 5
  images = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]
  contact_sheet(images, rows, tmp_path / 'sheet.png', title='five', columns=2)
  with Image.open(tmp_path / 'sheet.png') as image:
    tall = image.size
  contact_sheet(images[:2], rows[:2], tmp_path / 'sheet.png', title='two', columns=2)
  with Image.open(tmp_path / 'sheet.png') as image:
    assert tall[0] == image.size[0] and tall[1] > 2 * image.size[1]


def test_what_a_contact_sheet_says(tmp_path):
  """Texts of any length, and what matplotlib would take for formulas."""
  wrong = dict(question='how much?', answer='$\\frac$ ' + 'much ' * 60, truth='$x^$', correct=False)
  lines = _answer(wrong).split('\n')
  assert lines[-1] == '(truth: $x^$)' and lines[-2].endswith(' …') and max(map(len, lines)) <= 22
  assert _answer(wrong | dict(answer='')) == '(nothing)\n(truth: $x^$)'
  assert _answer(dict(answer='red', truth='red', correct=True)) == 'red'
  image, sizes = np.zeros((8, 12, 3), np.uint8), {}
  for name, row in dict(long=wrong, short=dict(wrong, answer='$')).items():
    contact_sheet([image], [row], tmp_path / f'{name}.png', title='$', columns=1)
    with Image.open(tmp_path / f'{name}.png') as sheet:
      sizes[name] = sheet.size
  assert sizes['long'][1] > sizes['short'][1] and sizes['long'][0] == sizes['short'][0]

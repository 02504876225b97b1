"""Choosing among the questions of a record."""

from __future__ import annotations

import numpy as np

from llava_mini_jax.data.samples import choose_turns

TURNS = [
  {'role': 'user', 'content': '<image>\nq0'},
  {'role': 'assistant', 'content': 'a0'},
  {'role': 'user', 'content': 'q1'},
  {'role': 'assistant', 'content': 'a1'},
  {'role': 'user', 'content': 'q2'},
  {'role': 'assistant', 'content': 'a2'},
]


def test_chosen_turns_keep_their_answers_and_the_tag_leads():
  seen, before = {}, [dict(turn) for turn in TURNS]
  for seed in range(3000):
    chosen = choose_turns(TURNS, np.random.default_rng(seed), 2)
    contents = [turn['content'] for turn in chosen]
    assert contents[0].startswith('<image>\n') and sum('<image>' in text for text in contents) == 1
    numbers = tuple(text[-1] for text in contents[0::2])
    assert contents[1::2] == [f'a{n}' for n in numbers]
    assert len(set(numbers)) == len(numbers)
    seen[numbers] = seen.get(numbers, 0) + 1
  assert before == TURNS
  assert len(seen) == 3 + 6
  assert 1350 < sum(count for numbers, count in seen.items() if len(numbers) == 1) < 1650


def test_turns_that_are_not_a_matter_of_choice():
  rng = np.random.default_rng(0)
  two_tags = [{'role': 'user', 'content': '<image>'}, TURNS[1], {'role': 'user', 'content': '<image>'}, TURNS[3]]
  assert choose_turns(two_tags, rng, 1) == two_tags
  system = {'role': 'system', 'content': 's'}
  assert choose_turns([system, *TURNS], rng, 1)[0] == system
  text = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]
  assert choose_turns(text, rng, 3) == text
  assert choose_turns(TURNS[:1], rng, 3) == TURNS[:1]

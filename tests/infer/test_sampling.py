"""Sampling against a reference in NumPy, one slot at a time: which tokens are left, and how often each is drawn."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llava_mini_jax.config import ConfigError
from llava_mini_jax.infer.sampling import Controls, Sampling, allowed, choose, log_probabilities

VOCAB = 12
RULES = [
  Sampling(),
  Sampling(temperature=1.0),
  Sampling(temperature=0.7, top_k=3, seed=5),
  Sampling(temperature=1.3, top_p=0.6),
  Sampling(temperature=0.9, min_p=0.3, seed=9),
  Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.1, repetition_penalty=1.7),
  Sampling(repetition_penalty=3.0),
  Sampling(temperature=1.0, top_p=1e-6),
]


def random_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  return 2 * rng.normal(size=(len(RULES), VOCAB)).astype(np.float32), rng.random((len(RULES), VOCAB)) < 0.3


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max())
  return e / e.sum()


def reference(logits: np.ndarray, used: np.ndarray, rules: Sampling) -> np.ndarray:
  """Probability of every token, float64[vocab]; the rules one after another over the tokens that are left."""
  x = logits.astype(np.float64)
  x = np.where(used, np.where(x > 0, x / rules.repetition_penalty, x * rules.repetition_penalty), x)
  if not rules.temperature:
    return np.eye(VOCAB)[x.argmax()]
  x = x / rules.temperature
  left = list(np.argsort(-x))
  if rules.top_k:
    left = left[: rules.top_k]
  share = softmax(x[left])
  enough = int(np.searchsorted(np.cumsum(share), rules.top_p)) + 1
  left = left[:enough]
  share = softmax(x[left])
  left = [token for token, p in zip(left, share, strict=True) if p >= rules.min_p * share[0]]
  found = np.zeros(VOCAB)
  found[left] = softmax(x[left])
  return found


def test_a_temperature_too_low_to_divide_by_is_greedy():
  (logits, used), chosen = random_case(), jax.jit(choose)
  for temperature in (9.9e-7, 1e-30, 1e-38, 1e-40, 1e-300):
    said, controls = np.zeros(len(RULES), np.int32), Controls.of([Sampling(temperature=temperature)] * len(RULES))
    np.testing.assert_array_equal(chosen(logits, np.zeros_like(used), said, controls), logits.argmax(-1))
    assert not controls.temperature.any()
  assert Controls.of([Sampling(temperature=1e-6)]).temperature[0] > 0


def test_draws_have_the_probabilities_of_the_reference():
  """Of 4,000 draws per rule; none of a token that the rules leave out."""
  logits, used = random_case()
  draws = 4000
  many = jax.jit(jax.vmap(choose, in_axes=(None, None, 0, None)))
  said = np.arange(draws, dtype=np.int32)[:, None].repeat(len(RULES), 1)
  found = np.asarray(many(logits, used, said, Controls.of(RULES)))
  for slot, rules in enumerate(RULES):
    expected = reference(logits[slot], used[slot], rules)
    share = np.bincount(found[:, slot], minlength=VOCAB) / draws
    assert not share[expected == 0].any(), rules
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / draws), err_msg=str(rules))


@pytest.mark.parametrize('seed', range(20))
def test_the_same_tokens_are_left(seed):
  logits, used = random_case(seed)
  found = np.asarray(allowed(logits, Controls.of(RULES)))
  for slot, rules in enumerate(RULES):
    plain = Sampling(temperature=1.0, top_k=rules.top_k, top_p=rules.top_p, min_p=rules.min_p)
    expected = reference(logits[slot], np.zeros(VOCAB, bool), plain) > 0
    np.testing.assert_array_equal(np.isfinite(found[slot]), expected, err_msg=str(rules))


def test_a_slot_does_not_depend_on_the_others():
  """Alone, in another place, and beside others: the same token at every step."""
  logits, used = random_case(3)
  step = jax.jit(choose)
  for said in range(5):
    together = np.asarray(step(logits, used, np.full(len(RULES), said), Controls.of(RULES)))
    turned = np.asarray(step(logits[::-1], used[::-1], np.full(len(RULES), said), Controls.of(RULES[::-1])))
    np.testing.assert_array_equal(together, turned[::-1])
    for slot, rules in enumerate(RULES):
      one = slice(slot, slot + 1)
      assert step(logits[one], used[one], np.full(1, said), Controls.of([rules]))[0] == together[slot]


def test_log_probabilities_are_the_models_own():
  logits, _ = random_case(1)
  tokens = np.arange(len(RULES), dtype=np.int32)
  own, best, ids = log_probabilities(logits, tokens, 3)
  for slot in range(len(RULES)):
    expected = np.log(softmax(logits[slot].astype(np.float64)))
    np.testing.assert_allclose(own[slot], expected[slot], rtol=1e-5)
    order = np.argsort(-expected)[:3]
    np.testing.assert_array_equal(ids[slot], order)
    np.testing.assert_allclose(best[slot], expected[order], rtol=1e-5)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (dict(temperature=-1.0), 'Sampling.temperature: expected a number from 0; found -1.0'),
    (dict(temperature=float('nan')), 'Sampling.temperature: expected a number from 0; found nan'),
    (dict(top_p=0), 'Sampling.top_p: expected more than 0, at most 1; found 0'),
    (dict(top_k=-1), 'Sampling.top_k: expected 0 or more; found -1'),
    (dict(min_p=1.5), 'Sampling.min_p: expected a probability; found 1.5'),
    (dict(repetition_penalty=0), 'Sampling.repetition_penalty: expected a positive number; found 0'),
    (dict(max_new_tokens=0), 'Sampling.max_new_tokens: expected a positive integer; found 0'),
    (dict(seed=-1), 'Sampling.seed: expected an integer of 32 bits, 0 or more; found -1'),
    (dict(stop=('',)), "Sampling.stop: expected texts that are not empty; found ('',)"),
    (dict(top_logprobs=21), 'Sampling.top_logprobs: expected 0 to 20; found 21'),
  ],
)
def test_what_cannot_be_is_refused(wrong, message):
  with pytest.raises(ConfigError) as caught:
    Sampling(**wrong)
  assert str(caught.value) == message

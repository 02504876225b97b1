"""The loss equals torch's cross-entropy over the learnt tokens, and is 0 where nothing is learnt."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from torch_parity import close

from llava_mini_jax.train.loss import next_token_loss

ROWS, LENGTH, VOCAB = 3, 7, 11


@pytest.fixture(scope='module')
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(ROWS, LENGTH, VOCAB))).astype(np.float32)
  targets = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  mask = rng.random((ROWS, LENGTH)) < 0.4
  mask[2] = False  # a row without learnt tokens
  return logits, targets, mask


def value_and_grad(logits, targets, mask):
  return jax.value_and_grad(lambda x: next_token_loss(x, targets, mask), has_aux=True)(logits)


def test_value_and_gradient_equal_torch(example):
  logits, targets, mask = example
  labels = torch.tensor(np.where(mask, targets, -100)).long()
  theirs = torch.tensor(logits, requires_grad=True)
  expected = torch.nn.functional.cross_entropy(theirs.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100)
  expected.backward()
  (loss, metrics), grad = value_and_grad(*example)
  assert loss.dtype == np.float32
  close(loss, expected.detach().numpy(), 'loss', 1e-6)
  close(grad, theirs.grad.numpy(), 'gradient', 1e-6)
  assert metrics['target_tokens'] == mask.sum() > 0


def test_rows_weigh_by_their_learnt_tokens(example):
  """A mean over tokens, not over rows."""
  logits, targets, mask = example
  counts = mask.sum(1)
  assert counts[0] != counts[1]
  rows = [float(next_token_loss(logits[i : i + 1], targets[i : i + 1], mask[i : i + 1])[0]) for i in (0, 1)]
  assert abs(float(next_token_loss(*example)[0]) - np.average(rows, weights=counts[:2])) < 1e-6


def test_nothing_to_learn_is_zero_with_a_zero_gradient(example):
  logits, targets, mask = example
  (loss, metrics), grad = value_and_grad(logits, targets, np.zeros_like(mask))
  assert loss == 0 and metrics['target_tokens'] == 0 and metrics['accuracy'] == 0
  np.testing.assert_array_equal(grad, np.zeros_like(logits))


def test_tokens_not_learnt_do_not_count(example):
  logits, targets, mask = example
  other = np.where(mask[..., None], logits, 100 - logits)
  assert next_token_loss(other, np.where(mask, targets, 0), mask)[0] == next_token_loss(*example)[0]
  _, grad = value_and_grad(*example)
  assert not np.asarray(grad)[~mask].any() and np.asarray(grad)[mask].any(-1).all()


def test_accuracy_is_the_share_of_learnt_tokens_that_are_most_likely(example):
  logits, targets, mask = example
  logits, (hit, miss) = logits.copy(), np.argwhere(mask)[[0, 1]]
  logits[mask] = 0
  for place, token in ((hit, targets[tuple(hit)]), (miss, (targets[tuple(miss)] + 1) % VOCAB)):
    logits[(*place, token)] = 5
  others = [tuple(place) for place in np.argwhere(mask)[2:]]
  for place in others:
    logits[(*place, (targets[place] + 2) % VOCAB)] = 1
  _, metrics = next_token_loss(logits, targets, mask)
  assert abs(float(metrics['accuracy']) - 1 / mask.sum()) < 1e-7


def test_large_logits_neither_overflow_nor_lose_the_gradient():
  logits = np.array([[[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]], np.float32)
  (loss, _), grad = value_and_grad(logits, np.array([[0, 1]]), np.array([[True, True]]))
  assert loss == 1e4  # 0 for the first token, 2e4 for the second
  close(grad, [[[0, 0, 0], [0.5, -0.5, 0]]], 'gradient', 1e-6)

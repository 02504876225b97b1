"""The loss equals torch's cross-entropy over the learnt tokens, is 0 where there is none, and the same in chunks."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_model import quick_jit
from torch_parity import close

from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.loss import head_loss, next_token_loss

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


# ----------------------------------------------------------------------------------------------------- without logits

B, L, D, V = 8, 5, 16, 48
WHOLE, MANY = 2**20, 7 * V * 4  # one chunk; chunks of at most seven tokens, the last of them padded


@pytest.fixture(scope='module')
def headed() -> tuple[np.ndarray, ...]:
  """hidden, head, targets, mask; two tokens of the vocabulary are always equally likely."""
  rng = np.random.default_rng(1)
  hidden, head = rng.normal(size=(B, L, D)).astype(np.float32), rng.normal(0, 0.3, (D, V)).astype(np.float32)
  head[:, 40] = head[:, 3]
  mask = rng.random((B, L)) < 0.6
  mask[2] = False
  return hidden, head, rng.integers(0, V, (B, L)).astype(np.int32), mask


def plain(hidden, head, targets, mask):
  logits = jnp.einsum('BLD,DV->BLV', hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return next_token_loss(logits, targets, mask)


def differentiated(loss, hidden, head, targets, mask):
  """Half the loss, so that a cotangent that is not 1 comes back."""

  def halved(hidden, head):
    value, metrics = loss(hidden, head, targets, mask)
    return value / 2, metrics

  return quick_jit(jax.value_and_grad(halved, argnums=(0, 1), has_aux=True))(hidden, head)


@pytest.mark.parametrize('chunk', [WHOLE, MANY, 1])
@pytest.mark.parametrize('mesh', [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_in_chunks_and_on_meshes_it_is_the_plain_loss(headed, chunk, mesh):
  (expected, metrics), grads = differentiated(plain, *headed)
  if mesh is None:
    (loss, ours), found = differentiated(lambda *a: head_loss(*a, chunk_bytes=chunk), *headed)
  else:
    with use_mesh(make_mesh(mesh)):
      (loss, ours), found = differentiated(lambda *a: head_loss(*a, chunk_bytes=chunk), *headed)
  close(loss, expected, 'loss', 1e-6)
  for name, value in metrics.items():
    close(ours[name], value, name, 1e-6)
  for name, grad, theirs in zip(('hidden', 'head'), found, grads, strict=True):
    close(grad, theirs, name, 1e-6)


def test_of_equally_likely_tokens_the_first_counts(headed):
  _, head, _, _ = headed
  hidden = np.broadcast_to(head[:, 3], (B, L, D)) * 99
  found = []
  for target in (3, 40):
    targets = np.full((B, L), target, np.int32)
    with use_mesh(make_mesh((1, 1, 8))):
      found.append(float(head_loss(hidden, head, targets, np.ones((B, L), bool))[1]['accuracy']))
  np.testing.assert_allclose(found, [1.0, 0.0], atol=1e-6)


def test_nothing_to_learn_in_chunks_is_zero_with_zero_gradients(headed):
  hidden, head, targets, mask = headed
  (loss, metrics), grads = differentiated(head_loss, hidden, head, targets, np.zeros_like(mask))
  assert loss == 0 and metrics['target_tokens'] == 0 and not any(np.asarray(grad).any() for grad in grads)


def test_the_logits_of_all_tokens_are_never_held(headed):
  """No array of the program, forward and backward, is as large; of the plain loss, several are."""

  def largest(loss):
    program = str(jax.make_jaxpr(jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1)))(*headed))
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'f32\[([\d,]+)\]', program)]
    return max(sizes)

  assert largest(plain) == B * L * V
  assert largest(lambda *a: head_loss(*a, chunk_bytes=MANY)) < B * L * V / 2


def test_in_bfloat16_its_gradients_are_as_good_as_those_of_the_plain_loss(headed):
  _, exact = differentiated(plain, *headed)
  half = (headed[0].astype(jnp.bfloat16), *headed[1:])
  for i, name in enumerate(('hidden', 'head')):
    off = [
      np.abs(np.asarray(differentiated(loss, *half)[1][i], np.float32) - exact[i]).max() for loss in (plain, head_loss)
    ]
    assert off[1] <= 1.5 * off[0], name

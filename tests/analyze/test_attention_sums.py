"""Where the decoder looks, on models whose attention is known and against plain numpy."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, with_params

from llava_mini_jax.analyze.attention import KINDS, added, attention_sums, kinds, right_without_vision
from llava_mini_jax.types import Batch

CONFIG = small_config(compressor=dict(kind='none'), prefusion=dict(num_layers=0))  # 16 vision tokens each
PATCHES = CONFIG.vision.num_patches
TEXT, ANSWER = (3, 4), 3
LENGTH = sum(TEXT) + PATCHES + ANSWER + 2


def batch_of(rows: int = 1, **options) -> Batch:
  samples = [random_sample(CONFIG, seed, text=TEXT, answer=ANSWER, **options) for seed in range(rows)]
  return lay_out(CONFIG, samples, length=LENGTH, visuals=1)


def uniform(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every score is 0."""
  return {path: x * (not path.endswith('self_attn/q_proj')) for path, x in params.items()}


@quick_jit
def sums_of(params, batch):
  return attention_sums(with_params(CONFIG, params), batch)


@quick_jit
def right(params, batch, dropped):
  return right_without_vision(with_params(CONFIG, params), batch, dropped)


def test_kinds():
  """text text text 16×vision text text text text answer answer answer padding padding."""
  found = np.asarray(kinds(batch_of()))[0]
  names = [KINDS[kind.argmax()] if kind.any() else 'padding' for kind in found]
  expected = ['instruction'] * 3 + ['vision'] * PATCHES + ['instruction'] * 4 + ['response'] * 3 + ['padding'] * 2
  assert names == expected and (found.sum(1) <= 1).all()


def test_uniform_attention():
  """A token that sees t tokens gives each 1 / t; its entropy within a kind is the log of how many it sees of it."""
  found = jax.tree.map(np.asarray, sums_of(uniform(random_params(CONFIG)), batch_of()))
  order = [0] * 3 + [1] * PATCHES + [0] * 4 + [2] * 3
  flow, seen, entropy, entropies = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3), np.zeros(3)
  for at, kind in enumerate(order):
    for other in range(3):
      count = order[: at + 1].count(other)
      flow[kind, other] += count / (at + 1)
      seen[kind, other] += count > 0
      entropy[other] += math.log(count) if count else 0
      entropies[other] += count > 0
  for layer in range(CONFIG.decoder.num_hidden_layers):
    np.testing.assert_allclose(found.flow[layer], flow, rtol=1e-5)
    np.testing.assert_array_equal(found.flow_count[layer], seen)
    np.testing.assert_allclose(found.entropy[layer], entropy, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.entropy_count[layer], entropies)
  after = [1 / (at + 1) for at, kind in enumerate(order) if kind != 1 and at >= 3 + PATCHES]
  np.testing.assert_allclose(found.mean_map(), sum(after) / len(after), rtol=1e-5)
  assert found.map.shape == (CONFIG.decoder.num_hidden_layers, PATCHES) and found.map_count == 7


def test_against_numpy():
  """Attention of the first layer written out, head by head, of two rows of which one has no image."""
  config, params = CONFIG, random_params(CONFIG)
  rows = batch_of(1)
  blank = lay_out(CONFIG, [random_sample(CONFIG, 5, text=(9,), answer=2, visuals=())], length=LENGTH, visuals=1)
  batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows, blank)
  found = jax.tree.map(np.asarray, sums_of(params, batch))
  x = np.asarray(quick_jit(lambda p, b: with_params(CONFIG, p).embed(b))(params, batch), np.float64)
  of_kind = np.asarray(kinds(batch))
  layer = {
    path.split('/', 2)[2]: np.float64(leaf[0]) for path, leaf in params.items() if path.startswith('decoder/layers/')
  }
  normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.decoder.rms_norm_eps) * layer['input_layernorm/weight']
  heads, width = config.decoder.num_attention_heads, config.decoder.head_dim
  angles = np.arange(LENGTH)[:, None] / config.decoder.rope_theta ** (np.arange(0, width, 2) / width)

  def turn(h):
    a, b = h[:, : width // 2], h[:, width // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=1)

  flow, counts, entropy, spread = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3), np.zeros(3)
  for row in range(2):
    real = int((batch.segment_ids[row] > 0).sum())
    mean = np.zeros((real, real))
    for head in range(heads):
      q = turn(normed[row] @ layer['self_attn/q_proj'][:, head])[:real]
      k = turn(normed[row] @ layer['self_attn/k_proj'][:, head // 2])[:real]
      scores = np.where(np.tri(real, dtype=bool), q @ k.T / math.sqrt(width), -np.inf)
      weights = np.exp(scores - scores.max(1, keepdims=True))
      mean += weights / weights.sum(1, keepdims=True) / heads
    for i in range(real):
      for kind in range(3):
        part = mean[i, of_kind[row, :real, kind]]
        part = part[part > 0]
        if part.size:
          flow[of_kind[row, i].argmax(), kind] += part.sum()
          counts[of_kind[row, i].argmax(), kind] += 1
          entropy[kind] -= (part / part.sum() * np.log(part / part.sum())).sum()
          spread[kind] += 1
  np.testing.assert_allclose(found.flow[0], flow, rtol=1e-4)
  np.testing.assert_array_equal(found.flow_count[0], counts)
  np.testing.assert_allclose(found.entropy[0], entropy, rtol=1e-4)
  np.testing.assert_array_equal(found.entropy_count[0], spread)


def test_attention_of_a_token_adds_up_to_one():
  found = jax.tree.map(np.asarray, sums_of(random_params(CONFIG), batch_of(2)))
  np.testing.assert_allclose(found.flow.sum(2), [[14, 2 * PATCHES, 6]] * 2, rtol=1e-5)


def test_batches_add_up():
  params, batch = random_params(CONFIG), batch_of(3)
  whole = added(None, sums_of(params, batch))
  parts = None
  for row in range(3):
    parts = added(parts, sums_of(params, jax.tree.map(lambda x, row=row: x[row : row + 1], batch)))
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_without_vision():
  """Layers that do not see it answer as if another image were there; all others, and none, as the model does."""
  params, batch = random_params(CONFIG), batch_of(4)
  logits = np.asarray(quick_jit(lambda p, b: with_params(CONFIG, p)(b))(params, batch))
  likely = np.where(batch.loss_mask, logits.argmax(-1), batch.targets)
  batch = dataclasses.replace(batch, targets=likely.astype(np.int32))
  nowhere, everywhere = np.zeros(2, bool), np.ones(2, bool)
  assert tuple(map(int, right(params, batch, nowhere))) == (4, 4)
  one_wrong = likely.copy()
  at = int(batch.loss_mask[2].nonzero()[0][-1])
  one_wrong[2, at] = (one_wrong[2, at] + 1) % CONFIG.decoder.vocab_size
  assert tuple(map(int, right(params, dataclasses.replace(batch, targets=one_wrong), nowhere))) == (3, 4)
  loud = {path: x * (20 if path.startswith(('projector', 'vision')) else 1) for path, x in params.items()}
  blind = int(right(loud, batch, everywhere)[0])
  other = dataclasses.replace(batch, pixels=batch.pixels[::-1])
  assert blind == int(right(loud, other, everywhere)[0])


def test_answers_of_packed_rows_count_one_by_one():
  sample = random_sample(CONFIG, 0, text=(5,), answer=2, visuals=())
  batch = lay_out(CONFIG, [sample], length=LENGTH, visuals=1)
  half = LENGTH // 2
  fields = {
    name: np.array(getattr(batch, name)) for name in ('tokens', 'targets', 'loss_mask', 'segment_ids', 'positions')
  }
  for array in fields.values():
    array[0, half : 2 * half] = array[0, :half]
  fields['segment_ids'][0, half : 2 * half] *= 2
  packed = dataclasses.replace(batch, **fields)
  assert int(right(random_params(CONFIG), packed, np.zeros(2, bool))[1]) == 2


@pytest.mark.parametrize('field', ['flow', 'entropy', 'map'])
def test_text_alone_has_no_vision(field):
  batch = lay_out(CONFIG, [random_sample(CONFIG, 0, text=(5,), answer=2, visuals=())], length=LENGTH, visuals=1)
  found = jax.tree.map(np.asarray, sums_of(random_params(CONFIG), batch))
  vision = dict(flow=found.flow[..., 1], entropy=found.entropy[:, 1], map=found.map)[field]
  assert not vision.any() and np.isfinite(found.mean_entropy()).all()

"""Parity with tensors recorded from the released PyTorch package, for every case under $LLAVA_MINI_GOLDEN.

A case is one or more calls of the released model: keys that begin with one of
`PARTS` belong to a call of their own. A call is compared in up to four ways:
stage by stage on the recorded layout (`enc{k}_*` keys, one call of the released
encoder each); whole, through our own row layout; greedy generation; gradients.
Every key is an input or compared; what is not run is skipped by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import (
  GOLDEN,
  Case,
  Part,
  case_id,
  load_case,
  load_model,
)
from small_model import quick_jit

from llava_mini_jax.convert.released import to_released
from llava_mini_jax.infer.generate import generate
from llava_mini_jax.models.llava_mini import to_raster
from llava_mini_jax.models.prefusion import positions_and_mask
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.tree import flatten, merge
from llava_mini_jax.types import Batch

TOLERANCE = 1e-4
CASES = sorted(GOLDEN.glob('cases/*/*.npz'))
assert CASES, f'no golden cases under {GOLDEN}'


def close(actual, expected, what: str, tolerance: float = TOLERANCE) -> None:
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, f'{what}: shape {actual.shape}, expected {expected.shape}'
  worst = np.abs(actual - expected).max() if actual.size else 0.0
  assert worst <= tolerance, f'{what}: off by {worst:.2e} (tolerance {tolerance})'


@pytest.fixture(params=CASES, ids=case_id)
def case(request) -> Case:
  return load_case(request.param)


def compare_parts(case: Case, kind: str, compare: Callable[[Part], set[str]]) -> None:
  """`compare` gives the keys it compared. Skips, by name, what was not recorded and what is not run."""
  parts = [part for part in case.parts if part.keys(kind)]
  if not parts:
    pytest.skip(f'this case records no {kind}')
  left = []
  for part in parts:
    missed = ', '.join(sorted(part.keys(kind) - compare(part)))
    assert part.broken or not missed, f'{part.name}: recorded but not compared: {missed}'
    if missed:
      left.append(f'{part.name} rows {part.broken} of {missed}')
  if left:
    pytest.skip(f'not run: {"; ".join(left)}: {case.why_broken}')


def test_keys(case):
  """Nothing is recorded that no test knows."""
  assert not case.unknown, f'{case.name}: keys of no known kind: {case.unknown}'
  assert any(part.recorded for part in case.parts), f'{case.name}: only inputs are recorded'


def encode_calls(part: Part) -> Iterator[tuple[np.ndarray, slice]]:
  """(pixels [B V h w 3], rows) of each recorded call of the released encoder."""
  if part.listed:
    for row, frames in enumerate(part.visuals):
      yield from ((frame[None], slice(row, row + 1)) for frame in frames)
  else:
    yield from ((frames, slice(None)) for frames in np.stack(part.visuals, axis=1))


@functools.partial(quick_jit, static_argnums=0)
def run_stages(graphdef: nnx.GraphDef, params: dict, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> dict:
  """One call of the released encoder, under the names of its recorded tensors. Text is not compacted."""
  model = merge(graphdef, params)
  out = {}
  x = out['clip_hidden0'] = model.vision.embed(pixels.reshape(-1, *pixels.shape[2:]), jnp.float32)
  for layer in range(model.config.vision.num_hidden_layers):
    x = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.vision.layers)(x)
    out[f'clip_hidden{layer + 1}'] = x
  features = model.encode_views(pixels)
  out['clip_features'] = features.reshape(-1, *features.shape[2:])
  keys = features[:, -1]
  if features.shape[1] > 1:
    keys = out['compressor_in'] = to_raster(features[:, :-1])
    out['proj_hd_views'] = model.projector(features[:, :-1])
  out['compressor_kv_pos'] = model.compressor.key_positions(keys.shape[1])
  out['compressor_out'] = model.compressor(keys)
  patches, out['proj_compressed'], out['compressor_attn'] = model.compress(features, return_attention=True)
  out['proj_global'] = patches[:, -model.config.vision.num_patches :]

  text = model.decoder.embed(jnp.maximum(ids, 0))
  joined = out['prefusion_in'] = jnp.concatenate([patches, out['proj_compressed'], text], axis=1)
  seen = joined.shape[1] - text.shape[1]
  valid = jnp.concatenate([jnp.ones((len(ids), seen), bool), mask], axis=1)
  out['prefusion_position_ids'], allowed = positions_and_mask(valid)
  out['prefusion_allowed'] = allowed.allowed()
  _, hidden = model.prefusion(joined, valid, return_hidden=True)
  out |= {f'prefusion_out{layer}': x for layer, x in enumerate(hidden)}
  out['fused_compressed'], fused = model.fuse(features, text, mask)
  out['fused_text'] = jnp.where(mask[..., None], fused, text)
  return out


def compare_stages(part: Part) -> set[str]:
  compared = set()
  for k, (pixels, rows) in enumerate(encode_calls(part)):
    mask = part.ids[rows] > 0
    if part.labels is not None:
      mask = mask & (part.labels[rows] == -100)
    for name, actual in run_stages(part.graphdef, part.params, pixels, part.ids[rows], mask).items():
      for key in {f'enc{k}_{name}', name} & part.recorded.keys():
        if np.issubdtype(actual.dtype, np.floating):
          close(actual, part.recorded[key], f'{part.name} {key}')
        else:
          np.testing.assert_array_equal(actual, part.recorded[key], err_msg=f'{part.name} {key}')
        compared.add(key)
  return compared


def test_stages(case):
  """Every recorded intermediate of every encoder call, including those at masked slots."""
  compare_parts(case, 'stage', compare_stages)


@functools.partial(quick_jit, static_argnums=0)
def run_whole(graphdef: nnx.GraphDef, params: dict, batch: Batch) -> dict[str, jax.Array]:
  """Decoder input, every layer's output (the last one normed), logits."""
  model = merge(graphdef, params)
  embeds = model.embed(batch)
  hidden, layers = model.decoder(embeds, batch.positions, batch.segment_ids, return_hidden=True)
  out = {f'lm_hidden{i + 1}': x for i, x in enumerate([*layers[:-1], hidden])}
  return out | dict(inputs_embeds=embeds, logits=model.decoder.logits(hidden))


def compare_layout(part: Part, batch: Batch) -> tuple[np.ndarray, int]:
  """Lengths and labels of the rows. Gives where they lie in the recorded layout, bool[B L2], and the most kept."""
  recorded, limit = part.recorded, part.limit or batch.tokens.shape[1]
  lengths = np.minimum((batch.segment_ids > 0).sum(1), limit)
  right = np.arange(lengths.max()) < lengths[:, None]
  mask = recorded.get('lm_attention_mask', right)
  for i, labels in enumerate(np.where(batch.loss_mask, batch.targets, -100)):
    ours = right[i] if mask[i, 0] else right[i, ::-1]
    np.testing.assert_array_equal(mask[i], ours, err_msg=f'{part.name} lm_attention_mask row {i}')
    if 'lm_labels' in recorded:
      theirs = recorded['lm_labels'][i][ours][1:]
      np.testing.assert_array_equal(labels[: lengths[i] - 1], theirs, err_msg=f'{part.name} lm_labels row {i}')
    # The released decoder counts from the row's start or from its first token: the same under rotary embedding.
    theirs = recorded['lm_position_ids'][i][ours] if 'lm_position_ids' in recorded else np.arange(lengths[i])
    np.testing.assert_array_equal(batch.positions[i, : lengths[i]], theirs - theirs[0])
  return mask, limit


def compare_whole(part: Part) -> set[str]:
  if len(part.broken) == len(part.ids):
    return set()
  batch = part.batch(labels=part.labels)
  ours = run_whole(part.graphdef, part.params, batch)
  mask, limit = compare_layout(part, batch)
  for key in ours.keys() & part.recorded.keys():
    for i, valid in enumerate(mask):
      if i not in part.broken:
        close(ours[key][i, : valid.sum()], part.recorded[key][i][valid], f'{part.name} {key} row {i}')
  if 'loss' in part.recorded and not part.broken:
    kept = batch.loss_mask & (np.arange(batch.loss_mask.shape[1]) < limit - 1)
    if kept.any():
      close(next_token_loss(ours['logits'], batch.targets, kept)[0], part.recorded['loss'], f'{part.name} loss')
    else:
      assert np.isnan(part.recorded['loss']), f'{part.name} loss: expected NaN; found {part.recorded["loss"]}'
  layout = {'lm_attention_mask', 'lm_labels', 'lm_position_ids', 'lm_position_ids_is_none'}
  return layout if part.broken else layout | {'loss', *ours}


def test_whole(case):
  """Spliced embeddings, labels, decoder layers, logits and loss through our own row layout."""
  compare_parts(case, 'whole', compare_whole)


@functools.partial(quick_jit, static_argnums=(0, 3))
def run_generate(graphdef: nnx.GraphDef, params: dict, batch: Batch, count: int) -> tuple[jax.Array, jax.Array]:
  return generate(merge(graphdef, params), batch, max_new_tokens=count, eos_id=None, return_logits=True)


def compare_generation(part: Part) -> set[str]:
  if part.broken:
    return set()
  recorded = {key: np.asarray(part.recorded[key]) for key in part.keys('generation')}
  count = recorded['gen_ids'].shape[-1]
  ids, logits = run_generate(part.graphdef, part.params, part.batch(labels=None), count)
  np.testing.assert_array_equal(ids, recorded['gen_ids'].reshape(-1, count), err_msg=f'{part.name} gen_ids')
  if 'gen_logits' in recorded:
    close(logits, recorded['gen_logits'], f'{part.name} gen_logits')
  if 'gen_margin' in recorded:
    best = np.sort(logits)[..., -2:]
    close(best[..., 1] - best[..., 0], recorded['gen_margin'], f'{part.name} gen_margin')
  return recorded.keys()


def test_generate(case):
  """Greedy ids, exactly, and the logits they were chosen from."""
  compare_parts(case, 'generation', compare_generation)


def test_masked_positions(case):
  """Rows that the released code gets wrong for their padding or holes come out as those rows without them."""
  right = next((part for part in case.parts if part.name.endswith(' unpadded_')), None)
  if right is None or not case.parts[0].broken:
    pytest.skip('this case records no row both broken and unpadded')
  ours = dataclasses.replace(case.parts[0].select(right.rows), recorded=right.recorded)
  if ours.keys('whole'):
    compare_whole(ours)
  if ours.keys('generation'):
    compare_generation(ours)


@functools.partial(quick_jit, static_argnums=0)
def run_gradients(graphdef: nnx.GraphDef, params: dict, batch: Batch) -> tuple[jax.Array, dict]:
  def loss(params):
    return next_token_loss(merge(graphdef, params)(batch), batch.targets, batch.loss_mask)[0]

  return jax.value_and_grad(loss)(params)


def compare_gradients(part: Part) -> set[str]:
  # The released code gives the visuals of stacked videos no gradient; a switch of ours does the same.
  _, graphdef, params = load_model(part.root, video_stop_grad=part.stacked)
  value, grads = run_gradients(graphdef, params, part.batch(labels=part.labels))
  if 'loss' in part.recorded:
    close(value, part.recorded['loss'], f'{part.name} loss')
  ours = to_released({path: np.asarray(grad, np.float64) for path, grad in flatten(grads).items()})
  for key in part.keys('gradient'):
    kind, name = key.split('::')
    expected, norm = part.recorded[key], np.linalg.norm(ours[name])
    if kind == 'gradnone':
      assert norm == 0.0, f'{key}: expected no gradient, norm {norm:.2e}'
    elif kind == 'gradnorm':
      assert abs(norm - expected) <= TOLERANCE * expected, f'{key}: {norm} expected {expected}'
    else:
      mine = ours[name] if kind == 'grad' else ours[name][:16, :16]
      scale = float(part.recorded.get(f'gradnorm::{name}', np.linalg.norm(expected)))
      worst = np.linalg.norm(mine - expected) / max(scale, 1e-12)
      assert worst <= TOLERANCE, f'{key}: relative error {worst:.2e}'
  return part.keys('gradient')


def test_gradients(case):
  """Each tensor to 1e-4 of its norm; and no gradient where the released code gives none."""
  compare_parts(case, 'gradient', compare_gradients)

"""Sizes of the presets, what must not change the model's output, and what every switch of its configuration changes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import (
  VISION,
  lay_out,
  quick_jit,
  random_params,
  random_sample,
  small_config,
  structure,
  with_params,
)
from torch_parity import close

from llava_mini_jax.config import IMAGE_MEAN, IMAGE_STD, LlavaMiniConfig, ScanConfig
from llava_mini_jax.data.branches import share_prefix
from llava_mini_jax.data.conversation import Encoded
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.models.llava_mini import LlavaMini, build, splice, sum_at, to_raster
from llava_mini_jax.models.positions import resize_table, sincos_table
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.tree import abstract_model, flatten, merge, parameter_shapes, unflatten
from llava_mini_jax.types import Batch

EXACT = 1e-5
DIFFERENT = 1e-2


@functools.cache
def compiled(config: LlavaMiniConfig, method):
  """A function of (model, *arguments) as a compiled one of (parameters by path, *arguments)."""
  return quick_jit(lambda params, *args: method(merge(structure(config), unflatten(params)), *args))


def run(config: LlavaMiniConfig, method, *args, params=None):
  """What a function of (model, *arguments) gives for random parameters."""
  return jax.tree.map(np.asarray, compiled(config, method)(params or random_params(config), *args))


def forward(config: LlavaMiniConfig, batch: Batch, **options) -> np.ndarray:
  return run(config, LlavaMini.__call__, batch, **options)


def difference(a, b) -> float:
  assert a.shape == b.shape
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def random_features(seed: int = 0, rows: int = 2, views: int = 1) -> np.ndarray:
  shape = (rows, views, VISION.num_patches, VISION.hidden_size)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KEYS = random_features()[:, 0]

# ---------------------------------------------------------------------------------------------------------- sizes


def count(config: LlavaMiniConfig, part: str) -> int:
  return sum(int(np.prod(shape)) for path, shape in parameter_shapes(config).items() if path.startswith(f'{part}/'))


CLIP_LAYER = 12_596_224
CLIP_L_336 = 303_507_456  # all 24 layers and both LayerNorms


@pytest.mark.parametrize(
  ('preset', 'decoder', 'layer', 'projector'),
  [
    ('vicuna_7b', 6_738_415_616, 202_383_360, 20_979_712),
    ('vicuna_13b', 13_015_864_320, 317_204_480, 31_467_520),
    ('llama31_8b', 8_030_261_248, 218_112_000, 20_979_712),
    ('smollm2_135m', 134_515_008, 3_540_096, 922_752),
  ],
)
def test_parameter_counts_of_the_presets(preset, decoder, layer, projector):
  config = LlavaMiniConfig.preset(preset)
  assert count(config, 'decoder') == decoder
  assert count(config, 'prefusion') == 4 * layer
  assert count(config, 'projector') == projector
  # Query and position table of one token, two LayerNorms, and four maps with biases.
  assert count(config, 'compressor') == 2 * 1024 + 2 * 2048 + 4 * (1024 * 1024 + 1024) == 4_204_544
  assert count(config, 'vision') == CLIP_L_336 - CLIP_LAYER - 2048  # neither the last layer nor the norm behind it


def test_the_whole_tower_has_the_size_of_clip():
  config = LlavaMiniConfig.preset('vicuna_7b')
  kept = dataclasses.replace(config, vision=dataclasses.replace(config.vision, keep_unused_layers=True))
  assert count(kept, 'vision') == CLIP_L_336


def test_tied_decoder_has_no_head_of_its_own():
  for preset, tied in (('smollm2_135m', True), ('tiny', False)):
    assert ('decoder/lm_head' in parameter_shapes(LlavaMiniConfig.preset(preset))) != tied


# ---------------------------------------------------------------------------------------------------- invariances

CONFIG = small_config(compressor=dict(grid=2))  # 4 tokens per visual
LENGTH = 26
SAMPLES = (
  random_sample(CONFIG, 0),
  random_sample(CONFIG, 1, text=(7,), visuals=()),
  random_sample(CONFIG, 2, text=(2, 3, 4), visuals=(1, 1)),
  random_sample(CONFIG, 3, text=(1, 5), visuals=(3,)),
)


def per_sample(logits: np.ndarray, batch: Batch) -> list[np.ndarray]:
  """The logits of each row's tokens, padding left out."""
  return [row[segments > 0] for row, segments in zip(logits, batch.segment_ids, strict=True)]


@pytest.fixture(scope='module')
def base() -> tuple[Batch, list[np.ndarray]]:
  batch = lay_out(CONFIG, SAMPLES, length=LENGTH, visuals=3)
  return batch, per_sample(forward(CONFIG, batch), batch)


def assert_same(batch: Batch, expected: list[np.ndarray]) -> None:
  for i, (ours, theirs) in enumerate(zip(per_sample(forward(CONFIG, batch), batch), expected, strict=True)):
    close(ours, theirs, f'sample {i}', EXACT)


def test_the_logits_depend_on_every_input(base):
  """Else the invariances below would hold of a model that ignores its inputs."""
  batch, expected = base
  for row, sample in enumerate(SAMPLES):
    for visual in range(len(sample.pixels)):
      pixels = batch.pixels.copy()
      pixels[row, visual] += 1.0
      changed = per_sample(forward(CONFIG, dataclasses.replace(batch, pixels=pixels)), batch)
      assert difference(changed[row], expected[row]) > DIFFERENT
      assert all(difference(changed[i], expected[i]) == 0 for i in range(len(SAMPLES)) if i != row)
    tokens = batch.tokens.copy()
    tokens[row, 0] = tokens[row, 0] % 63 + 1
    changed = per_sample(forward(CONFIG, dataclasses.replace(batch, tokens=tokens)), batch)
    assert difference(changed[row], expected[row]) > DIFFERENT


def test_fused_tokens_may_lie_anywhere_among_their_slots(base):
  """One fused-text slot per token of the row with holes, as in the released code, against the compact list."""
  batch, expected = base
  at = np.arange(LENGTH)
  index = np.stack([
    np.stack([np.where(np.isin(at, listed), at, LENGTH) for listed in row]) for row in batch.fuse_index
  ]).astype(np.int32)  # fmt: skip
  spread = dataclasses.replace(batch, fuse_index=index, fuse_mask=index < LENGTH)
  assert difference(spread.fuse_mask * 1, batch.fuse_mask * 1) == 1 and spread.fuse_mask.sum() == batch.fuse_mask.sum()
  assert_same(spread, expected)


def test_fewer_fused_text_slots_are_exact(base):
  batch, expected = base
  needed = int(batch.fuse_mask.sum(-1).max())
  assert needed < LENGTH // 2
  assert_same(lay_out(CONFIG, SAMPLES, length=LENGTH, visuals=3, fused_text=needed), expected)


def test_more_padding_changes_nothing(base):
  """Longer rows, more absent visuals, more empty fused-text slots."""
  _, expected = base
  assert_same(lay_out(CONFIG, SAMPLES, length=LENGTH + 5, visuals=4, fused_text=LENGTH + 8), expected)


def test_what_stands_in_padding_changes_nothing(base):
  batch, expected = base
  padding = batch.segment_ids == 0
  slots = np.zeros_like(padding)
  for row, listed in enumerate(batch.slot_index.reshape(len(SAMPLES), -1)):
    slots[row, listed[listed < LENGTH]] = True
  tokens = np.where(padding | slots, 9, batch.tokens)
  assert slots.sum() == 4 * 6 and padding.any()
  assert_same(dataclasses.replace(batch, tokens=tokens, positions=np.where(padding, 3, batch.positions)), expected)


def test_the_order_of_rows_does_not_matter(base):
  batch, expected = base
  order = [2, 0, 3, 1]
  assert_same(jax.tree.map(lambda x: x[order], batch), [expected[i] for i in order])


def test_the_order_of_visuals_in_a_row_does_not_matter(base):
  """An image is known by its slots and its text, not by where it stands among the pixels."""
  batch, expected = base
  fields = ('pixels', 'fuse_index', 'fuse_mask', 'slot_index')
  assert_same(dataclasses.replace(batch, **{name: getattr(batch, name)[:, [2, 0, 1]] for name in fields}), expected)


def pack(samples: tuple[Batch, ...], length: int, visuals: int) -> Batch:
  """Batches of one unpadded row each -> one packed row, with every index moved to where its sample went."""
  row = dict(
    tokens=np.zeros(length, np.int32),
    targets=np.zeros(length, np.int32),
    loss_mask=np.zeros(length, bool),
    segment_ids=np.zeros(length, np.int32),
    positions=np.zeros(length, np.int32),
    pixels=np.zeros((visuals, *samples[0].pixels.shape[2:]), np.float32),
    fuse_index=np.full((visuals, samples[0].fuse_index.shape[-1]), length, np.int32),
    slot_index=np.full((visuals, samples[0].slot_index.shape[-1]), length, np.int32),
  )
  start, first = 0, 0
  for number, sample in enumerate(samples):
    n = int(sample.segment_ids.sum())
    at = slice(start, start + n)
    for name in ('tokens', 'targets', 'loss_mask', 'positions'):
      row[name][at] = getattr(sample, name)[0, :n]
    row['segment_ids'][at] = number + 1
    present = int((sample.slot_index[0] < sample.tokens.shape[1]).all(1).sum())
    where = slice(first, first + present)
    row['pixels'][where] = sample.pixels[0, :present]
    for name in ('fuse_index', 'slot_index'):
      index = getattr(sample, name)[0, :present]
      row[name][where] = np.where(index < sample.tokens.shape[1], index + start, length)
    start, first = start + n, first + present
  row['fuse_mask'] = row['fuse_index'] < length
  return Batch(**{name: value[None] for name, value in row.items()})


def test_samples_packed_into_one_row_do_not_see_each_other(base):
  _, expected = base
  which = (2, 1, 0)  # two images, text alone, one image
  rows = tuple(lay_out(CONFIG, [SAMPLES[i]], length=LENGTH, visuals=3, fused_text=9) for i in which)
  packed = pack(rows, length=50, visuals=4)
  logits, segments = forward(CONFIG, packed)[0], packed.segment_ids[0]
  for number, i in enumerate(which):
    close(logits[segments == number + 1], expected[i], f'sample {i}', EXACT)
  assert packed.loss_mask.sum() == sum(row.loss_mask.sum() for row in rows) == 9


def beside_and_apart() -> tuple[Batch, Batch, np.ndarray]:
  """Three questions about two images: in one row, each in its own, and where in its row every token of the one lies."""
  questions = [random_sample(CONFIG, 20 + n, text=(2, 1, n), visuals=(1, 1), answer=n - 1) for n in (3, 4, 2)]
  first, pixels = questions[0].ids[:5], questions[0].pixels
  alone = [dataclasses.replace(s, ids=np.concatenate([first, s.ids[5:]])) for s in questions]
  encoded, branch = share_prefix([Encoded(s.ids, s.learn) for s in alone], 'sample')
  assert (branch == 0).sum() == 5
  shape = RowShape.for_model(CONFIG, length=30, visuals=2)
  row = build_row(encoded.ids, encoded.assistant, shape, where='sample', branch=branch)
  row['pixels'] = pixels
  beside = Batch(**{name: value[None] for name, value in row.items()})
  apart = lay_out(CONFIG, [dataclasses.replace(s, pixels=pixels) for s in alone], length=20, visuals=2)
  return beside, apart, row['branch_ids']


def test_questions_side_by_side_are_as_questions_apart():
  """Logits, and loss and gradients weighted alike: one image encoded once, and no question sees another."""
  beside, apart, branch = beside_and_apart()
  inside = beside.segment_ids[0] > 0
  together, separate = forward(CONFIG, beside)[0], forward(CONFIG, apart)
  for number in range(3):
    own = inside & np.isin(branch, (0, number + 1))
    close(together[own], separate[number][apart.segment_ids[number] > 0], f'question {number}', EXACT)
  assert beside.loss_mask.sum() == apart.loss_mask.sum() == 2 + 3 + 1
  (loss, grads), (expected_loss, expected) = (loss_and_gradients(CONFIG, batch) for batch in (beside, apart))
  close(loss, expected_loss, 'loss', EXACT)
  for path, grad in grads.items():
    close(grad, expected[path], path, EXACT)


def test_questions_without_their_branches_see_each_other():
  """Else the test above would hold of a model that ignores them."""
  beside, _, branch = beside_and_apart()
  seen = forward(CONFIG, dataclasses.replace(beside, branch_ids=None))
  changed = np.abs(seen - forward(CONFIG, beside))[0].max(-1) > DIFFERENT
  assert changed[branch > 1].all() and not changed[: np.argmax(branch > 1)].any()


# -------------------------------------------------------------------------------------------- text and its fusion


def text_row(batch: Batch) -> Batch:
  """The rows without any visual axis, as a batch of text alone has them."""
  return dataclasses.replace(
    batch,
    pixels=batch.pixels[:, :0],
    fuse_index=batch.fuse_index[:, :0],
    fuse_mask=batch.fuse_mask[:, :0],
    slot_index=batch.slot_index[:, :0],
  )


def test_a_row_of_text_is_the_plain_decoder(base):
  batch, expected = base

  def plain(model, batch):
    x = model.decoder.embed(batch.tokens)
    return model.decoder.logits(model.decoder(x, batch.positions, batch.segment_ids))

  close(per_sample(run(CONFIG, plain, batch), batch)[1], expected[1], 'text row', EXACT)
  without = text_row(batch)
  close(per_sample(forward(CONFIG, without), without)[1], expected[1], 'no visual axis', EXACT)


def test_text_fused_with_a_zero_image_differs(base):
  """`text_only=zero_image` lists the text under a visual without slots."""
  batch, expected = base
  index = batch.fuse_index.copy()
  index[1, 0, :7] = np.arange(7)
  pixels = batch.pixels.copy()
  pixels[1, 0] = 0.0
  fused = dataclasses.replace(batch, fuse_index=index, fuse_mask=index < LENGTH, pixels=pixels)
  logits = per_sample(forward(CONFIG, fused), fused)
  assert difference(logits[1], expected[1]) > DIFFERENT
  for i in (0, 2, 3):
    close(logits[i], expected[i], f'sample {i}', EXACT)


def test_a_token_of_several_visuals_is_the_mean_of_its_fused_states(base):
  """Three frames: each one fused with the text by itself; the compressed tokens of the frames in order."""
  batch, _ = base
  listed = batch.fuse_index[3, 0][batch.fuse_mask[3, 0]]

  def by_hand(model, batch, pixels):
    text = model.decoder.embed(batch.tokens[3])
    every = model.fuse(model.encode_views(pixels), jnp.stack([text[listed]] * 3), np.ones((3, len(listed)), bool))
    return text, *every, model.embed(batch)[3]

  text, compressed, fused, x = run(CONFIG, by_hand, batch, SAMPLES[3].pixels)
  assert difference(fused[0], fused[1]) > DIFFERENT
  close(x[listed], fused.mean(0), 'fused text', EXACT)
  close(x[batch.slot_index[3].reshape(-1)], np.concatenate(compressed), 'compressed', EXACT)
  answer = np.flatnonzero(batch.segment_ids[3])[-3:]
  np.testing.assert_array_equal(x[answer], text[answer])


@pytest.mark.parametrize('chunk', [2, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 3, 5))])
def test_visuals_in_chunks_are_as_visuals_at_once(trained_on_visuals, chunk):
  batch, expected_loss, expected = trained_on_visuals
  loss, grads = loss_and_gradients(dataclasses.replace(CONFIG, visual_chunk=chunk), batch)
  close(loss, expected_loss, 'loss', EXACT)
  for path, grad in grads.items():
    close(grad, expected[path], path, EXACT)


def test_gradients_may_stop_at_the_visuals_of_a_video(trained_on_visuals):
  """As released for videos of equal length: the decoder alone trains. A row of one image is not concerned."""
  batch, expected_loss, expected = trained_on_visuals
  config = dataclasses.replace(CONFIG, video_stop_grad=True)
  loss, grads = loss_and_gradients(config, batch)
  close(loss, expected_loss, 'loss', EXACT)
  visual = ('vision/', 'projector/', 'compressor/', 'prefusion/')
  assert {path for path, grad in grads.items() if path.startswith(visual) and np.any(grad)} == set()
  for path, grad in grads.items():
    if path.startswith('decoder/'):
      close(grad, expected[path], path, EXACT)
  image = lay_out(CONFIG, SAMPLES[:1], length=14, visuals=1, fused_text=8)
  (_, stopped), (_, free) = (loss_and_gradients(c, image) for c in (config, CONFIG))
  assert all(np.array_equal(stopped[path], free[path]) for path in free)


@pytest.fixture(scope='module')
def trained_on_visuals() -> tuple[Batch, float, dict[str, jax.Array]]:
  """Two images, a video of three frames, and text, with loss and gradients."""
  batch = lay_out(CONFIG, [SAMPLES[2], SAMPLES[3], SAMPLES[1]], length=LENGTH, visuals=4, fused_text=9)
  return batch, *loss_and_gradients(CONFIG, batch)


def test_the_mean_is_taken_in_float32():
  """256 + 1 is 256 in bfloat16."""
  row = lay_out(CONFIG, SAMPLES[3:], length=LENGTH, visuals=3, fused_text=1 + 5)
  text = jnp.full((1, LENGTH, 2), 7.0, jnp.bfloat16)
  frames = jnp.asarray([256.0, 1.0, 1.0], jnp.bfloat16)
  fused = jnp.broadcast_to(frames[None, :, None, None], (1, 3, 6, 2))
  compressed = jnp.arange(12.0, dtype=jnp.bfloat16).reshape(1, 3, 4, 1) * jnp.ones((1, 1, 1, 2), jnp.bfloat16)
  x = quick_jit(lambda *x: splice(*x[:2], sum_at(x[2], row.fuse_index, LENGTH), row))(text, compressed, fused)
  assert x.dtype == jnp.bfloat16
  expected = np.full(LENGTH, 7.0)
  expected[[0, *range(13, 18)]] = 86.0  # text before and after the twelve slots
  expected[1:13] = np.arange(12)
  np.testing.assert_array_equal(np.asarray(x[0, :, 0], np.float64), expected)


def test_crops_are_put_together_as_one_raster():
  """Every feature holds its place in the whole image: 2 × 2 crops of 3 × 3 patches."""
  y, x = np.meshgrid(np.arange(6), np.arange(6), indexing='ij')
  whole = np.stack([y, x], axis=-1)  # [6 6 2]
  crops = np.stack([whole[r : r + 3, c : c + 3].reshape(9, 2) for r in (0, 3) for c in (0, 3)])
  np.testing.assert_array_equal(to_raster(jnp.asarray(crops)[None])[0], whole.reshape(36, 2))


def test_several_views_compress_the_crops_and_fuse_crops_and_whole():
  def both(model, features):
    crops, whole = to_raster(features[:, :4]), features[:, 4]
    patches = jnp.concatenate([model.projector(crops), model.projector(whole)], axis=1)
    return model.compress(features), (patches, model.projector(model.compressor(crops)))

  ours, by_hand = run(CONFIG, both, random_features(views=5))
  for actual, expected, what in zip(ours, by_hand, ('patches', 'compressed'), strict=True):
    close(actual, expected, what, EXACT)


# -------------------------------------------------------------------------------------------------- the compressor


@pytest.mark.parametrize('grid', [1, 2])
def test_plain_attention_is_equation_2(grid):
  config = small_config(compressor=dict(grid=grid, attention='plain', key_position='native_grid'))
  params = random_params(config)
  assert {path for path in params if path.startswith('compressor/')} == {'compressor/query', 'compressor/pos_embed'}

  q = params['compressor/query'] + params['compressor/pos_embed']
  scores = q @ (KEYS + sincos_table(4, 32)).transpose(0, 2, 1)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = weights @ KEYS

  out, attention = run(config, lambda model, x: model.compressor(x, return_attention=True), KEYS)
  close(out, expected, 'compressed', EXACT)
  close(attention, weights, 'attention', EXACT)
  assert weights.max() > 0.2  # not uniform: the scores matter


@pytest.mark.parametrize('attention', ['mha', 'plain'])
def test_the_space_of_compression(attention):
  """`vision` compresses, then projects; `llm` projects, then compresses, in the decoder's width."""

  def each(model, features):
    whole = features[:, -1]
    before = model.config.compressor.space == 'vision'
    order = (model.compressor, model.projector) if before else (model.projector, model.compressor)
    return model.compress(features)[1], order[1](order[0](whole))

  widths = {}
  for space in ('vision', 'llm'):
    config = small_config(compressor=dict(space=space, attention=attention))
    ours, expected = run(config, each, random_features())
    close(ours, expected, space, EXACT)
    widths[space] = parameter_shapes(config)['compressor/query']
  assert widths == dict(vision=(1, 32), llm=(1, 24))


def test_the_positions_of_the_keys():
  """Two by two queries on four by four keys. The released model resizes the queries' table for the keys."""
  outs, tables = {}, {}
  for kind in ('query_table', 'native_grid', 'none'):
    config = small_config(compressor=dict(grid=2, key_position=kind))
    tables[kind], outs[kind] = run(config, lambda m, x: (m.compressor.key_positions(16), m.compressor(x)), KEYS)
  own = random_params(config)['compressor/pos_embed']
  close(tables['query_table'], resize_table(own, 2, 4), 'resized', EXACT)
  np.testing.assert_array_equal(tables['native_grid'], sincos_table(4, 32))
  np.testing.assert_array_equal(tables['none'], np.zeros((16, 32)))
  for a, b in (('query_table', 'native_grid'), ('query_table', 'none'), ('native_grid', 'none')):
    assert difference(outs[a], outs[b]) > DIFFERENT, (a, b)


def test_at_one_token_the_queries_table_tells_keys_nothing():
  """Resized from one place it is the same everywhere, which softmax does not see; the grid of the keys is not."""
  outs = {}
  for kind in ('query_table', 'native_grid', 'none'):
    outs[kind] = run(small_config(compressor=dict(key_position=kind)), lambda m, x: m.compressor(x), KEYS)
  close(outs['query_table'], outs['none'], 'C = 1', EXACT)
  assert difference(outs['native_grid'], outs['none']) > DIFFERENT


def test_keys_that_form_no_square():
  model = with_params(CONFIG, random_params(CONFIG))
  with pytest.raises(ValueError, match=r'^compressor keys: expected a square number; found 15$'):
    model.compressor(KEYS[:, :15])


@pytest.mark.parametrize('layers', [0, 2])
def test_without_a_compressor_every_patch_goes_to_the_decoder(layers):
  """LLaVA-v1.5, and stage 1: the projected patches in their slots; with pre-fusion, its outputs."""
  config = small_config(compressor=dict(kind='none'), prefusion=dict(num_layers=layers))
  assert config.tokens_per_visual == 16
  assert not any(path.startswith('compressor/') for path in parameter_shapes(config))
  batch = lay_out(config, [random_sample(config, 0)], length=26, visuals=1)
  slots, fused = batch.slot_index[0, 0], batch.fuse_index[0, 0][batch.fuse_mask[0, 0]]

  def both(model, batch):
    patches = model.projector(model.encode_views(batch.pixels[:, 0])[:, 0])
    joined = jnp.concatenate([patches, model.decoder.embed(batch.tokens)[:, fused]], axis=1)
    return model.embed(batch)[0], (model.prefusion(joined, jnp.ones(joined.shape[:2], bool)) if layers else joined)[0]

  x, expected = run(config, both, batch)
  close(x[slots], expected[:16], 'patches', EXACT)
  close(x[fused], expected[16:], 'text', EXACT)


# ------------------------------------------------------------------------------------------------------ pre-fusion

TEXT = np.random.default_rng(1).normal(size=(2, 5, 24)).astype(np.float32)
TEXT_MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], bool)


def test_without_prefusion_layers_text_stays_raw():
  config = small_config(prefusion=dict(num_layers=0))
  assert not any(path.startswith('prefusion/') for path in parameter_shapes(config))

  def both(model, features):
    return model.fuse(features, jnp.asarray(TEXT), TEXT_MASK), model.projector(model.compressor(features[:, 0]))

  (compressed, text), expected = run(config, both, random_features())
  close(compressed, expected, 'compressed', EXACT)
  np.testing.assert_array_equal(text, TEXT)


def test_whether_compressed_tokens_are_fused():
  """True: [patches; compressed; text], and the decoder gets the output at the compressed; False: Eq. 3 as written."""

  def both(model, features):
    fused = model.config.prefusion.fuse_compressed
    patches, compressed = model.compress(features)
    joined = jnp.concatenate([patches, compressed, TEXT] if fused else [patches, TEXT], axis=1)
    valid = jnp.concatenate([jnp.ones((2, joined.shape[1] - 5), bool), TEXT_MASK], axis=1)
    out = model.prefusion(joined, valid)
    return model.fuse(features, jnp.asarray(TEXT), TEXT_MASK), (out[:, 16:20] if fused else compressed, out[:, -5:])

  seen = {}
  for fused in (True, False):
    config = small_config(compressor=dict(grid=2), prefusion=dict(fuse_compressed=fused))
    (compressed, text), expected = run(config, both, random_features())
    close(compressed, expected[0], 'compressed', EXACT)
    close(text[TEXT_MASK], expected[1][TEXT_MASK], 'text', EXACT)
    seen[fused] = compressed, text[TEXT_MASK]
  assert all(difference(a, b) > DIFFERENT for a, b in zip(seen[True], seen[False], strict=True))


def test_vision_does_not_see_the_text():
  (a, text_a), (b, text_b) = (run(CONFIG, LlavaMini.fuse, random_features(), x, TEXT_MASK) for x in (TEXT, TEXT + 1))
  close(a, b, 'compressed', EXACT)
  assert difference(text_a, text_b) > DIFFERENT


@pytest.mark.parametrize('init', ['random', 'decoder'])
def test_initial_prefusion_layers(init):
  vision = dict(num_hidden_layers=1, select_layer=0)
  config = small_config(prefusion=dict(init=init, num_layers=2), decoder=dict(num_hidden_layers=3), vision=vision)
  params = flatten(nnx.to_pure_dict(quick_jit(lambda key: nnx.split(build(config, key))[1])(jax.random.key(0))))
  paths = [path for path in params if path.startswith('prefusion/layers/')]
  assert len(paths) == 7 + 2
  for path in paths:
    layers, first = params[path], params[path.replace('prefusion', 'decoder')][:2]
    assert np.array_equal(layers, first) == (init == 'decoder' or 'layernorm' in path), path
    assert 'layernorm' in path or difference(layers[0], layers[1]) > 0


# ------------------------------------------------------------------------------------------------ the whole config

OTHER_SCAN = ScanConfig(remat='full', unroll=True)


def loss_and_gradients(config: LlavaMiniConfig, batch: Batch):
  def loss(params):
    logits = merge(structure(config), unflatten(params))(batch)
    return next_token_loss(logits, batch.targets, batch.loss_mask)[0]

  return quick_jit(jax.value_and_grad(loss))(random_params(config))


@pytest.fixture(scope='module')
def trained() -> tuple[Batch, float, dict[str, jax.Array]]:
  """A batch with an image and one of text, with the loss and gradients of the small model."""
  batch = lay_out(CONFIG, [SAMPLES[0], SAMPLES[1]], length=14, visuals=1, fused_text=8)
  return batch, *loss_and_gradients(CONFIG, batch)


@pytest.mark.parametrize('detach', [True, False])
def test_whether_text_embeddings_train(trained, detach):
  """Detached, they get no gradient, neither where they are fused nor where they stand raw."""
  batch, _, grads = trained
  config = dataclasses.replace(CONFIG, detach_text=detach)
  params = random_params(config)

  def size_of_input(table):
    model = merge(structure(config), unflatten(params | {'decoder/embed_tokens': table}))
    return jnp.square(model.embed(batch)[batch.segment_ids > 0]).sum()

  grad = quick_jit(jax.grad(size_of_input))(params['decoder/embed_tokens'])
  text = {int(t) for sample in SAMPLES[:2] for t in sample.ids if t >= 0}
  assert set(np.flatnonzero(np.abs(grad).max(1))) == (set() if detach else text)
  if detach:  # what else the loss of the whole model trains
    assert not np.asarray(grads['decoder/embed_tokens']).any()
    for path in ('projector/linear_1/kernel', 'compressor/query', 'prefusion/layers/mlp/up_proj', 'decoder/lm_head'):
      assert np.abs(grads[path]).max() > 1e-4, path


def test_kept_layers_do_not_run():
  kept = small_config(vision=dict(keep_unused_layers=True))
  params = random_params(kept)
  used = {path: leaf for path, leaf in params.items() if 'post_layernorm' not in path}
  used |= {path: leaf[:2] for path, leaf in used.items() if path.startswith('vision/layers/')}
  config = small_config()
  assert used.keys() == parameter_shapes(config).keys() < params.keys()
  pixels = SAMPLES[0].pixels
  ours = run(kept, LlavaMini.encode_views, pixels, params=params)
  np.testing.assert_array_equal(ours, run(config, LlavaMini.encode_views, pixels, params=used))


def test_how_layers_are_scanned_changes_no_value_and_no_gradient(trained):
  batch, loss, grads = trained
  assert CONFIG.scan == ScanConfig(remat='none', unroll=False)
  other_loss, other_grads = loss_and_gradients(small_config(compressor=dict(grid=2), scan=OTHER_SCAN), batch)
  close(other_loss, loss, 'loss', EXACT)
  assert grads.keys() == other_grads.keys()
  for path, grad in grads.items():
    close(other_grads[path], grad, path, EXACT)


def test_scan_options_are_in_the_program():
  """Else the test above would compare a program with itself. Every loop here turns twice."""
  base = small_config(prefusion=dict(num_layers=3))
  batch = lay_out(CONFIG, SAMPLES[:1], length=14, visuals=1)

  def program(**scan):
    config = dataclasses.replace(base, scan=dataclasses.replace(base.scan, **scan))
    return str(jax.make_jaxpr(lambda params: merge(structure(config), params)(batch))(unflatten(random_params(config))))

  assert 'remat' not in program() and 'remat' in program(remat='full')
  assert 'unroll=1' in program() and 'unroll=1' not in program(unroll=True)


def test_uint8_pixels_are_normalised_inside():
  raw = np.random.default_rng(0).integers(0, 256, SAMPLES[0].pixels.shape, dtype=np.uint8)
  normalised = ((raw / 255 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)
  ours, floats, scaled = (
    run(CONFIG, LlavaMini.encode_views, pixels) for pixels in (raw, normalised, raw / np.float32(255))
  )
  close(ours, floats, 'features', EXACT)
  assert difference(floats, scaled) > DIFFERENT


def test_bfloat16_computes_in_it_and_ends_in_float32(base):
  batch, expected = base
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  logits = forward(config, batch)
  assert logits.dtype == np.float32
  off = [difference(ours, theirs) for ours, theirs in zip(per_sample(logits, batch), expected, strict=True)]
  assert min(off) > 1e-4 and max(off) < 0.3
  model = with_params(config, random_params(config))
  stages = jax.eval_shape(lambda b: (model.encode_views(b.pixels[:, 0]), model.embed(b), model.hidden(b)), batch)
  assert [stage.dtype for stage in stages] == [jnp.bfloat16] * 3
  assert {leaf.dtype for leaf in jax.tree.leaves(abstract_model(config)[1])} == {jnp.dtype('float32')}

"""Every kind of compressor against a few lines of numpy written from its description, and what all have in common."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
  DECODER,
  VISION,
  lay_out,
  quick_jit,
  random_params,
  random_sample,
  small_config,
  structure,
)
from torch_parity import close

from llava_mini_jax.config import COMPRESSORS, CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.infer.generate import generate
from llava_mini_jax.models.attention import BEHIND, CARRIES, AttentionMask
from llava_mini_jax.models.compressors import KINDS
from llava_mini_jax.models.compressors.mqt import draw_kept
from llava_mini_jax.models.compressors.prumerge import outliers
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.positions import resize_table, sincos_table
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.tree import merge
from llava_mini_jax.types import Batch

EXACT = 1e-5
DIFFERENT = 1e-2
GRID, PATCHES, W, D = VISION.grid, VISION.num_patches, VISION.hidden_size, DECODER.hidden_size
CONFIGS = {  # of each kind one for a grid of four by four patches
  'query': dict(grid=2),
  'average': dict(grid=2),
  'mqt': dict(grid=3, keep=5),
  'prumerge': dict(keep=4, neighbours=5),
  'prumerge_plus': dict(keep=3, neighbours=5),
  'tokenpacker': dict(grid=2, layers=(0, 2)),
  'llama_vid': dict(grid=1, text_queries=3),
  'voco': dict(keep=2),
}
SLOTS = dict(query=4, average=4, mqt=5, prumerge=5, prumerge_plus=7, tokenpacker=4, llama_vid=2, voco=PATCHES + 2)


def config_of(kind: str, fusion: int = 1, **changes) -> LlavaMiniConfig:
  compressor = dict(kind=kind, **CONFIGS[kind]) | changes
  return small_config(compressor=compressor, prefusion=dict(num_layers=fusion))


def run(config: LlavaMiniConfig, method, *args, params=None):
  """What a function of (model, *arguments) gives for random parameters."""
  call = quick_jit(lambda params, *args: method(merge(structure(config), params), *args))
  return jax.tree.map(np.asarray, call(random_params(config) if params is None else params, *args))


def of_compressor(config: LlavaMiniConfig) -> dict[str, np.ndarray]:
  start = 'compressor/'
  return {path.removeprefix(start): x for path, x in random_params(config).items() if path.startswith(start)}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def norm(x: np.ndarray, p: dict, name: str, eps: float = 1e-6) -> np.ndarray:
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f'{name}/weight'] + p[f'{name}/bias']


def gelu(x: np.ndarray) -> np.ndarray:
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mha(q: np.ndarray, k: np.ndarray, v: np.ndarray, p: dict) -> np.ndarray:
  """torch's MultiheadAttention of q [C W] on k, v [P W]."""
  q, k, v = (
    np.einsum('xw,wnh->nxh', y, p[f'{n}_proj']) + p[f'{n}_proj_bias'][:, None] for n, y in dict(q=q, k=k, v=v).items()
  )
  y = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])) @ v
  return np.einsum('nch,nhw->cw', y, p['out_proj']) + p['out_proj_bias']


X = noise(2, PATCHES, W)


def test_average():
  out = run(config_of('average'), lambda model, x: model.compressor(x), X)
  square = X.reshape(2, 4, 4, W)
  corners = [square[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)]
  close(out, np.stack(corners, 1), 'average', EXACT)


def test_mqt():
  config = config_of('mqt')
  p = of_compressor(config)
  table = sincos_table(3, W)
  q = norm(p['query'][:5] + table[:5], p, 'ln_q')
  k = norm(np.asarray(resize_table(table, 3, GRID)), p, 'ln_k')
  expected = np.stack([mha(q, k, norm(x, p, 'ln_v'), p) @ p['projection'] for x in X])
  out, weights = run(config, lambda model, x: model.compressor(x, return_attention=True), X)
  close(out, expected, 'mqt', EXACT)
  close(weights.sum(-1), np.ones((2, 5)), 'weights', EXACT)
  np.testing.assert_array_equal(weights[0], weights[1])  # they do not depend on the image
  all_nine = run(config_of('mqt', keep=0), lambda model, x: model.compressor(x), X)
  close(all_nine[:, :5], out, 'the first five of nine', EXACT)


def bilinear(x: np.ndarray, grid: int) -> np.ndarray:
  """torch.nn.functional.interpolate(mode='bilinear', align_corners=False), in numpy: [P W] -> [grid² W]."""
  side = math.isqrt(len(x))
  at = (np.arange(grid) + 0.5) * side / grid - 0.5
  low = np.floor(at).astype(int)
  w = np.zeros((grid, side))
  for row, (a, i) in enumerate(zip(at, low, strict=True)):
    w[row, max(i, 0)] += 1 - (a - i)
    w[row, min(i + 1, side - 1)] += a - i
  return np.einsum('yr,xc,rcw->yxw', w, w, x.reshape(side, side, -1)).reshape(grid**2, -1)


@pytest.mark.parametrize('side', [4, 6])  # squares of 2 × 2 and of 3 × 3 patches
def test_tokenpacker(side):
  config = config_of('tokenpacker')
  p = of_compressor(config)
  x, layers = noise(side**2, W), noise(side**2, 2 * W, seed=1)
  q = norm(bilinear(x, 2) @ p['query'], p, 'ln_q')

  def finer(near, name):
    hidden = gelu(near @ p[f'{name}_1/kernel'] + p[f'{name}_1/bias'])
    return hidden @ p[f'{name}_2/kernel'] + p[f'{name}_2/bias']

  expected, half = [], side // 2
  for token in range(4):
    row, column = divmod(token, 2)
    places = np.arange(side**2).reshape(side, side)
    near = layers[places[row * half : (row + 1) * half, column * half : (column + 1) * half].reshape(-1)]
    k, v = norm(finer(near, 'key'), p, 'ln_k'), norm(finer(near, 'value'), p, 'ln_v')
    expected.append(mha(q[token : token + 1], k, v, p)[0])
  out = run(config, lambda model, x, layers: model.compressor(x, layers=layers), x[None], layers[None])
  close(out[0], np.stack(expected), 'tokenpacker', EXACT)


def prumerge_by_hand(x, k, a, kept, neighbours, dropped):
  k = k / np.linalg.norm(k, axis=-1, keepdims=True)
  out = []
  for i in kept:
    near = [j for j in np.argsort(-(k @ k[i]), kind='stable') if j != i][:neighbours]
    out.append(x[i] + sum(a[j] * x[j] for j in near))
  return np.stack([*out, sum(a[j] * x[j] for j in dropped)])


@pytest.mark.parametrize('kind', ['prumerge', 'prumerge_plus'])
def test_prumerge(kind):
  config = config_of(kind)
  keys, a = noise(2, PATCHES, W, seed=1), softmax(2 * noise(2, PATCHES, seed=2))
  joined = np.concatenate([keys, a[..., None]], -1)
  out = run(config, lambda model, x, y: model.compressor(x, class_attention=y), X, joined)
  for b in range(2):
    kept = np.argsort(-a[b], kind='stable')[: config.compressor.keep]
    kept = [*kept, 2, 7, 12] if kind == 'prumerge_plus' else kept  # 16 // 3 = 5 apart, from 5 // 2 on
    dropped = sorted(set(range(PATCHES)) - set(kept))
    close(out[b], prumerge_by_hand(X[b], keys[b], a[b], kept, 5, dropped), kind, EXACT)


def test_prumerge_plus_names_the_patches_of_the_original():
  """At 576 patches and an eighth of them: arange(4, 575, 8)."""
  compressor = CompressorConfig(kind='prumerge_plus', keep=72)
  model = dataclasses.replace(LlavaMiniConfig.preset('vicuna_7b'), compressor=compressor)
  a = softmax(noise(1, 576))
  found = np.asarray(KINDS['prumerge_plus'](model, rngs=None).kept(jnp.asarray(a)))[0]
  np.testing.assert_array_equal(found, [*np.argsort(-a[0], kind='stable')[:72], *range(4, 575, 8)])
  assert model.tokens_per_visual == 145


def test_elastic_prumerge_keeps_the_outliers_of_each_image():
  config = config_of('prumerge', elastic=True)
  keys, a = noise(3, PATCHES, W, seed=1), softmax(0.01 * noise(3, PATCHES, seed=2))
  a[0, 3], a[1, [2, 5, 9]], a[2, :8] = 0.5, (0.3, 0.2, 0.4), 0.9  # one, three and no outlier
  q1, q3 = np.quantile(a, [0.25, 0.75], axis=1)
  by_hand = np.clip((a > (q3 + 1.5 * (q3 - q1))[:, None]).sum(1), 1, 4)
  np.testing.assert_array_equal(outliers(jnp.asarray(a), 4), by_hand)
  assert list(by_hand) == [1, 3, 1]
  joined, x = np.concatenate([keys, a[..., None]], -1), noise(3, PATCHES, W)
  out, count = run(config, lambda model, x, y: model.compressor(x, class_attention=y), x, joined)
  np.testing.assert_array_equal(count, by_hand + 1)
  for b, n in enumerate(by_hand):
    kept = np.argsort(-a[b], kind='stable')[:n]
    expected = prumerge_by_hand(x[b], keys[b], a[b], kept, 5, sorted(set(range(PATCHES)) - set(kept)))
    close(out[b, : n + 1], expected, f'image {b}', EXACT)


def test_the_class_token_attends_with_the_layer_after_the_selected_one():
  config = config_of('prumerge')
  pixels = noise(2, 32, 32, 3)
  features = run(config, lambda model, x: model.vision(x), pixels)
  plain, p = small_config(), random_params(config)
  assert p['vision/layers/fc1/kernel'].shape[0] == 3 and plain.vision.run_layers == 2
  first = {
    path: x[:2] if path.startswith('vision/layers') else x for path, x in p.items() if path.startswith('vision/')
  }
  params = random_params(plain) | first
  close(features[..., :W], run(plain, lambda model, x: model.vision(x), pixels, params=params), 'features', EXACT)

  def class_too(model, x):
    x, tower = model.vision.embed(x, jnp.float32), model.vision
    for i in range(2):
      x = jax.tree.map(lambda leaf, i=i: leaf[i], tower.layers)(x)
    return x

  x = run(config, class_too, pixels)
  last = {path.removeprefix('vision/layers/'): leaf[2] for path, leaf in p.items() if path.startswith('vision/layers/')}
  y = norm(x, last, 'layer_norm1', 1e-5)
  q, k = (
    (np.einsum('bpw,wnh->bpnh', y, last[f'self_attn/{n}_proj']) + last[f'self_attn/{n}_proj_bias']).reshape(y.shape)
    for n in 'qk'
  )
  a = softmax(np.einsum('bw,bpw->bp', q[:, 0], k) / math.sqrt(W))[:, 1:]
  close(features[..., W:-1], k[:, 1:], 'keys', EXACT)
  close(features[..., -1], a, 'attention', EXACT)


def test_the_tower_gives_the_layers_that_a_compressor_reads():
  config = config_of('tokenpacker')
  pixels = noise(2, 32, 32, 3)

  def by_hand(model, x):
    states = [model.vision.embed(x, jnp.float32)]
    for i in range(2):
      states.append(jax.tree.map(lambda leaf, i=i: leaf[i], model.vision.layers)(states[-1]))
    return model.vision(x), jnp.concatenate([states[i][:, 1:] for i in (2, 0, 2)], -1)

  ours, expected = run(config, by_hand, pixels)
  close(ours, expected, 'features', EXACT)


@pytest.mark.parametrize('space', ['vision', 'llm'])
def test_llama_vid(space):
  config = config_of('llama_vid', space=space)
  p = of_compressor(config)
  width = W if space == 'vision' else D
  x, words, there = noise(2, PATCHES, width), noise(2, 6, D, seed=1), np.array([[1, 1, 0, 1, 0, 1], [0] * 6], bool)
  out = run(config, lambda m, x, t, u: m.compressor(x, text=(t, u), project=lambda y: y[..., :D] + 1), x, words, there)

  def linear(y, name):
    return y @ p[f'{name}/kernel'] + p[f'{name}/bias']

  for b in range(2):
    read = words[b][there[b]]
    weights = softmax(p['query'] @ (read @ p['text_key']).T / math.sqrt(width)) if len(read) else np.zeros((3, 0))
    q = p['query'] + linear(weights @ (read @ p['text_value']), 'text_out')
    seen = softmax(q @ linear(x[b], 'key').T / math.sqrt(width)) @ x[b]
    content = x[b].mean(0)
    content = content[:D] + 1 if space == 'vision' else content
    close(out[b], np.stack([linear(seen.mean(0), 'value'), content]), f'visual {b}', EXACT)
  assert np.isfinite(out).all()


# ------------------------------------------------------------------------------------------------- in the whole model

LENGTH = 64


@functools.cache
def batch_of(config: LlavaMiniConfig, visuals=((1,), (), (1, 1), (2,))) -> Batch:
  samples = [random_sample(config, i, text=(2,) + (3,) * len(v), visuals=v) for i, v in enumerate(visuals)]
  return lay_out(config, samples, length=LENGTH, visuals=2, fused_text=LENGTH)


def logits_at(config: LlavaMiniConfig, batch: Batch, **options) -> list[np.ndarray]:
  logits = run(config, LlavaMini.__call__, batch, **options)
  return [row[segments > 0] for row, segments in zip(logits, np.asarray(batch.segment_ids), strict=True)]


def test_every_kind_is_in_both_tables():
  assert {*KINDS, 'none'} == set(COMPRESSORS) and set(CONFIGS) == set(KINDS) == set(SLOTS)


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_of_an_image(kind):
  assert config_of(kind).tokens_per_visual == SLOTS[kind]


def test_fewer_queries_of_a_row_of_more_are_as_a_row_of_fewer():
  """mqt in training: logits and gradients of static shapes equal those of a row laid out for m tokens."""
  few, many = config_of('mqt', keep=2), config_of('mqt', keep=6)
  params = random_params(few)
  batch, wide = batch_of(few), batch_of(many)
  wide = dataclasses.replace(wide, kept=np.full(4, 2, np.int32))

  def gradient(config, batch):
    def loss(params):
      return next_token_loss(merge(structure(config), params)(batch), batch.targets, batch.loss_mask)[0]

    return quick_jit(jax.value_and_grad(loss))(params)

  (a, by_few), (b, by_many) = gradient(few, batch), gradient(many, wide)
  close(np.asarray(a), np.asarray(b), 'loss', EXACT)
  for path in by_few:
    close(np.asarray(by_few[path]), np.asarray(by_many[path]), path, EXACT)
  other = dataclasses.replace(wide, kept=np.full(4, 4, np.int32))
  assert abs(float(gradient(many, other)[0]) - float(b)) > DIFFERENT


def test_the_number_of_tokens_is_drawn_from_the_step():
  config = config_of('mqt', keep=8, elastic=True)
  batch = batch_of(config)
  drawn = [np.asarray(draw_kept(config.compressor, batch, step).kept) for step in range(40)]
  assert all((rows == rows[0]).all() for rows in drawn) and {int(rows[0]) for rows in drawn} == {2, 4, 6, 8}
  np.testing.assert_array_equal(drawn[7], np.asarray(draw_kept(config.compressor, batch, jnp.int32(7)).kept))
  assert draw_kept(config_of('mqt', keep=8).compressor, batch, 0) is batch


@pytest.mark.parametrize(('kind', 'fusion'), [*((kind, 1) for kind in KINDS), ('voco', 0)])
def test_generation_with_a_cache(kind, fusion):
  check_generation(config_of(kind, fusion))


@pytest.mark.parametrize(
  'changes',
  [
    dict(kind='query', within=1, space='llm'),
    dict(kind='average', grid=1, within=1, space='llm', fusion=0),
    dict(kind='prumerge', elastic=True),
  ],
  ids=['within', 'within_average', 'elastic'],
)
def test_generation_where_the_decoder_forgets(changes):
  check_generation(config_of(**changes))


def check_generation(config: LlavaMiniConfig, steps: int = 3) -> None:
  """What is chosen from equals the logits of a whole pass over the longer row, and depends on the image."""
  samples = [random_sample(config, i, text=(2, 3), answer=0, visuals=(1,)) for i in range(2)]
  batch = lay_out(config, samples, length=32, visuals=2, fused_text=8)
  answer, logits = run(config, lambda m, b: generate(m, b, max_new_tokens=steps, return_logits=True), batch)
  length = int((batch.segment_ids[0] > 0).sum())
  assert (batch.segment_ids.sum(1) == length).all()
  tokens, segments = batch.tokens.copy(), batch.segment_ids.copy()
  tokens[:, length : length + steps], segments[:, length : length + steps] = answer, 1
  positions = np.where(segments > 0, np.arange(32), 0).astype(np.int32)
  whole = dataclasses.replace(batch, tokens=tokens, segment_ids=segments, positions=positions)
  expected = run(config, LlavaMini.__call__, whole)[:, length - 1 : length + steps - 1]
  close(logits, expected, 'logits', 1e-4)
  other = dataclasses.replace(whole, pixels=whole.pixels[::-1])
  seen = np.abs(run(config, LlavaMini.__call__, other)[:, length - 1] - expected[:, 0]).max()
  assert seen > 1e-3


def test_no_vision_token_and_the_fused_text_alone_knows_the_image():
  for kind in ('query', 'average'):
    config = config_of(kind, grid=0)
    assert config.tokens_per_visual == 0
    assert not any(path.startswith('compressor/') for path in random_params(config))
  check_generation(config)
  with pytest.raises(ConfigError, match='^prefusion.num_layers: expected 1 or more without vision tokens; found 0$'):
    config_of('query', fusion=0, grid=0)


def test_voco_hides_what_is_behind_its_tokens():
  """Row 2 of the batch has two images: later text sees the learnt tokens of both and itself, in every layer."""
  config = config_of('voco', fusion=0)
  batch = batch_of(config)
  mask = np.asarray(run(config, lambda m, b: m.roles(b), batch))
  slots = batch.slot_index[2].reshape(2, -1)
  carries = {int(i) for part in slots for i in part[-2:]}
  last = max(carries)
  expected = [2 if i in carries else 1 if i < last else 0 for i in range(LENGTH)]
  np.testing.assert_array_equal(mask[2], expected)
  assert not mask[1].any()


@dataclasses.dataclass(frozen=True)
class Cut(AttentionMask):
  """VoCo tokens see nothing that only they and what is behind them may see: the one way from there on is gone."""

  def allowed(self) -> jax.Array:
    way = (self.roles[:, :, None] == CARRIES) & (self.roles[:, None, :] == BEHIND)
    return super().allowed() & ~way


@dataclasses.dataclass(frozen=True)
class Leaking(Cut):
  """As `Cut`, but for what follows, which sees everything: a mask that hides nothing."""

  def allowed(self) -> jax.Array:
    follows = (self.roles[:, :, None] == 0) & AttentionMask(self.query_segments, self.key_segments).allowed()
    return super().allowed() | follows


def test_patches_reach_what_follows_through_voco_tokens_alone():
  """Other patches, and another text in front, change what follows; without the way through the tokens, nothing."""
  config = config_of('voco', fusion=0)
  batch = batch_of(config, ((1,), (1, 1), (2,)))
  tokens = batch.tokens.copy()
  tokens[:, 0] = (tokens[:, 0] + 1) % 64  # in front of the image
  other = dataclasses.replace(batch, pixels=batch.pixels[::-1], tokens=tokens)

  def hidden(model, batch):
    x, _ = model.rows(batch)
    roles, found = model.roles(batch), {}
    for name, kind in (('whole', AttentionMask), ('cut', Cut), ('leaking', Leaking)):
      mask = kind(batch.segment_ids, batch.segment_ids, roles=roles)
      found[name] = model.decoder.norm(model.decoder.run(x, batch.positions, mask, keep=lambda *_: None)[0])
    return found, model.hidden(batch), roles

  (a, of_model, roles), (b, *_) = (run(config, hidden, some) for some in (batch, other))
  follows = (roles == 0) & (batch.segment_ids > 0)
  assert follows.any(1).all()
  np.testing.assert_array_equal(a['whole'], of_model)
  np.testing.assert_array_equal(a['cut'][follows], b['cut'][follows])
  for name in ('whole', 'leaking'):
    assert np.abs(a[name] - b[name])[follows].max() > 1e-3, name


def test_inside_the_decoder_rows_are_as_with_every_patch_up_to_the_layer():
  """The first L layers equal those of a model without compressor, whose row holds the patches where they belong."""
  config = config_of('query', within=1, space='llm')
  params = random_params(config)
  every = small_config(compressor=dict(kind='none'), prefusion=dict(num_layers=1))
  same = {path: x for path, x in params.items() if not path.startswith('compressor/')}
  batch, long = batch_of(config), batch_of(every)

  def first_layer(model, batch):
    keep = model.run_within(batch, keep=lambda x, _: x)[1]
    return keep[0][0], keep[1][0]

  early, late = run(config, first_layer, batch, params=params)

  def by_hand(model, batch):
    x = model.embed(batch)
    _, hidden = model.decoder(x, batch.positions, batch.segment_ids, return_hidden=True)
    return hidden[0]

  expected = run(every, by_hand, long, params=same)
  for row in range(4):
    is_slot, is_slot_long = np.zeros(LENGTH, bool), np.zeros(LENGTH, bool)
    is_slot[[i for i in batch.slot_index[row].reshape(-1) if i < LENGTH]] = True
    is_slot_long[[i for i in long.slot_index[row].reshape(-1) if i < LENGTH]] = True
    ours = early[row, 2 * PATCHES :][(batch.segment_ids[row] > 0) & ~is_slot]
    close(ours, expected[row][(long.segment_ids[row] > 0) & ~is_slot_long], f'row {row}', EXACT)
    for m in range(2):
      if batch.slot_index[row, m, 0] < LENGTH:
        close(early[row, m * PATCHES : (m + 1) * PATCHES], expected[row][long.slot_index[row, m]], 'patches', EXACT)
  assert late.shape == (4, LENGTH, D)


def test_what_a_model_says_of_its_compressor():
  """Of these properties engine, preflight, server and reports ask, not of the kind."""
  attends = {kind for kind in KINDS if config_of(kind).compressor_attends}
  assert attends == {'query', 'mqt'}
  inside = config_of('query', within=1, space='llm')
  assert not (config_of('query', grid=0).compressor_attends or inside.compressor_attends)
  plain = {kind for kind in KINDS if config_of(kind).reads_visuals_plainly}
  assert plain == set(KINDS) - {'voco', 'llama_vid'}
  assert not (config_of('prumerge', elastic=True).reads_visuals_plainly or inside.reads_visuals_plainly)
  assert config_of('mqt', elastic=True).reads_visuals_plainly
  assert small_config(compressor=dict(kind='none')).reads_visuals_plainly


@pytest.mark.parametrize(
  'config',
  [
    small_config(compressor=dict(kind='none')),
    config_of('query', grid=0),
    config_of('query', within=1, space='llm'),
    config_of('average'),
  ],
  ids=['none', 'no token', 'within', 'average'],
)
def test_where_a_compressor_looked_is_said_of_those_that_look(config):
  features = jnp.zeros((1, 1, PATCHES, W))
  model = merge(structure(config), random_params(config))
  assert len(jax.eval_shape(model.compress, features)) == 2
  compressor = config.compressor
  message = f'expected one that attends to patches; found kind={compressor.kind!r}, within={compressor.within}'
  with pytest.raises(ConfigError) as error:
    jax.eval_shape(functools.partial(model.compress, return_attention=True), features)
  assert str(error.value) == f'attention of the compressor: {message}'


def test_rows_of_a_decoder_that_compresses_inside_are_refused():
  config = config_of('query', within=1, space='llm')
  with pytest.raises(ConfigError, match='(?m)^rows of the decoder: expected compressor.within=0; found 1$'):
    run(config, LlavaMini.embed, batch_of(config))


def test_questions_side_by_side_are_refused_where_the_text_is_read():
  config = config_of('llama_vid')
  batch = batch_of(config)
  beside = dataclasses.replace(batch, branch_ids=np.zeros_like(batch.segment_ids))
  message = '(?m)^compressor.kind=llama_vid: expected a question per row; found several side by side$'
  with pytest.raises(ConfigError, match=message):
    run(config, LlavaMini.__call__, beside)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(kind='average', grid=3), 'CompressorConfig.grid: expected a divisor of 4 patches per side; found 3'),
    (dict(kind='mqt', keep=10), 'CompressorConfig.keep: expected at most grid² = 9; found 10'),
    (dict(kind='prumerge', keep=16), 'CompressorConfig.keep: expected 1 to 15 with prumerge; found 16'),
    (dict(kind='prumerge', space='llm'), "CompressorConfig.space: expected 'vision' with prumerge; found 'llm'"),
    (dict(kind='prumerge', neighbours=16), 'CompressorConfig.neighbours: expected 1 to 15; found 16'),
    (
      dict(kind='prumerge_plus', elastic=True),
      'CompressorConfig.elastic: expected False with prumerge_plus, which does not read it; found True',
    ),
    (dict(kind='tokenpacker', layers=(3,)), 'CompressorConfig.layers: expected hidden states 0 to 2; found (3,)'),
    (dict(kind='voco', grid=2), 'CompressorConfig.grid: expected 1 with voco, which does not read it; found 2'),
    (dict(kind='query', keep=2), 'CompressorConfig.keep: expected 0 with query, which does not read it; found 2'),
    (dict(kind='voco', keep=0), 'CompressorConfig.keep: expected 1 or more with voco; found 0'),
    (dict(kind='query', within=2), 'CompressorConfig.within: expected fewer than the 2 decoder layers; found 2'),
    (dict(kind='voco', within=1), 'CompressorConfig.within: expected 0 with voco; found 1'),
    (
      dict(kind='query', within=1),
      'CompressorConfig.within: expected space=llm, at least one token and not elastic',
    ),
  ],
)
def test_what_cannot_be(changes, message):
  with pytest.raises(ConfigError) as error:
    config_of(**changes)
  assert str(error.value) == message

"""Attention by the TPU kernel, interpreted, equals attention by jnp; both follow one description of the mask."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, with_params
from torch_parity import close

from llava_mini_jax.config import ConfigError, ScanConfig
from llava_mini_jax.models.attention import AttentionMask, attend, attend_on_cpu
from llava_mini_jax.models.layers import scan_layers
from llava_mini_jax.sharding import make_mesh, use_mesh

B, N, K, H = 4, 4, 2, 8
TOLERANCE = 5e-6  # of the largest value; sums of up to 700 terms in float32, in another order


def segments(length: int) -> np.ndarray:
  """int32[B length]: samples of random lengths, then padding; the first row is full, the last one nearly empty."""
  rng = np.random.default_rng(length)
  ends = np.sort(rng.integers(1, length, (B, 3)), axis=1)
  ids = 1 + (np.arange(length) >= ends[:, :1]) + (np.arange(length) >= ends[:, 1:2])
  ids = np.where(np.arange(length) < ends[:, 2:], ids, 0)
  ids[0], ids[-1] = 1, np.arange(length) == 0
  return ids.astype(np.int32)


def heads(length: int, keys: int | None = None) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = [(B, length, N, H), (B, keys or length, K, H), (B, keys or length, K, H)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def values_and_gradients(kind: str, mask: AttentionMask, q, k, v):
  def loss(q, k, v):
    y = attend(q, k, v, mask.resolve(kind, H))
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

  (_, y), grads = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return dict(zip('yqkv', (y, *grads), strict=True))


def equal(ours, theirs, tolerance: float = TOLERANCE) -> None:
  for name, value in theirs.items():
    close(ours[name], value, name, tolerance * max(1.0, float(np.abs(value).max())))


# 130: one block of 256, half of it padding; 600: one of 640; 700: two of 384
@pytest.mark.parametrize('length', [130, 600, 700])
@pytest.mark.parametrize('causal', [True, False])
def test_the_kernel_is_jnp(length, causal):
  ids = segments(length)
  masks = AttentionMask(ids, ids, causal=causal), AttentionMask(np.ones_like(ids), (ids > 0).astype(np.int32))
  for mask in masks[: 1 + causal]:
    equal(*(values_and_gradients(kind, mask, *heads(length)) for kind in ('splash', 'jnp')))


@pytest.mark.parametrize(('length', 'last', 'causal'), [(300, 1, True), (600, 130, True), (700, 699, False)])
def test_the_kernel_is_jnp_for_the_last_queries(length, last, causal):
  mask = AttentionMask(segments(length), segments(length), causal=causal).of_last(last)
  q, k, v = heads(length)
  equal(*(values_and_gradients(kind, mask, q[:, -last:], k, v) for kind in ('splash', 'jnp')))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize(('length', 'keys', 'shared'), [(33, 33, 4), (33, 50, 2), (1, 50, 1)])
def test_on_cpus_it_is_the_librarys(length, keys, shared, masked, dtype):
  """Values and gradients of `jax.nn.dot_product_attention`, with every query seeing one key at least."""
  rng = np.random.default_rng(length + keys)
  q, k, v = (rng.normal(size=(B, n, h, H)).astype(dtype) for n, h in ((length, N), (keys, shared), (keys, shared)))
  mask = rng.random((B, 1, length, keys)) < 0.5
  mask[..., 0] = True
  weigh = jnp.asarray(rng.normal(size=q.shape), dtype)

  def values_and_gradients(attend):
    y, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask=jnp.asarray(mask) if masked else None), q, k, v)
    return [np.asarray(found, np.float32) for found in (y, *back(weigh))]

  expected = values_and_gradients(jax.nn.dot_product_attention)
  for name, ours, theirs in zip('yqkv', values_and_gradients(attend_on_cpu), expected, strict=True):
    tolerance = (3e-2 if dtype == 'bfloat16' else TOLERANCE) * max(1.0, float(np.abs(theirs).max()))
    close(ours, theirs, name, tolerance)


@pytest.mark.parametrize('shape', [(4, 1, 2), (2, 2, 2)])
def test_the_kernel_runs_on_each_device_s_rows_and_heads(shape):
  ids = segments(130)
  mask = AttentionMask(ids, ids)
  with use_mesh(make_mesh(shape)):
    ours = values_and_gradients('splash', mask, *heads(130))
  equal(ours, values_and_gradients('jnp', mask, *heads(130)))


def test_who_sees_whom():
  """Against the definition, one pair at a time."""
  ids, branches = segments(24), np.random.default_rng(1).integers(0, 3, (B, 24)).astype(np.int32)
  for causal in (True, False):
    for branch_ids in (None, branches):
      allowed = np.asarray(AttentionMask(ids, ids, branch_ids, causal=causal).allowed())
      for row, query, key in np.ndindex(B, 24, 24):
        sees = ids[row, query] == ids[row, key] and (key <= query or not causal)
        if branch_ids is not None:
          sees &= branches[row, key] in (0, branches[row, query])
        assert allowed[row, query, key] == sees
      last = AttentionMask(ids, ids, branch_ids, causal=causal).of_last(5).allowed()
      np.testing.assert_array_equal(last, allowed[:, -5:])


def test_which_one_is_chosen():
  ids = np.ones((B, 512), np.int32)
  mask = AttentionMask(ids, ids)
  assert mask.resolve('splash', 8) is mask
  assert mask.resolve('jnp', 128).shape == (B, 1, 512, 512) == mask.resolve('auto', 128).shape  # there is no TPU
  branched = dataclasses.replace(mask, branch_ids=ids)
  assert branched.resolve('splash', 128).shape == (B, 1, 512, 512)  # which the kernel does not know
  with pytest.raises(ConfigError, match="^attention: expected one of auto, jnp, splash; found 'flash'$"):
    mask.resolve('flash', 128)


def test_the_whole_model_is_the_same_with_the_kernel():
  """Padded rows, several samples in a row, tokens that pre-fusion masks."""
  config = small_config()
  samples = [random_sample(config, i, text=text) for i, text in enumerate([(3, 4), (2, 9), (5, 1), (4, 4)])]
  batch = lay_out(config, samples, length=20, visuals=1, fused_text=12)
  batch = dataclasses.replace(batch, segment_ids=np.where(batch.positions > 9, 2, 1) * (batch.segment_ids > 0))
  params = random_params(config)

  def logits(attention):
    changed = dataclasses.replace(config, attention=attention)
    return quick_jit(lambda params: with_params(changed, params)(batch))(params)

  ours, theirs = logits('splash'), logits('jnp')
  real = batch.segment_ids > 0
  close(ours[real], theirs[real], 'logits', 1e-5)


@pytest.mark.slow
def test_what_layers_keep_changes_no_gradient_and_less_is_computed_again():
  config = small_config(scan=dict(remat='none'))
  batch = lay_out(config, [random_sample(config, 0)], length=14, visuals=1)
  params = random_params(config)

  def run(remat):
    changed = dataclasses.replace(config, scan=dataclasses.replace(config.scan, remat=remat))
    gradient = jax.grad(lambda params: jnp.square(with_params(changed, params).hidden(batch)).mean())
    return quick_jit(gradient)(params), str(jax.make_jaxpr(gradient)(params)).count('dot_general[')

  expected, least = run('none')
  counts = []
  for remat in ('full', 'attention', 'projections', 'mlp', 'dots'):
    grads, products = run(remat)
    counts.append(products)
    for path, grad in expected.items():
      close(grads[path], grad, f'{remat} {path}', 2e-6 * max(1.0, float(np.abs(grad).max())))
  full, kept_attention, projections, mlp, dots = counts
  assert full >= kept_attention > projections > mlp > dots >= least


def test_what_the_kernel_leaves_is_kept_if_asked_for():
  """Its output and the logarithm of its sums, of both layers: then it need not run again."""
  q, k, v = heads(130)
  mask, layers = AttentionMask(segments(130), segments(130)), jnp.arange(2)

  def kept(remat):
    def run(q):
      return scan_layers(lambda x, _: (attend(x, k, v, mask), None), q, layers, ScanConfig(remat=remat))[0]

    return {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(run, q)[1], q))}

  left = {(2, B, N, 256, H), (2, B, N, 256)}
  assert left <= kept('attention') and left <= kept('dots') and not left & kept('full')


def test_stages_may_keep_different_amounts():
  scan = ScanConfig(remat='dots', prefusion_remat='full')
  assert [scan.of(stage).remat for stage in ('vision', 'prefusion', 'decoder')] == ['dots', 'full', 'dots']
  config = small_config(scan=dict(remat='dots', prefusion_remat='full', vision_remat='none'))
  model = with_params(config, random_params(config))
  assert [getattr(model, stage).scan.remat for stage in ('vision', 'prefusion', 'decoder')] == ['none', 'full', 'dots']


def test_a_frozen_tower_keeps_nothing_and_has_no_backward_pass():
  """Its products are in the program once each, in a trainer's step as in a forward pass; trained, three times."""
  config = small_config(prefusion=dict(num_layers=0))
  batch = lay_out(config, [random_sample(config, 0)], length=14, visuals=1)
  params = random_params(config)

  def products(trains):
    own = {path: leaf for path, leaf in params.items() if trains(path)}

    def loss(own):
      return jnp.square(with_params(config, params | own).hidden(batch)).mean()

    return str(jax.make_jaxpr(jax.grad(loss))(own)).count(f',{config.vision.intermediate_size}]')

  def is_tower(path):
    return path.startswith('vision/')

  forward = str(jax.make_jaxpr(lambda: with_params(config, params).hidden(batch))()).count(
    f',{config.vision.intermediate_size}]'
  )
  assert products(lambda path: not is_tower(path)) == forward < products(is_tower)

"""FLOPs of traced programs against counts by hand and against an independent count of the trainer's own step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from test_flops import CASES, abstract_batch, dot_flops

from llava_mini_jax.analyze.jaxpr_flops import count
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.step import make_trainer

A, B = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
ONE = 2 * 2 * 3 * 4  # a product of the two


def total(function, *arguments):
  return count(jax.make_jaxpr(function)(*arguments)).total


def test_products():
  assert total(lambda a, b: a @ b, A, B) == ONE
  assert total(lambda a, b: jnp.einsum('ij,kjl->kil', a, b), A, np.ones((5, 3, 4))) == 5 * ONE
  assert total(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), A, B) == ONE


def test_loops_and_branches():
  def scanned(a, b):
    return jax.lax.scan(lambda x, _: (x + (a @ b).sum(), None), 0.0, None, length=7)[0]

  def branched(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: a @ b @ b.T @ b, lambda: a @ b)

  def endless(a, b):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + a @ b, jnp.zeros((2, 4)))

  assert total(scanned, A, B) == 7 * ONE
  assert total(branched, A, B) == ONE + 2 * (2 * 2 * 4 * 3)
  found = count(jax.make_jaxpr(endless)(A, B))
  assert (found.total, found.open_loops) == (ONE, 1)


def test_a_convolution():
  """Three of 5 × 5 over 2 channels into 4, on 8 × 8 points that stay inside."""
  x, kernel = np.ones((3, 2, 12, 12), np.float32), np.ones((4, 2, 5, 5), np.float32)
  convolve = lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), 'VALID')  # noqa: E731
  assert total(convolve, x, kernel) == 2 * 3 * 4 * 8 * 8 * 2 * 5 * 5


def test_every_device_counts_its_part():
  mesh = make_mesh((4, 2, 1))
  split = PartitionSpec('data')
  product = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)
  assert total(product, np.ones((8, 3), np.float32), B) == 8 * 2 * 3 * 4 * 2  # the fsdp axis repeats it


@pytest.mark.parametrize('estimate', [None, 77])
def test_kernels(estimate):
  def kernel(a, b, out):
    out[...] = a[...] @ b[...]

  cost = None if estimate is None else pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0)
  multiply = pl.pallas_call(
    kernel,
    grid=(4,),
    in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))],
    out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
    cost_estimate=cost,
    name='multiply',
    interpret=True,
  )
  found = count(jax.make_jaxpr(lambda a, b: multiply(multiply(a, b), b))(np.ones((32, 16)), np.ones((16, 16))))
  each = estimate or 2 * 32 * 16 * 16
  assert found.total == 2 * each
  assert found.kernels == {'multiply': 2 * each}
  assert found.kernel_calls == {('multiply', ((32, 16),)): each}


@pytest.mark.parametrize('case', ['tiny', 'four_tokens'])
def test_a_training_step(case):
  """The same as an independent count of its products, recomputation included."""
  config, sizes = CASES[case]
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  trainer = make_trainer(config, mesh, groups=(('.*', 1e-4),), factor=lambda step: jnp.float32(1))
  with use_mesh(mesh):
    traced = jax.make_jaxpr(trainer.step)(trainer.abstract, abstract_batch(config, **sizes))
  assert count(traced).total == dot_flops(traced.jaxpr)

"""The formula for FLOPs equals the matrix products found by tracing the model.

The formula projects the compression queries once per image, the model once; the resize of a position table it leaves
out. Without either, the two agree exactly.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import small_config

from llava_mini_jax.analyze import flops
from llava_mini_jax.analyze.flops import forward_flops, peak_flops, training_flops
from llava_mini_jax.config import LlavaMiniConfig, ScanConfig
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.lora import Lora
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import abstract_model
from llava_mini_jax.types import Batch


def programs_in(eqn):
  """The programs inside one operation: of jit, scan, checkpoint, custom gradients."""
  for value in eqn.params.values():
    for leaf in value if isinstance(value, tuple | list) else (value,):
      leaf = getattr(leaf, 'jaxpr', leaf)
      if hasattr(leaf, 'eqns'):
        yield leaf


def dot_flops(program) -> int:
  """2 per multiply-add of every dot_general in a jaxpr; the body of a scan counts as often as it runs."""
  total = 0
  for eqn in program.eqns:
    name = eqn.primitive.name
    assert name not in ('while', 'cond', 'conv_general_dilated'), f'{name}: not counted'
    if name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
    total += sum(map(dot_flops, programs_in(eqn))) * (eqn.params['length'] if name == 'scan' else 1)
  return total


def abstract_batch(config: LlavaMiniConfig, *, rows, length, visuals, fused_text, views=1) -> Batch:
  size = config.vision.image_size
  shapes = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), ((rows, length), jnp.int32))
  shapes |= dict(
    loss_mask=((rows, length), jnp.bool_),
    pixels=((rows, visuals, views, size, size, 3), jnp.uint8),
    fuse_index=((rows, visuals, fused_text), jnp.int32),
    fuse_mask=((rows, visuals, fused_text), jnp.bool_),
    slot_index=((rows, visuals, config.slots_per_visual(views)), jnp.int32),
  )
  return Batch(**{name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()})


def test_the_count_by_hand():
  """Three products of 2 × 3 by 3 × 4, two of them in a scan and one batched five times."""

  def program(a, b):
    x, _ = jax.lax.scan(lambda x, _: (jax.nn.relu(x + (a @ b).sum()), None), 0.0, None, length=2)
    return x + jnp.einsum('kij,jl->kil', jnp.ones((5, 1, 1)) * a, b).sum()

  assert dot_flops(jax.make_jaxpr(program)(np.ones((2, 3)), np.ones((3, 4))).jaxpr) == (2 + 5) * 2 * 2 * 3 * 4


SIZES = dict(rows=2, length=40, visuals=2, fused_text=24)
CASES = {
  'tiny': (LlavaMiniConfig.preset('tiny'), SIZES),
  'four_tokens': (small_config(compressor=dict(grid=2)), SIZES),
  'every_patch': (small_config(compressor=dict(kind='none')), SIZES),
  'every_patch_unfused': (small_config(compressor=dict(kind='none'), prefusion=dict(num_layers=0)), SIZES),
  'paper': (
    small_config(
      compressor=dict(grid=2, attention='plain', space='llm', key_position='native_grid'),
      prefusion=dict(fuse_compressed=False),
    ),
    SIZES,
  ),
  'views': (small_config(compressor=dict(grid=2, key_position='none')), dict(SIZES, views=5)),
  'kept_layers': (small_config(vision=dict(keep_unused_layers=True, num_hidden_layers=6, select_layer=-4)), SIZES),
  'vicuna_7b': (LlavaMiniConfig.preset('vicuna_7b'), dict(SIZES, length=128, fused_text=64)),
  'llama31_8b': (LlavaMiniConfig.preset('llama31_8b'), dict(SIZES, length=128, fused_text=64)),
}


@pytest.mark.parametrize('case', CASES)
def test_forward(case):
  config, sizes = CASES[case]
  graphdef, params = abstract_model(config)
  traced = jax.make_jaxpr(lambda params, batch: nnx.merge(graphdef, params)(batch))(
    params, abstract_batch(config, **sizes)
  )
  counted, formula = dot_flops(traced.jaxpr), forward_flops(config, **sizes)
  exact = config.compressor.kind == 'none' or config.compressor.attention == 'plain'
  assert abs(formula.total - counted) <= (0 if exact else 0.003 * counted)


def test_every_component_is_larger_than_what_the_tests_let_pass():
  parts = dataclasses.asdict(forward_flops(CASES['tiny'][0], **SIZES))
  assert set(parts) == {'vision', 'projector', 'compressor', 'prefusion', 'decoder'}
  assert min(parts.values()) > 0.02 * sum(parts.values())


def step_flops(config: LlavaMiniConfig, groups, sizes, lora: Lora | None = None) -> int:
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  trainer = make_trainer(config, mesh, groups=groups, factor=lambda step: jnp.float32(1), lora=lora)
  with use_mesh(mesh):
    return dot_flops(jax.make_jaxpr(trainer.step)(trainer.abstract, abstract_batch(config, **sizes)).jaxpr)


ALL = ('vision', 'projector', 'compressor', 'prefusion', 'decoder')
REST = (('.*', 'frozen'),)
STAGES = {  # parameter groups, what trains
  'all': ((('.*', 1e-4),), ALL),
  'all but the tower': ((('vision/.*', 'frozen'), ('.*', 1e-4)), ALL[1:]),
  'projector': ((('projector/.*', 1e-4), *REST), ('projector',)),
  'prefusion': ((('prefusion/.*', 1e-4), *REST), ('prefusion',)),
  'decoder': ((('decoder/(?!embed_tokens).*', 1e-4), *REST), ('decoder',)),
}


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('case', ['tiny', 'vicuna_7b', 'every_patch_unfused'])
def test_training_step(case, stage):
  """Also the proof that no gradient is formed for a frozen weight, nor for anything before what trains."""
  config, sizes = CASES[case]
  if stage == 'prefusion' and not config.prefusion.num_layers:
    return
  groups, trains = STAGES[stage]
  config = dataclasses.replace(config, scan=ScanConfig(remat='none'))
  counted = step_flops(config, groups, sizes)
  formula = training_flops(config, trains=trains, **sizes)
  assert abs(formula - counted) <= (0.01 if case == 'vicuna_7b' else 0.05) * counted  # what pixels need no gradient for
  others = {name: training_flops(config, trains=other, **sizes) for name, (_, other) in STAGES.items() if name != stage}
  if case == 'vicuna_7b' and 'all' in stage:
    assert all(abs(other - counted) > 0.1 * counted for other in others.values())


def test_peak_of_a_known_and_of_an_unknown_device(monkeypatch):
  kind = jax.devices()[0].device_kind
  measured = peak_flops('float32')
  assert measured > 1e8
  monkeypatch.setitem(flops.PEAK_FLOPS, kind, 5.0)
  assert peak_flops('float32') == 5.0 * jax.device_count()


@pytest.mark.parametrize(('groups', 'trains'), [((), ()), ((('projector/.*', 1e-4),), ('projector',))])
def test_adapters_need_no_gradient_of_the_kernels_they_are_added_to(groups, trains):
  """What they cost themselves is proportional to their rank, so that two ranks tell what a rank of zero would."""
  config, sizes = CASES['vicuna_7b']
  config = dataclasses.replace(config, scan=ScanConfig(remat='none'))
  groups = (('lora/.*', 1e-4), *groups, *REST)
  one, two = (step_flops(config, groups, sizes, lora=Lora(rank, 1.0, ('decoder/layers/.*_proj',))) for rank in (1, 2))
  counted = 2 * one - two
  formula = training_flops(config, trains=trains, adapts=('decoder',), **sizes)
  assert abs(formula - counted) <= 0.01 * counted
  saved = training_flops(config, trains=('decoder', *trains), **sizes) - formula
  decoder = forward_flops(config, **sizes).decoder
  assert 0.95 * decoder < saved < decoder  # the products of the gradients of its kernels; those of attention stay

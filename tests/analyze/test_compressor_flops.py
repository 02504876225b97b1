"""The formula of each kind of compressor equals the products found by tracing the model, to the last one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_model import small_config

from llava_mini_jax.analyze.flops import forward_flops
from llava_mini_jax.analyze.jaxpr_flops import count
from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.train.tree import abstract_model
from llava_mini_jax.types import Batch

CASES = {
  'query': dict(kind='query', grid=2, key_position='none'),
  'query without tokens': dict(kind='query', grid=0),
  'average': dict(kind='average', grid=2),
  'average after the projector': dict(kind='average', grid=2, space='llm'),
  'mqt': dict(kind='mqt', grid=3, keep=5),
  'prumerge': dict(kind='prumerge', keep=4, neighbours=5),
  'prumerge_plus': dict(kind='prumerge_plus', keep=3, neighbours=5),
  'tokenpacker': dict(kind='tokenpacker', grid=2, layers=(0, 1, 2)),
  'llama_vid': dict(kind='llama_vid', grid=2, text_queries=3),
  'llama_vid after the projector': dict(kind='llama_vid', grid=1, text_queries=3, space='llm'),
  'voco': dict(kind='voco', keep=2),
  'none': dict(kind='none'),
  'within': dict(kind='query', grid=2, key_position='none', space='llm', within=1),
  'average within': dict(kind='average', grid=1, space='llm', within=1),
}


def abstract_batch(config: LlavaMiniConfig, rows: int, length: int, visuals: int, fused_text: int, views: int) -> Batch:
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


@pytest.mark.parametrize('views', [1, 5])
@pytest.mark.parametrize('case', CASES)
def test_forward(case, views):
  for fusion in (0, 2):
    if case == 'query without tokens' and not fusion:
      continue
    config = small_config(compressor=CASES[case], prefusion=dict(num_layers=fusion))
    sizes = dict(rows=2, length=160, visuals=2, fused_text=24, views=views)
    graphdef, params = abstract_model(config)
    program = jax.make_jaxpr(lambda params, batch, graphdef=graphdef: nnx.merge(graphdef, params)(batch))
    found = count(program(params, abstract_batch(config, **sizes)))
    assert forward_flops(config, **sizes).total == found.total

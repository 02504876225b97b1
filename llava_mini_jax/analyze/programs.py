"""The programs that a run executes, built for devices that need not be there: abstract arguments, nothing allocated.

`train` is the trainer's own step; `prefill` and `decode` are the generator's; `video` encodes, fuses and splices one
video, what is done once before the first question about it. `decode` and `video` are those of a decoder that reads
visuals like any other token (`LlavaMiniConfig.reads_visuals_plainly`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.analyze import flops
from llava_mini_jax.analyze.topologies import Topology
from llava_mini_jax.config import ConfigError, LlavaMiniConfig, require_choice
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.generate import decode_step, prefill
from llava_mini_jax.infer.prompts import prompt_shape
from llava_mini_jax.sharding import batch_sharding, check_batch, compiler_options, make_mesh, use_mesh
from llava_mini_jax.train.start import trainer_for
from llava_mini_jax.train.throughput import trained_modules
from llava_mini_jax.train.tree import merge, sharded_model, unflatten
from llava_mini_jax.types import Batch

STEPS = ('train', 'prefill', 'decode', 'video')
_ANY_NUMBER_OF_STEPS = 1000  # the schedule's length is a constant in the program and changes no cost


@dataclasses.dataclass(frozen=True)
class Program:
  step: str
  function: Callable  # jitted
  arguments: tuple  # ShapeDtypeStructs with shardings
  mesh: Mesh
  rows: int  # global
  sizes: Mapping[str, int]  # L, M, T, V and what else shapes it
  model_flops: float  # of all devices
  kinds: Mapping[str, Any]  # arguments by kind: parameters, frozen parameters, optimizer, batch, cache
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the compiler, which the function has
  micro_steps: int = 1  # that the rows are computed in

  def trace(self) -> jax.stages.Traced:
    with use_mesh(self.mesh):
      return self.function.trace(*self.arguments)

  def lower(self, traced: jax.stages.Traced) -> jax.stages.Lowered:
    with use_mesh(self.mesh):
      return traced.lower()


def abstract_batch(
  config: LlavaMiniConfig,
  shape: RowShape,
  *,
  rows: int,
  views: int,
  sharding: Any,
  side_by_side: bool = False,
  features: bool = False,
) -> Batch:
  """A Batch of so many rows as the data layout makes them.

  Args:
    side_by_side: rows hold questions side by side. features: of the vision tower are read, in the model's dtype.
  """
  branch = np.zeros(1, np.int32) if side_by_side else None
  row = build_row(np.ones(1, np.int32), np.zeros(1, bool), shape, where='preflight', branch=branch)
  size = 0 if features else config.vision.image_size
  shapes = {name: (array.shape, array.dtype) for name, array in row.items()}
  shapes['pixels'] = (shape.visuals, views, size, size, 3), np.uint8
  if features:
    vision = config.vision
    shapes['features'] = (shape.visuals, views, vision.num_patches, vision.hidden_size), jnp.dtype(config.dtype)
  return Batch(
    **{name: jax.ShapeDtypeStruct((rows, *of), dtype, sharding=sharding) for name, (of, dtype) in shapes.items()}
  )


def make_program(
  experiment: Experiment,
  topology: Topology,
  *,
  step: str = 'train',
  batch: int = 0,
  mesh: tuple[int, int, int] | None = None,
  text: int = 64,
  new_tokens: int = 128,
  dtype: str = 'float32',
) -> Program:
  """The program of one step on a topology.

  Args:
    step: one of STEPS.
    batch: global rows; 0 = of the experiment when training, else one per device group.
    mesh: data × fsdp × tensor; None = of the experiment.
    text: tokens of a prompt, its vision slots apart (prefill, decode, video).
    new_tokens: of an answer, which the cache has room for.
    dtype: of the parameters, not when training: float32 (what is loaded from a checkpoint) or bfloat16.
  Raises:
    ConfigError, MeshError: as training would, before anything is compiled; ConfigError also for `decode` and `video` of
      a compressor that reads the question, varies in its number of tokens, or acts in the decoder.
  """
  require_choice('step', step, STEPS)
  require_choice('dtype', dtype, ('float32', 'bfloat16'))
  devices = topology.devices()
  grid = make_mesh(mesh or experiment.train.mesh, devices, slices=topology.slices)
  if step == 'train':
    rows = batch or experiment.train.batch_size
    check_batch(rows, grid, experiment.train.accumulate)
    return _training(experiment, grid, rows)
  rows = batch or grid.shape['data'] * grid.shape['fsdp']
  check_batch(rows, grid)
  return _asking(experiment, grid, step, rows, text=text, new_tokens=new_tokens, dtype=jnp.dtype(dtype))


def _training(experiment: Experiment, mesh: Mesh, rows: int) -> Program:
  model, data = experiment.model, experiment.data
  limit = model.decoder.max_position_embeddings
  if data.row_length > limit:
    raise ConfigError(f'data.row_length: expected at most {limit}; found {data.row_length}')
  trainer = trainer_for(experiment, mesh, _ANY_NUMBER_OF_STEPS)
  views = _views(experiment)
  shape = RowShape.for_model(
    model, length=data.row_length, visuals=data.visuals_per_row, fused_text=data.fused_text or None, views=views
  )
  batch = abstract_batch(
    model,
    shape,
    rows=rows,
    views=views,
    sharding=batch_sharding(mesh),
    side_by_side=data.side_by_side,
    features=bool(data.features),
  )
  sizes = dict(length=shape.length, visuals=shape.visuals, fused_text=shape.fused_text, views=views)
  state = trainer.abstract
  model_flops = flops.training_flops(model, **trained_modules(trainer), rows=rows, **sizes)
  if data.features:
    model_flops -= flops.forward_flops(model, rows=rows, **sizes).vision
  return Program(
    step='train',
    function=trainer.step,
    arguments=(state, batch),
    mesh=mesh,
    rows=rows,
    sizes=sizes,
    model_flops=model_flops,
    kinds={
      'parameters': state['params'],
      'frozen parameters': state['frozen'],
      'optimizer': state['opt'],
      'batch': batch,
    },
    options=compiler_options(mesh) or {},
    micro_steps=experiment.train.accumulate,
  )


def _asking(
  experiment: Experiment, mesh: Mesh, step: str, rows: int, *, text: int, new_tokens: int, dtype: jnp.dtype
) -> Program:
  model, data = experiment.model, experiment.data
  if step != 'prefill':
    model.require_plain_visuals(f'step {step}')
  views = _views(experiment)
  frames = data.video_frames or data.video_max_frames or data.visuals_per_row
  visuals = frames if step == 'video' else 1
  slots = visuals * model.slots_per_visual(views)
  shape = prompt_shape(model, length=slots + text, text=text, visuals=visuals, views=views)
  cached = shape.length + new_tokens
  graphdef, leaves = sharded_model(model, mesh, dtype)
  params = unflatten(leaves)
  batch = abstract_batch(model, shape, rows=rows, views=views, sharding=batch_sharding(mesh))
  sizes = dict(length=shape.length, visuals=shape.visuals, fused_text=shape.fused_text, views=views)
  forward = flops.forward_flops(model, rows=rows, **sizes)
  kinds = {'parameters': params, 'batch': batch}
  if step == 'prefill':
    function = jax.jit(lambda params, batch: prefill(merge(graphdef, params), batch, cached))
    arguments = params, batch
    model_flops = forward.total - flops.unembedding_flops(model, rows * (shape.length - 1))
  elif step == 'decode':
    function = jax.jit(
      lambda params, token, cache: decode_step(merge(graphdef, params), token, cache), donate_argnums=2
    )
    token = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch_sharding(mesh))
    cache = _abstract_cache(graphdef, params, mesh, rows, cached)
    arguments = params, token, cache
    kinds = {'parameters': params, 'batch': token, 'cache': cache}
    sizes = dict(length=1, slots=cached)
    model_flops = flops.decode_flops(model, rows=rows, slots=cached)
  else:
    function = jax.jit(lambda params, batch: merge(graphdef, params).embed(batch))
    arguments = params, batch
    model_flops = forward.total - forward.decoder
  return Program(step, function, arguments, mesh, rows, sizes, model_flops, kinds)


def _views(experiment: Experiment) -> int:
  return ImageProcessor(experiment.model.vision.image_size, grid=experiment.data.grid).views


def _abstract_cache(graphdef: nnx.GraphDef, params: dict[str, Any], mesh: Mesh, rows: int, slots: int):
  """As prefill leaves it: rows over the batch axes, everything of a row together."""
  model = nnx.eval_shape(lambda params: merge(graphdef, params), params)
  cache = jax.eval_shape(lambda: model.decoder.empty_cache(rows, slots, model.dtype))

  def placed(x, axis):
    spec = [None] * x.ndim
    spec[axis] = batch_sharding(mesh).spec[0]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return dataclasses.replace(
    cache, keys=placed(cache.keys, 1), values=placed(cache.values, 1), length=placed(cache.length, 0)
  )

"""The device mesh and the one table that maps logical axes to it. No other file names mesh axes.

Parameters and activations carry *logical* axis names; to try another sharding
strategy, change `RULES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'tensor')

RULES = (
  # parameters
  ('layer', None),
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('mlp', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('head_dim', None),
  ('vision_embed', 'fsdp'),
  ('vision_mlp', 'tensor'),
  ('vision_heads', 'tensor'),
  ('norm', None),
  ('position', None),
  # activations
  ('batch', ('data', 'fsdp')),
  ('length', None),
  ('act_embed', None),
  ('act_mlp', 'tensor'),
  ('act_heads', 'tensor'),
  ('act_vocab', 'tensor'),
)


# v5e gathers while it computes without being told to.
_OVERLAP = {
  'xla_enable_async_all_gather': True,
  'xla_enable_async_all_reduce': True,
  'xla_tpu_overlap_compute_collective_tc': True,
  'xla_tpu_enable_async_collective_fusion': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
}
_OVERLAP_KINDS = ('TPU v5', 'TPU v5p', 'TPU v6 lite', 'TPU v6e', 'TPU7x')


class MeshError(ValueError):
  """A mesh that does not fit the devices, or a batch that does not fit the mesh."""


def make_mesh(
  shape: tuple[int, int, int] | None = None, devices: Sequence[jax.Device] | None = None, *, slices: int = 1
) -> Mesh:
  """A `data × fsdp × tensor` mesh.

  Args:
    shape: sizes of the three axes, one of which may be -1 (the rest). None puts every device on `fsdp`.
    devices: the devices it covers; None = all.
    slices: TPU slices, or else processes, that only a data-center network joins. `data` goes over them, outermost, so
      that gradients alone cross that network.
  Raises:
    MeshError: the sizes do not multiply to the number of devices, or there are not so many slices.
  """
  count = len(jax.devices() if devices is None else devices)
  sizes = list((1, -1, 1) if shape is None else shape)
  if len(sizes) != len(MESH_AXES) or any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
    raise MeshError(f'mesh: expected sizes of {" × ".join(MESH_AXES)}, one of which may be -1; found {tuple(sizes)}')
  if -1 in sizes:
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = count // known
  if int(np.prod(sizes)) != count:
    raise MeshError(f'mesh {" × ".join(map(str, shape or sizes))} does not cover {count} device(s)')
  _check_slices(jax.devices() if devices is None else devices, slices)
  if slices > 1:
    return _hybrid_mesh(tuple(sizes), slices, jax.devices() if devices is None else devices)
  # Neighbours on an axis are neighbours on the chips' torus; an axis may be part of one of the torus's, or several.
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
  """What a training step is compiled with, so that the chips of this mesh communicate while they compute."""
  return _OVERLAP if mesh.devices.flat[0].device_kind in _OVERLAP_KINDS else None


def _check_slices(devices: Sequence[jax.Device], slices: int) -> None:
  """Raises MeshError for TPU slices that nobody counted: their network would carry what chips of one slice exchange."""
  found = len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'})
  if found > 1 and slices != found:
    raise MeshError(f'mesh: the devices are of {found} slices; expected train.slices={found}, found {slices}')


def _hybrid_mesh(sizes: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> Mesh:
  """`data` outermost over the slices; what lies within one, as `create_device_mesh` has it."""
  data, *rest = sizes
  if data % slices:
    raise MeshError(f'mesh: expected data to be a multiple of slices={slices}; found {data}')
  found = {name: len({getattr(d, name, None) for d in devices}) for name in ('slice_index', 'process_index')}
  if slices not in found.values():
    have = f'{found["slice_index"]} slice(s) and {found["process_index"]} process(es)'
    raise MeshError(f'mesh: expected devices of {slices} slices or processes; found {have}')
  laid = mesh_utils.create_hybrid_device_mesh(
    (data // slices, *rest),
    (slices, 1, 1),
    devices,
    process_is_granule=found['slice_index'] != slices,
    allow_split_physical_axes=True,
  )
  return Mesh(laid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_batch(batch_size: int, mesh: Mesh, micro_steps: int = 1) -> None:
  """Raises MeshError unless the rows of a micro-step divide over the batch axes of the mesh."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size % (ways * micro_steps):
    times = f' times {micro_steps} micro-steps' if micro_steps > 1 else ''
    raise MeshError(f'batch size {batch_size} is not a multiple of data × fsdp = {ways}{times}')


def process_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """(index, count): the global batch divides over `count` groups of processes, and this one's rows are of `index`.

  Processes that `tensor` lies across hold the same rows, and are of one group.

  Args:
    process: None = this one.
  Raises:
    MeshError: processes share some of their rows, but not all.
  """
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  held: dict[int, set[int]] = {}
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  groups = sorted({tuple(sorted(rows)) for rows in held.values()})
  if len(groups) * len(groups[0]) != ways or len({row for rows in groups for row in rows}) != ways:
    raise MeshError(f'mesh {dict(mesh.shape)}: {len(held)} processes share some rows of a batch, but not all of them')
  process = jax.process_index() if process is None else process
  return groups.index(tuple(sorted(held[process]))), len(groups)


def check_parameter(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
  """Raises MeshError, naming the parameter, unless its axes divide over the mesh axes they are laid on."""
  try:
    sharding.shard_shape(shape)
  except ValueError as error:
    mesh = dict(sharding.mesh.shape)
    raise MeshError(
      f'parameter {path}: shape {shape} does not divide as {tuple(sharding.spec)} over mesh {mesh}'
    ) from error


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
  """Inside, `constrain` acts and parameters get their shardings."""
  with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
    yield mesh


def spec(*logical: str | None) -> PartitionSpec:
  """Logical axis names -> PartitionSpec. Raises KeyError for a name that has no rule."""
  table = dict(RULES)
  return PartitionSpec(*(None if name is None else table[name] for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Pins the sharding of an activation by logical axes; a no-op outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical))


def platform() -> str:
  """What the program is compiled for, 'tpu', 'gpu' or 'cpu': the mesh's devices, which may be described only."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def mesh_axes(logical: str) -> tuple[str, ...]:
  """The mesh axes that a logical axis is laid on, for collectives inside `on_shards`; () outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return ()
  axes = dict(RULES)[logical]
  return (axes,) if isinstance(axes, str) else axes or ()


def ways(logical: str) -> int:
  """Into how many parts the mesh cuts a logical axis; 1 outside a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return int(np.prod([shape[axis] for axis in mesh_axes(logical)]))


Axes = tuple[str | None, ...]


def on_shards(function: Callable, inputs: tuple[Axes, ...], outputs: Axes | tuple[Axes, ...]) -> Callable:
  """`function` of each device's own part of arrays with these logical axes; itself outside a mesh.

  For what the compiler cannot split by itself (kernels), or splits badly.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return function
  one = not outputs or not isinstance(outputs[0], tuple)
  out_specs = spec(*outputs) if one else tuple(spec(*axes) for axes in outputs)
  # What comes out of a kernel says nothing of how it varies over the mesh, so there is nothing to check.
  return jax.shard_map(function, in_specs=tuple(spec(*axes) for axes in inputs), out_specs=out_specs, check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data × fsdp; everything of a row on one device group."""
  return NamedSharding(mesh, spec('batch'))

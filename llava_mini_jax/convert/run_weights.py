"""Parameters of a run by path, read straight to a mesh: of an imported run from `weights/`, else from its checkpoints.

An imported run is a directory with `tokenizer/` and `weights/`: safetensors shards whose tensors are our parameters,
float32, under their paths, with `experiment.json` and SHA256SUMS. It is not an Orbax checkpoint because Orbax takes
whole arrays, so that writing one would need the model in memory; a shard is written layer by layer, and every device
reads its own slice of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.names import MODULES
from llava_mini_jax.convert.tensor_files import TensorFiles, read_json
from llava_mini_jax.convert.tensor_writer import Planned, write_tensors
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import use_mesh
from llava_mini_jax.train.checkpoint import CheckpointError, Checkpoints
from llava_mini_jax.train.tree import abstract_model, flatten, parameter_shapes, unflatten

WEIGHTS, EXPERIMENT, CHECKPOINTS = 'weights', 'experiment.json', 'checkpoints'
# Fields that change what a module computes and not the shapes of its parameters.
_MEANING = dict(
  vision=('num_hidden_layers', 'select_layer', 'layer_norm_eps'),
  compressor=('space', 'attention', 'key_position', 'num_heads'),
  prefusion=('fuse_compressed',),
  decoder=('rope_theta', 'rope_scaling', 'rms_norm_eps'),
)


def is_imported(workdir: Path) -> bool:
  """Whether the run's parameters are in `weights/`: it was imported, and nothing has been trained in it since."""
  trained = any(path.name.isdigit() for path in (Path(workdir) / CHECKPOINTS).glob('*'))
  return (Path(workdir) / WEIGHTS).is_dir() and not trained


def write_run(
  workdir: Path,
  experiment: Experiment,
  planned: Sequence[Planned],
  *,
  max_shard_bytes: int,
  progress: Callable[[str], None],
) -> None:
  """Writes `weights/` under `workdir`: every parameter of the experiment's model, by path."""
  directory = workdir / WEIGHTS
  directory.mkdir()
  write_tensors(directory, planned, max_shard_bytes=max_shard_bytes, progress=progress)
  (directory / EXPERIMENT).write_text(json.dumps(experiment.to_dict(), indent=2) + '\n')


def read_experiment(workdir: Path, step: int | None = None) -> Experiment:
  """What the run's parameters belong to. Raises CheckpointError if there are none, or none of that step."""
  workdir = Path(workdir)
  if is_imported(workdir):
    if step:
      raise CheckpointError(f'no checkpoint of step {step} in {workdir}: it was imported, and is at step 0')
    return Experiment.from_dict(read_json(workdir / WEIGHTS / EXPERIMENT))
  if not (workdir / CHECKPOINTS).is_dir():
    raise CheckpointError(f'no checkpoint: {workdir / CHECKPOINTS} is not a directory')
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    return Experiment.from_dict(checkpoints.meta(step)['config'])


def open_weights(workdir: Path, model: LlavaMiniConfig, *, verify: bool = True) -> TensorFiles:
  """The parameters of an imported run by path.

  Args:
    verify: compare every shard with its checksum, which reads it whole.
  Raises:
    CheckpointError: other parameters than the model has; lists all of them. DataError: damaged files.
  """
  files = TensorFiles(Path(workdir) / WEIGHTS)
  shapes = parameter_shapes(model)
  faults = [f'{path}: missing' for path in sorted(shapes.keys() - files.tensors.keys())]
  faults += [f'{path}: unexpected' for path in sorted(files.tensors.keys() - shapes.keys())]
  for path in sorted(shapes.keys() & files.tensors.keys()):
    expected = f'F32{list(shapes[path])}'
    if str(files.tensors[path]) != expected:
      faults.append(f'{path}: expected {expected}, found {files.tensors[path]}')
  if faults:
    raise CheckpointError(f'{files.path} does not fit its {EXPERIMENT}:\n  ' + '\n  '.join(faults))
  if verify:
    files.verify()
  return files


def load_parameters(
  workdir: Path, shardings: Mapping[str, Any], step: int | None = None, *, verify: bool = True
) -> dict[str, Any]:
  """Every parameter of a run, straight to its sharding: a process reads what its devices hold and no more.

  Args:
    shardings: NamedSharding of every parameter, nested like them.
    step: of a trained run; None = the newest.
    verify: compare the files of an imported run with their checksums first.
  Raises:
    CheckpointError, DataError: no such run, damaged, or with other parameters than `shardings` names.
  """
  workdir = Path(workdir)
  if not is_imported(workdir):
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
      return checkpoints.restore_parameters(dict(shardings), step)
  files = open_weights(workdir, read_experiment(workdir, step).model, verify=verify)
  where = flatten(shardings)
  if where.keys() != files.tensors.keys():
    missing, unexpected = sorted(where.keys() - files.tensors.keys()), sorted(files.tensors.keys() - where.keys())
    raise CheckpointError(f'{files.path}: missing {missing}, unexpected {unexpected}')
  return unflatten({path: _load(files, path, files.tensors[path].shape, where[path]) for path in where})


def starting_parameters(
  workdir: Path,
  model: LlavaMiniConfig,
  mesh: Mesh,
  step: int | None = None,
  *,
  modules: Collection[str] = MODULES,
) -> dict[str, jax.Array]:
  """What training of `model` starts from, by path: every parameter of the modules that the run in `workdir` has too.

  A vision tower without its unused last layers takes the first ones of a whole tower. A pre-fusion that the run does
  not have is copied from its decoder if `model.prefusion.init` says so; other modules that it does not have are left
  out, to stay as they are initialised. Optimizer and step are not read.

  Args:
    modules: those of the model that are wanted.
  Raises:
    CheckpointError: fields of a shared module that would make it compute something else, and its parameters that are
      missing, unexpected or misshaped; lists all of them.
  """
  stored = parameter_shapes(source := read_experiment(workdir, step).model)
  with use_mesh(mesh):
    where = flatten(nnx.to_pure_dict(nnx.get_named_sharding(abstract_model(model)[1], mesh)))
  wanted = {path: shape for path, shape in parameter_shapes(model).items() if path.split('/')[0] in modules}
  there = _modules(stored)
  origin = {path: path for path in wanted if path.split('/')[0] in there}
  if _copies_prefusion(model, there):
    copies = [path for path in wanted if path.startswith('prefusion/')]
    origin |= {path: path.replace('prefusion/', 'decoder/', 1) for path in copies}
  faults = _differences(source, model, there & _modules(wanted))
  faults += _misfits({path: wanted[path] for path in origin}, origin, stored)
  if faults:
    raise CheckpointError(f'{workdir} does not fit this model:\n  ' + '\n  '.join(faults))

  if is_imported(workdir):
    files = open_weights(workdir, source)
    return {path: _load(files, origin[path], wanted[path], where[path]) for path in origin}
  with use_mesh(mesh):
    all_shardings = nnx.to_pure_dict(nnx.get_named_sharding(abstract_model(source)[1], mesh))
  loaded = flatten(load_parameters(workdir, all_shardings, step))
  return {path: _first_layers(loaded[origin[path]], wanted[path], where[path]) for path in origin}


def describe_start(workdir: Path, model: LlavaMiniConfig, step: int | None = None) -> str:
  """Which modules `starting_parameters` takes from the run, which it leaves there, and which start anew: one line.

  Raises:
    CheckpointError: there is no such run.
  """
  there = _modules(parameter_shapes(read_experiment(workdir, step).model))
  wanted = _modules(parameter_shapes(model))
  copied = {'prefusion'} & wanted if _copies_prefusion(model, there) else set()

  def listed(modules: set[str]) -> str:
    return ', '.join(module for module in MODULES if module in modules) or 'none'

  line = (
    f'from {workdir}: loaded {listed(there & wanted)}; left out {listed(there - wanted)}; '
    f'started anew: {listed(wanted - there - copied)}'
  )
  return f'{line}; prefusion copied from the decoder' if copied else line


def _modules(paths: Iterable[str]) -> set[str]:
  return {path.split('/')[0] for path in paths}


def _copies_prefusion(model: LlavaMiniConfig, modules: set[str]) -> bool:
  return 'prefusion' not in modules and model.prefusion.init == 'decoder'


def _differences(stored: LlavaMiniConfig, wanted: LlavaMiniConfig, shared: set[str]) -> list[str]:
  """One line per field, of the modules that both have, whose values make the same parameters compute other things."""
  faults = []
  for module in (module for module in MODULES if module in shared & _MEANING.keys()):
    old, new = getattr(stored, module), getattr(wanted, module)
    fields = [(name, getattr(old, name), getattr(new, name)) for name in _MEANING[module]]
    if module == 'vision' and old.run_layers == new.run_layers:
      fields = [field for field in fields if field[0] == 'layer_norm_eps']  # the same layer, counted otherwise
    for name, a, b in fields:
      if name == 'num_heads' and {old.attention, new.attention} == {'plain'}:
        continue  # which has none
      if name != 'rope_scaling':
        faults += _difference(f'model.{module}.{name}', a, b)
      elif {a.factor, b.factor} != {1.0}:  # else it is off in both
        names = [field.name for field in dataclasses.fields(a)]
        faults += [
          line for n in names for line in _difference(f'model.{module}.{name}.{n}', getattr(a, n), getattr(b, n))
        ]
  return faults


def _difference(field: str, stored: Any, wanted: Any) -> list[str]:
  """Numbers that went through float32 somewhere are the same."""
  numbers = isinstance(stored, float) and isinstance(wanted, float)
  same = math.isclose(stored, wanted, rel_tol=1e-6) if numbers else stored == wanted
  return [] if same else [f'{field}: stored {stored!r}, wanted {wanted!r}']


def _misfits(
  wanted: Mapping[str, tuple[int, ...]], origin: Mapping[str, str], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One line for all that is wanted and not there, in its shape or with more layers where that is fine; or too much."""
  faults = []
  for path, shape in sorted(wanted.items()):
    found = stored.get(origin[path])
    # More layers than wanted are those of a tower that never run, or those of a decoder that pre-fusion copies.
    may_be_cut = path.startswith('vision/layers/') or path != origin[path]
    if found is None:
      faults.append(f'{path}: missing')
    elif found != shape and not (may_be_cut and found[1:] == shape[1:] and found[0] > shape[0]):
      faults.append(f'{path}: expected {list(shape)}, found {list(found)}')
  modules = _modules(wanted)
  # As the layers after the selected one.
  unused = {path for path in stored if path.startswith('vision/post_layernorm/')}
  extra = {path for path in stored if path.split('/')[0] in modules} - set(origin.values()) - unused
  return faults + [f'{path}: unexpected' for path in sorted(extra)]


def _load(files: TensorFiles, path: str, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
  """A parameter of `shape`: the stored one, or its first layers."""
  stored = files.read(path)
  stored = stored[: shape[0]] if stored.shape != shape else stored
  # A copy, not the mapping itself: what JAX holds may be donated and written to.
  return jax.make_array_from_callback(shape, sharding, lambda index: np.array(stored[index]))


def _first_layers(array: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
  return jax.device_put(array if array.shape == shape else array[: shape[0]], sharding)

"""Parameters of a run by path, straight to a mesh or one at a time to the host, whichever way they are stored.

Enters a run's directory: an imported run has them in `weights/`, a trained one in its checkpoints, and one that trained
LoRA adapters has these there and the rest in another run. Leaves arrays; a process reads what its devices hold, and
nothing that is not asked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.names import MODULES
from llava_mini_jax.convert.run_start import starting_paths
from llava_mini_jax.convert.run_weights import CHECKPOINTS, is_imported, newest_step, open_weights, read_experiment
from llava_mini_jax.convert.tensor_files import TensorFiles
from llava_mini_jax.sharding import make_mesh, replicated
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import CheckpointError, DamagedError, mismatches
from llava_mini_jax.train.fingerprint import fingerprint_on_host, fingerprints
from llava_mini_jax.train.lora import (
  PREFIX,
  Lora,
  abstract_adapters,
  adapted_paths,
  adapter_names,
  as_kept,
  as_kept_on_host,
  lora_of,
  merged,
  merged_on_host,
)
from llava_mini_jax.train.tree import parameter_shapes, sharded_model

Wanted = Mapping[str, jax.ShapeDtypeStruct]  # by path: shape, dtype and sharding
Meta = Mapping[str, Any]


class Parameters(Protocol):
  """The stored parameters of one run."""

  def load(self, wanted: Wanted, origin: Mapping[str, str] | None = None) -> dict[str, jax.Array]:
    """Some of them.

    Args:
      wanted: one with fewer layers than are stored is the first ones.
      origin: the path in the run of each that has another path there.
    """

  def read(self, path: str) -> np.ndarray:
    """One of them, on the host; indexing it reads no more than is indexed where that can be."""


class Imported:
  """Parameters in `weights/`."""

  def __init__(self, files: TensorFiles):
    self._files = files

  def load(self, wanted: Wanted, origin: Mapping[str, str] | None = None) -> dict[str, jax.Array]:
    return {path: self._load((origin or {}).get(path, path), leaf) for path, leaf in wanted.items()}

  def _load(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    stored = self._files.read(path)
    stored = stored[: leaf.shape[0]] if stored.shape != leaf.shape else stored
    # A copy, not the mapping itself: what JAX holds may be donated and written to.
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.array(stored[index], leaf.dtype))

  def read(self, path: str) -> np.ndarray:
    return self._files.read(path)


class Trained:
  """Parameters in a checkpoint."""

  def __init__(self, workdir: Path, step: int | None = None):
    self._directory = workdir / CHECKPOINTS
    with Checkpoints(self._directory) as checkpoints:
      self.step = checkpoints.require(step)
      self.stored = checkpoints.stored_parameters(self.step)

  def load(self, wanted: Wanted, origin: Mapping[str, str] | None = None) -> dict[str, jax.Array]:
    origin = {path: (origin or {}).get(path, path) for path in wanted}
    with Checkpoints(self._directory) as checkpoints:
      found = checkpoints.restore_parameters({origin[path]: wanted[path].sharding for path in wanted}, self.step)
    return {path: fitted(found[origin[path]], leaf, copy=path != origin[path]) for path, leaf in wanted.items()}

  def read(self, path: str) -> np.ndarray:
    with Checkpoints(self._directory) as checkpoints:
      return np.asarray(checkpoints.restore_parameters({path: replicated(host_mesh())}, self.step)[path])


class Base:
  """Another run's parameters as a model starts with them, each compared with the fingerprint that it had."""

  def __init__(
    self, source: Parameters, origin: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], meta: Meta, dtype: str
  ):
    self._source, self._origin, self._shapes, self._meta = source, origin, shapes, meta
    self._dtype = jnp.dtype(dtype)

  def load(self, wanted: Wanted) -> dict[str, jax.Array]:
    """Whole ones, under the names that the model gives them."""
    rounded = {p: jax.ShapeDtypeStruct(x.shape, self._dtype, sharding=x.sharding) for p, x in wanted.items()}
    try:
      found = self._source.load(rounded, {path: self._origin[path] for path in wanted})
    except DamagedError as error:  # not damage to the run that asks, which an older checkpoint of it would mend
      raise CheckpointError(f'the run that the adapters were trained on: {error}') from error
    self._check(fingerprints(found))
    return {path: found[path].astype(leaf.dtype) for path, leaf in wanted.items()}

  def read(self, path: str) -> np.ndarray:
    shape = self._shapes[path]
    found = self._source.read(self._origin[path])
    found = found[: shape[0]] if found.shape != shape else found
    found = found.astype(self._dtype, copy=False)
    self._check({path: fingerprint_on_host(found)})
    return found

  def _check(self, found: Mapping[str, str]) -> None:
    expected = self._meta['fingerprints']
    if other := sorted(path for path in found if found[path] != expected.get(path)):
      raise CheckpointError(
        f'{self._meta["run"]} is not what the adapters were trained on: other numbers in {", ".join(other)}'
      )


class Adapted:
  """Parameters of a run that trained LoRA adapters, merged; the checkpoint has these and what else was trained."""

  def __init__(self, trained: Trained, base: Base, shapes: Mapping[str, tuple[int, ...]], lora: Lora):
    self._trained, self._base, self._shapes, self._lora = trained, base, shapes, lora
    self._adapted = set(adapted_paths(trained.stored))

  def load(self, wanted: Wanted, origin: Mapping[str, str] | None = None) -> dict[str, jax.Array]:
    origin = {path: (origin or {}).get(path, path) for path in wanted}
    whole = {
      origin[path]: jax.ShapeDtypeStruct(self._shapes[origin[path]], leaf.dtype, sharding=leaf.sharding)
      for path, leaf in wanted.items()
    }
    stored = self._trained.stored
    found = self._trained.load({path: leaf for path, leaf in whole.items() if path in stored})
    found |= self._base.load({path: leaf for path, leaf in whole.items() if path not in stored})
    for path in sorted(self._adapted & whole.keys()):
      found[path] = as_kept(path, found[path], self._lora)
      one = dataclasses.replace(self._lora, targets=(re.escape(path),))
      adapter = self._trained.load(abstract_adapters({path: whole[path]}, one))
      add = jax.jit(merged, static_argnums=(0, 4), donate_argnums=1, out_shardings=whole[path].sharding)
      found[path] = add(path, found[path], *(adapter[name] for name in adapter_names(path)), self._lora.scale)
    return {path: fitted(found[origin[path]], leaf, copy=path != origin[path]) for path, leaf in wanted.items()}

  def read(self, path: str) -> np.ndarray:
    if path in self._trained.stored:
      return self._trained.read(path)
    base = as_kept_on_host(path, self._base.read(path), self._lora)
    if path not in self._adapted:
      return base
    a, b = map(self._trained.read, adapter_names(path))
    return merged_on_host(path, base, a, b, self._lora.scale)


def fitted(array: jax.Array, leaf: jax.ShapeDtypeStruct, *, copy: bool) -> jax.Array:
  """The array, or its first layers, as `leaf` says; a buffer of its own if `copy`."""
  if array.shape != leaf.shape:
    array, copy = array[: leaf.shape[0]], False
  array = jax.device_put(array.astype(leaf.dtype), leaf.sharding)
  return jnp.copy(array) if copy else array


def host_mesh() -> Mesh:
  """The host's memory, whatever accelerator there is."""
  return make_mesh((1, 1, 1), devices=jax.local_devices(backend='cpu')[:1])


def open_parameters(workdir: str | Path, step: int | None = None, *, base: str = '', verify: bool = True) -> Parameters:
  """The parameters of a run, none of which is read yet.

  Args:
    step: of a trained run; None = the newest.
    base: where the run is now that adapters were trained on; '' = where it was then.
    verify: compare the files of an imported run with their checksums first.
  Raises:
    CheckpointError, DataError: no such run, damaged, or with other parameters than its model has.
  """
  workdir = Path(workdir)
  step = newest_step(workdir) if step is None else step
  experiment = read_experiment(workdir, step)
  model, lora = experiment.model, lora_of(experiment.train)
  if is_imported(workdir):
    return Imported(open_weights(workdir, model, verify=verify))
  trained, shapes = Trained(workdir, step), parameter_shapes(model)
  wanted = {path: str(list(shape)) for path, shape in shapes.items()}
  found = {path: str(list(leaf.shape)) for path, leaf in trained.stored.items() if not path.startswith(PREFIX)}
  if lora:  # what is not stored is in the base
    found |= {path: wanted[path] for path in wanted.keys() - found.keys()}
  if faults := mismatches(wanted, found):
    raise CheckpointError(f'{workdir / CHECKPOINTS}/{step} does not fit its model:\n  ' + '\n  '.join(faults))
  if not lora:
    return trained
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    meta = checkpoints.meta(step)['base']
  meta |= {'run': base} if base else {}
  return Adapted(trained, open_base(model, meta, experiment.train.param_dtype), shapes, lora)


def open_base(model: LlavaMiniConfig, meta: Meta, dtype: str) -> Base:
  """What adapters for `model` were trained on.

  Args:
    meta: {run: its directory, step: of a trained run, else None, fingerprints: by path}.
    dtype: that it was trained in; fingerprints are of that.
  Raises:
    CheckpointError: there is no such run, or it has another model.
  """
  run, step = meta['run'], meta['step']
  try:
    origin = starting_paths(Path(run), read_experiment(Path(run), step).model, model)
    return Base(open_parameters(run, step), origin, parameter_shapes(model), meta, dtype)
  except CheckpointError as error:
    raise CheckpointError(f'the run that the adapters were trained on: {error}') from None


def starting_parameters(
  workdir: str | Path,
  model: LlavaMiniConfig,
  mesh: Mesh,
  step: int | None = None,
  dtype: str = 'float32',
  *,
  modules: Collection[str] = MODULES,
  each: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
  """What training of `model` starts from, by path; see `run_start.starting_paths`. Optimizer and step are not read.

  Args:
    modules: those of the model that are wanted.
    each: makes of a path and its array what is returned; then they are read one by one.
  Raises:
    CheckpointError: as `starting_paths` and `open_parameters`. DataError: damaged files.
  """
  workdir = Path(workdir)
  origin = starting_paths(workdir, read_experiment(workdir, step).model, model, modules)
  _, leaves = sharded_model(model, mesh, jnp.dtype(dtype))
  source = open_parameters(workdir, step)
  if each is None:
    return source.load({path: leaves[path] for path in origin}, origin)
  return {path: each(path, source.load({path: leaves[path]}, origin)[path]) for path in origin}

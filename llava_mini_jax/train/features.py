"""The frozen tower of a run, run over its data once (`data/features`), and the checks that let a run skip it.

Enters: an experiment, whose `train.init_from` has the tower and whose `data` section names records and image settings.
Leaves: features for `data.features` of this run, and of any other with the same tower, records and settings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.config import ConfigError, VisionConfig, require_choice
from llava_mini_jax.convert.run_parameters import starting_parameters
from llava_mini_jax.data import feature_writer
from llava_mini_jax.data.features import DTYPES, Features, Layout, MixedFeatures, check_same, directory_of, settings_of
from llava_mini_jax.data.inputs import media_processor
from llava_mini_jax.data.mixture import parse
from llava_mini_jax.data.records import Split, open_split
from llava_mini_jax.experiment import DataConfig, Experiment
from llava_mini_jax.models.vision import VisionTower
from llava_mini_jax.sharding import batch_sharding, check_batch, make_mesh, replicated, use_mesh
from llava_mini_jax.train.lora import PREFIX
from llava_mini_jax.train.step import Trainer
from llava_mini_jax.train.tree import flatten, unflatten

Progress = Callable[[int], object]


def check_experiment(experiment: Experiment, trainer: Trainer) -> None:
  """Raises ConfigError for a run with features that trains the tower they come from."""
  training = [path for path in flatten(trainer.abstract['params']) if path.removeprefix(PREFIX).startswith('vision/')]
  if experiment.data.features:
    check_reads(experiment)
  if experiment.data.features and training:
    raise ConfigError(
      f'data.features: expected train.groups that freeze the vision tower; found {training[0]} training'
    )


def check_reads(experiment: Experiment) -> None:
  """Raises ConfigError for a compressor that reads more of the tower than the features, which are what is stored."""
  model = experiment.model
  if model.compressor_reads('layers') or model.compressor_reads('class_attention'):
    name = model.compressor.kind
    raise ConfigError(f'data.features: expected a compressor that reads the selected layer alone; found {name}')


def check_tower(features: Features | MixedFeatures | None, experiment: Experiment, trainer: Trainer, frozen) -> None:
  """Raises ConfigError if features do not come from the tower among a run's `frozen` parameters."""
  if features is not None:
    found = tower_fingerprint(experiment.model.vision, frozen['vision'], trainer.mesh)
    check_same(features.directory, dict(tower=(found, features.layout.tower)))


def tower_fingerprint(config: VisionConfig, parameters: Mapping[str, Any], mesh: Mesh) -> str:
  """sha256 of what decides a tower's features: its parameters, those of layers that never run apart.

  Args:
    parameters: of the tower, nested, as a run holds them, sharded over `mesh` in any way.
  """
  everywhere = jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(parameters).items()):
    if path.startswith('post_layernorm/'):
      continue
    if path.startswith('layers/'):
      leaf = leaf[: config.run_layers]
    digest.update(f'{path} {leaf.shape}\n'.encode())
    digest.update(np.asarray(everywhere(leaf), '<f4').tobytes())
  return digest.hexdigest()


def feature_sources(data: DataConfig) -> list[Split]:
  """The splits that a run reads, each once; of a mixture whole ones, whatever its rules keep."""
  named = (
    [(part.directory, part.split) for part in parse(data.mixture)] if data.mixture else [(data.dataset, data.split)]
  )
  splits = {(found := open_split(*name)).fingerprint: found for name in named}
  return list(splits.values())


def write_features(
  experiment: Experiment,
  root: Path,
  *,
  dtype: str = 'bfloat16',
  batch_size: int = 64,
  shard_index: int = 0,
  shard_count: int = 1,
  threads: int = 4,
  report: Callable[[str], object] = lambda line: None,
  progress: Callable[[Split, int], Progress] = lambda split, records: lambda finished: None,
) -> int:
  """Writes the features of an experiment's records, or this process's share of them; goes on where it was killed.

  Args:
    root: `data.features` of the runs to come.
    dtype: to store; bfloat16 holds what a bfloat16 model computes exactly, and rounds what a float32 one does.
    batch_size: visuals at a time, over the devices of this process.
    shard_index, shard_count: this process and how many there are; each uses its own devices alone.
    threads: that decode images.
    report: gets the size of what is going to be written, before anything is.
    progress: split and its records in this process's files -> what is called with numbers of finished records.
  Returns:
    Visuals encoded now.
  Raises:
    ConfigError: no tower to take; features there that were made otherwise. MeshError: a batch that does not divide.
    CheckpointError, DataError: as `starting_parameters`, `open_split` and `feature_writer.write_files`.
  """
  require_choice('features_dtype', dtype, DTYPES)
  if not 0 <= shard_index < shard_count:
    raise ConfigError(f'shard: expected I/N with I from 0 to N - 1; found {shard_index}/{shard_count}')
  if not experiment.train.init_from:
    raise ConfigError('train.init_from: expected the run whose vision tower makes the features; found none')
  check_reads(experiment)
  model, processor = experiment.model, media_processor(experiment.data, experiment.model)
  sources = feature_sources(experiment.data)
  mesh = make_mesh((-1, 1, 1), jax.local_devices())
  check_batch(batch_size, mesh)
  loaded = starting_parameters(
    Path(experiment.train.init_from), model, mesh, dtype=experiment.train.param_dtype, modules={'vision'}
  )
  tower = unflatten(loaded)['vision']
  fingerprint = tower_fingerprint(model.vision, tower, mesh)
  encode = _encoder(experiment, tower, mesh, dtype)
  visuals = 0
  for source in sources:
    layout = Layout(
      dataset=source.fingerprint,
      records=len(source),
      tower=fingerprint,
      settings=settings_of(experiment.data, model),
      dtype=dtype,
      shape=(processor.images.views, model.vision.num_patches, model.vision.hidden_size),
      records_per_file=1,
      visuals_per_batch=batch_size,
    )
    found = feature_writer.estimate(source, processor)
    report(f'{source.directory}:{source.name}: {found.describe(layout)}')
    layout = feature_writer.write_header(directory_of(root, source), feature_writer.with_file_size(layout, found))
    check_batch(layout.visuals_per_batch, mesh)  # that of who came first
    files = range(shard_index, layout.files, shard_count)
    visuals += feature_writer.write_files(
      directory_of(root, source),
      layout,
      source,
      processor,
      encode,
      files=files,
      threads=threads,
      progress=progress(source, sum(len(layout.indices(file)) for file in files)),
    )
  return visuals


def _encoder(experiment: Experiment, parameters: dict[str, Any], mesh: Mesh, dtype: str) -> feature_writer.Encode:
  """uint8[n V height width 3] -> [n V P W] of `dtype`, rows over the devices."""
  model = experiment.model

  def build(key: jax.Array) -> VisionTower:
    return VisionTower(model.vision, scan=model.scan, rngs=nnx.Rngs(key))

  graphdef, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
  rows = batch_sharding(mesh)

  @functools.partial(jax.jit, out_shardings=rows)
  def run(parameters, pixels):
    count, views = pixels.shape[:2]
    features = nnx.merge(graphdef, parameters)(pixels.reshape(count * views, *pixels.shape[2:]), jnp.dtype(model.dtype))
    return features.reshape(count, views, *features.shape[1:]).astype(dtype)

  def encode(pixels: np.ndarray) -> jax.Array:
    with use_mesh(mesh):
      return run(parameters, jax.device_put(pixels, rows))

  return encode

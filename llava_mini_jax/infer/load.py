"""A trained or imported run, ready to answer: its experiment, tokenizer and parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.convert.run_weights import is_imported, load_parameters, read_experiment
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import check_parameter, use_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import CheckpointError
from llava_mini_jax.train.tree import abstract_model, flatten


@dataclasses.dataclass(frozen=True)
class Loaded:
  experiment: Experiment
  tokenizer: transformers.PreTrainedTokenizerFast
  graphdef: nnx.GraphDef
  params: dict[str, Any]  # nested; sharded over `mesh`
  mesh: Mesh
  step: int


def load_run(workdir: Path, mesh: Mesh, step: int | None = None) -> Loaded:
  """Reads what `train.loop.train` or `launch/convert.py import` left in `workdir`.

  Args:
    step: of a trained run; None = the newest. An imported run is at step 0.
  Raises:
    CheckpointError: there is no checkpoint, or it has other parameters than its config says.
    DataError: the tokenizer is missing, or imported weights are damaged. MeshError: a parameter does not divide.
  """
  workdir = Path(workdir)
  if step is None and not is_imported(workdir):
    step = _newest(workdir)
  experiment = read_experiment(workdir, step)
  with use_mesh(mesh):
    graphdef, abstract = abstract_model(experiment.model)
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(abstract, mesh))
  where = flatten(shardings)
  for path, leaf in flatten(nnx.to_pure_dict(abstract)).items():
    check_parameter(path, leaf.shape, where[path])
  params = load_parameters(workdir, shardings, step)
  return Loaded(experiment, load_tokenizer(workdir / 'tokenizer'), graphdef, params, mesh, step or 0)


def _newest(workdir: Path) -> int | None:
  """Looked up once: a run that goes on may save another between two looks."""
  directory = workdir / 'checkpoints'
  if not directory.is_dir():
    raise CheckpointError(f'no checkpoint: {directory} is not a directory')
  with Checkpoints(directory) as checkpoints:
    return checkpoints.latest_step

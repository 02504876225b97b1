"""A trained run, ready to answer: its experiment, tokenizer and parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import use_mesh
from llava_mini_jax.train.checkpoint import CheckpointError, Checkpoints
from llava_mini_jax.train.tree import abstract_model


@dataclasses.dataclass(frozen=True)
class Loaded:
  experiment: Experiment
  tokenizer: transformers.PreTrainedTokenizerFast
  graphdef: nnx.GraphDef
  params: dict[str, Any]  # nested; sharded over `mesh`
  mesh: Mesh
  step: int


def load_run(workdir: Path, mesh: Mesh, step: int | None = None) -> Loaded:
  """Reads what `train.loop.train` left in `workdir`; the newest checkpoint unless `step` names another.

  Raises:
    CheckpointError: there is no checkpoint, or it has other parameters than its config says.
    DataError: the tokenizer is missing.
  """
  directory = Path(workdir) / 'checkpoints'
  if not directory.is_dir():
    raise CheckpointError(f'no checkpoint: {directory} is not a directory')
  with Checkpoints(directory) as checkpoints:
    experiment = Experiment.from_dict(checkpoints.meta(step)['config'])
    with use_mesh(mesh):
      graphdef, abstract = abstract_model(experiment.model)
      shardings = nnx.to_pure_dict(nnx.get_named_sharding(abstract, mesh))
    params = checkpoints.restore_parameters(shardings, step)
    step = checkpoints.latest_step if step is None else step
  return Loaded(experiment, load_tokenizer(Path(workdir) / 'tokenizer'), graphdef, params, mesh, step)

"""A run on disk: what it was made of, and the files of an imported one.

An imported run is a directory with `tokenizer/` and `weights/`: safetensors shards whose tensors are our parameters,
float32, under their paths, with `experiment.json` and SHA256SUMS. It is not an Orbax checkpoint because Orbax takes
whole arrays, so that writing one would need the model in memory; a shard is written layer by layer, and every device
reads its own slice of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.tensor_files import CHECKSUMS, TensorFiles, read_json
from llava_mini_jax.convert.tensor_writer import Planned, write_tensors
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import CheckpointError, mismatches
from llava_mini_jax.train.stored import StoredCheckpoints
from llava_mini_jax.train.tree import parameter_shapes

WEIGHTS, EXPERIMENT, CHECKPOINTS = 'weights', 'experiment.json', 'checkpoints'


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


def newest_step(workdir: str | Path) -> int | None:
  """Of a trained run; None for an imported one. Looked up once: a run that goes on may save another between two looks.

  Raises:
    CheckpointError: there is none.
  """
  directory = Path(workdir) / CHECKPOINTS
  if is_imported(workdir):
    return None
  if not directory.is_dir():
    raise CheckpointError(f'no checkpoint: {directory} is not a directory')
  with Checkpoints(directory) as checkpoints:
    step = checkpoints.require()
  if jax.process_count() > 1:  # each may see another as the newest
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
  return step


def weights_fingerprint(workdir: str | Path, step: int | None = None) -> str:
  """sha256 that says which weights a run holds, imported or of a step of its training; none of them is read.

  Args:
    step: None = the newest.
  Raises:
    CheckpointError: there are none, or what is stored beside them is damaged or missing.
  """
  if not is_imported(workdir):
    return StoredCheckpoints(Path(workdir) / CHECKPOINTS).checksum(step)
  files = [Path(workdir) / WEIGHTS / name for name in (CHECKSUMS, EXPERIMENT)]
  if missing := [str(file) for file in files if not file.is_file()]:
    raise CheckpointError(f'{workdir}: expected what import wrote; found no {" and no ".join(missing)}')
  return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()


def open_weights(workdir: Path, model: LlavaMiniConfig, *, verify: bool = True) -> TensorFiles:
  """The parameters of an imported run by path.

  Args:
    verify: compare every shard with its checksum, which reads it whole.
  Raises:
    CheckpointError: other parameters than the model has; lists all of them. DataError: damaged files.
  """
  files = TensorFiles(Path(workdir) / WEIGHTS)
  wanted = {path: f'F32{list(shape)}' for path, shape in parameter_shapes(model).items()}
  if faults := mismatches(wanted, {path: str(stored) for path, stored in files.tensors.items()}):
    raise CheckpointError(f'{files.path} does not fit its {EXPERIMENT}:\n  ' + '\n  '.join(faults))
  if verify:
    files.verify()
  return files

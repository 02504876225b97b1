"""A trained or imported run, ready to answer: its experiment, tokenizer and parameters."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.config import QUANTIZED, ConfigError, require_choice
from llava_mini_jax.convert.run_parameters import open_parameters
from llava_mini_jax.convert.run_weights import newest_step, read_experiment
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.experiment import Experiment, read_change
from llava_mini_jax.train.lora import in_few_bits
from llava_mini_jax.train.tree import sharded_model, unflatten

# What a run can be asked with that it was not trained with: fields that neither add nor reshape a parameter.
CHANGEABLE = (
  'data.aspect',
  'data.default_system',
  'data.frame_resize',
  'data.grid',
  'data.grid_order',
  'data.template',
  'data.video_fps',
  'data.video_frames',
  'data.video_max_frames',
  'data.video_rule',
  'model.compressor.keep',  # of mqt, which serves any number of tokens
  'model.dtype',
  'model.visual_chunk',
  'train.init_from',  # of a run with adapters, whose base may have moved
)

_QUANTIZABLE = r'(decoder|prefusion)/layers/.*_proj'  # where nearly all parameters are
_IN_FLOAT32 = ('weight', 'bias', 'pos_embed')  # computed with in float32: norms, and positions that are resized


@dataclasses.dataclass(frozen=True)
class Loaded:
  experiment: Experiment
  tokenizer: transformers.PreTrainedTokenizerFast
  graphdef: nnx.GraphDef
  params: dict[str, Any]  # nested; sharded over `mesh`
  mesh: Mesh
  step: int
  changes: tuple[str, ...] = ()  # `section.field=value`, where `experiment` is not what the run was trained with


def load_run(
  workdir: Path,
  mesh: Mesh,
  step: int | None = None,
  changes: Sequence[str] = (),
  *,
  slim: bool = False,
  quantize: str = '',
) -> Loaded:
  """Reads what `train.loop.train` or `launch/convert.py import` left in `workdir`.

  Args:
    step: of a trained run; None = the newest. An imported run is at step 0.
    changes: `section.field=value` each, of CHANGEABLE fields; see `change_experiment`.
    slim: keep parameters in `model.dtype` where they are computed with in that; the answers are the same to the bit.
    quantize: one of `config.QUANTIZED`: kernels of decoder and pre-fusion are kept in so few bits; '' = none.
  Raises:
    ConfigError: a change that cannot be, another `quantize`.
    CheckpointError: there is no checkpoint, or it has other parameters than its config says.
    DataError: the tokenizer is missing, or imported weights are damaged. MeshError: a parameter does not divide.
  """
  workdir = Path(workdir)
  step = newest_step(workdir) if step is None else step
  experiment = change_experiment(read_experiment(workdir, step), changes)
  if quantize:
    require_choice('quantize', quantize, QUANTIZED)
  graphdef, leaves = sharded_model(experiment.model, mesh)
  stored = open_parameters(workdir, step, base=experiment.train.init_from)
  if not (slim or quantize):
    params = stored.load(leaves)
  else:  # one by one: all of them may not fit
    dtype = jnp.dtype(experiment.model.dtype if slim else 'float32')
    params = {path: slimmed(path, stored.load({path: leaf})[path], dtype, quantize) for path, leaf in leaves.items()}
  tokenizer = load_tokenizer(workdir / 'tokenizer')
  return Loaded(experiment, tokenizer, graphdef, unflatten(params), mesh, step or 0, tuple(changes))


def slimmed(path: str, parameter: jax.Array, dtype: jnp.dtype, quantize: str = '') -> Any:
  """A parameter as it is kept: in few bits, in the dtype that it is computed with, or as it is."""
  if quantize and re.fullmatch(_QUANTIZABLE, path):
    return in_few_bits(path, parameter, quantize)
  return parameter if path.rpartition('/')[2] in _IN_FLOAT32 else parameter.astype(dtype)


def change_experiment(experiment: Experiment, changes: Sequence[str]) -> Experiment:
  """The experiment with other fields of CHANGEABLE, each `section.field=value`; of one named twice the last counts.

  A value is a Python literal, else text: `data.grid=2`, `data.default_system=False`, `data.template=qa`.

  Raises ConfigError: not of that form, a field that is not of CHANGEABLE, or a value that it cannot have.
  """
  values = experiment.to_dict()
  for change in changes:
    name, value = read_change(change, 'set')
    require_choice('set', name, CHANGEABLE)
    if name == 'train.init_from' and not experiment.train.lora_rank:
      raise ConfigError('set: train.init_from is read for runs with LoRA adapters alone; this one holds all parameters')
    *sections, field = name.split('.')
    functools.reduce(dict.__getitem__, sections, values)[field] = value
  return Experiment.from_dict(values)

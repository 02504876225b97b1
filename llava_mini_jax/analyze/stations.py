"""Which components of a model an experiment trains, from its table of groups alone."""

from __future__ import annotations

from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.lora import adapter_names, target_paths
from llava_mini_jax.train.optimizer import assign_groups
from llava_mini_jax.train.tree import parameter_shapes


def trained_stations(experiment: Experiment) -> dict[str, set[str]]:
  """`trains` and `adapts` of `flops.training_flops`; text embeddings alone do not make a decoder that trains."""
  paths, train = list(parameter_shapes(experiment.model)), experiment.train
  adapted = target_paths(paths, train.lora_targets)
  adapters = [name for path in adapted for name in adapter_names(path)]
  rates = assign_groups([*paths, *adapters], train.groups)
  own = [path for path in paths if rates[path] is not None and path != 'decoder/embed_tokens']
  return {name: {path.split('/')[0] for path in of} for name, of in (('trains', own), ('adapts', adapted))}

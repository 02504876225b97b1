"""A run → the Hugging Face layout of the released LLaVA-Mini: config.json, safetensors shards, tokenizer.

The parameters of an imported run are read layer by layer, those of a trained run one at a time (all layers of a
projection are one), so the largest of them is what is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.config import ConfigError, require_choice
from llava_mini_jax.convert.hf_checkpoint import CONFIG, VISION_CONFIG
from llava_mini_jax.convert.hf_config import preprocessor_config, to_hf_config
from llava_mini_jax.convert.names import LLAVA, RELEASED, Rule, to_torch, wanted_tensors
from llava_mini_jax.convert.run_parameters import open_parameters
from llava_mini_jax.convert.run_weights import read_experiment
from llava_mini_jax.convert.tensor_files import FLOATS
from llava_mini_jax.convert.tensor_writer import Planned, new_directory, parse_size, write_tensors
from llava_mini_jax.convert.tokenizer_copy import copy_tokenizer
from llava_mini_jax.train.tree import parameter_shapes

DTYPES = {'float32': FLOATS['F32'], 'bfloat16': FLOATS['BF16']}


def export_model(
  workdir: str | Path,
  to: str | Path,
  *,
  step: int | None = None,
  dtype: str = 'float32',
  max_shard_size: str = '5GB',
  merge_lora: bool = False,
  base: str = '',
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Writes the directory `to`, which must not exist or be empty; it takes its name only when it is complete.

  Args:
    step: of a trained run; None = the newest.
    dtype: float32 (nothing is lost) or bfloat16 (rounded to the nearest).
    merge_lora: add the adapters of a run that trained some to its kernels.
    base: where the run is now that they were trained on; '' = where it was then.
    progress: told each tensor's name before it is written.
  Returns:
    What config.json says.
  Raises:
    ConfigError: a model that the released package cannot compute; adapters and no `merge_lora`, or the reverse.
    CheckpointError, DataError: no such run, damaged.
  """
  require_choice('dtype', dtype, tuple(DTYPES))
  if not str(workdir):
    raise ConfigError('expected --from, the directory of a run; found none')
  shard_bytes, workdir = parse_size(max_shard_size), Path(workdir)
  experiment = read_experiment(workdir, step)
  model, train = experiment.model, experiment.train
  if bool(train.lora_rank) != merge_lora:
    adapters = f'LoRA adapters for {train.init_from}: --merge_lora adds them to it'
    raise ConfigError(f'{workdir} has {adapters if train.lora_rank else "no LoRA adapters"}')
  config, vision = to_hf_config(model, dtype, experiment.data)
  rules = (RELEASED if model.compressor.kind == 'query' else LLAVA).rules()
  planned = _planned(open_parameters(workdir, step, base=base).read, rules, parameter_shapes(model), DTYPES[dtype])
  with new_directory(Path(to)) as directory:
    words = copy_tokenizer(workdir / 'tokenizer', directory)
    config |= {name: getattr(words, name) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    for name, values in (
      (CONFIG, config),
      (VISION_CONFIG, vision),
      ('preprocessor_config.json', preprocessor_config(model.vision)),
    ):
      (directory / name).write_text(json.dumps(values, indent=2) + '\n')
    write_tensors(directory, planned, max_shard_bytes=shard_bytes, progress=progress)
  return config


def _planned(
  read: Callable[[str], np.ndarray],
  rules: Mapping[str, Rule],
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype,
) -> list[Planned]:
  """One tensor per layer; the layers of a parameter, and the thirds of a packed tensor, one after the other."""
  sources: dict[str, list[tuple[int, str, int | None]]] = {}
  for path, shape in sorted(shapes.items()):
    rule = rules[path]
    for layer in range(shape[0]) if rule.stacked else [None]:
      sources.setdefault(rule.name.format(i=layer), []).append((rule.part or 0, path, layer))
  held: dict[str, np.ndarray] = {}

  def pieces(name: str) -> Iterable[np.ndarray]:
    for _, path, layer in sorted(sources[name]):
      if path not in held:
        held.clear()
        held[path] = read(path)
      array = held[path]
      yield to_torch(array if layer is None else array[layer], rules[path])

  wanted = wanted_tensors(rules, shapes)
  return [Planned(name, wanted[name], dtype, lambda name=name: pieces(name)) for name in sources]

"""Hugging Face checkpoints → a run directory that asks, evaluates and trains like one of our own.

Enters one checkpoint, or one per module; leaves `weights/` (see `run_weights`) and `tokenizer/`. Sources in float16,
bfloat16 and float32 become float32 masters, which holds each of them exactly; integers are refused. A tensor is in
memory only while it is written, so the peak is that of the largest one (of one layer, where they are stacked).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import transformers
from flax import nnx

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.convert.hf_checkpoint import HfCheckpoint, open_checkpoint
from llava_mini_jax.convert.names import MODULES
from llava_mini_jax.convert.run_weights import write_run
from llava_mini_jax.convert.tensor_writer import Planned, new_directory, parse_size
from llava_mini_jax.convert.tokenizer_copy import copy_tokenizer
from llava_mini_jax.data.conversation import load_template
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.models.compressors.query import QueryCompressor
from llava_mini_jax.models.layers import LlamaLayer
from llava_mini_jax.models.projector import Projector
from llava_mini_jax.train.checkpoint import CheckpointError
from llava_mini_jax.train.tree import flatten, parameter_shapes

_RANDOM, _DECODER = 'random', 'decoder'
_LAYERS = 'layers/'  # what the paths of stacked parameters begin with, within their module
_TEMPLATES = {'<|im_start|>': 'chatml', '<|start_header_id|>': 'llama_3_1'}  # a token that only its models have


@dataclasses.dataclass(frozen=True)
class Sources:
  """Where each module comes from. `whole` gives all it has; the others replace a module of it, or do without it.

  compressor_grid, prefusion_layers, prefusion_init: of the modules that are made new when there is no `whole`.
  """

  whole: str = ''
  vision: str = ''
  decoder: str = ''
  projector: str = ''
  compressor_grid: int = 1
  prefusion_layers: int = 4
  prefusion_init: str = _RANDOM
  seed: int = 0


def import_model(
  sources: Sources,
  to: str | Path,
  *,
  tokenizer: str = '',
  template: str = '',
  max_shard_size: str = '5GB',
  progress: Callable[[str], None] = lambda _: None,
) -> Experiment:
  """Writes the run directory `to`, which must not exist or be empty; it takes its name only when it is complete.

  Args:
    tokenizer: HF directory; '' = the one beside the decoder's weights.
    template: of conversations; '' = the one stored in an export of ours, else the one whose special tokens the
      tokenizer has, else vicuna_v1.
    progress: told each parameter's path before it is written.
  Returns:
    The experiment stored with the weights: its model is what the checkpoints say.
  Raises:
    CheckpointError: tensors that are missing, unexpected, misshaped or of another dtype, all of them at once.
    DataError, ConfigError: see `hf_checkpoint.open_checkpoint`; no tokenizer or template; not enough sources.
  """
  shard_bytes = parse_size(max_shard_size)
  whole, origins = _open(sources)
  model = _model(whole, origins, sources)
  shapes = parameter_shapes(model)
  _check(origins, shapes)
  planned = [
    Planned(path, shape, np.dtype(np.float32), _pieces(origins, model, sources.seed, path, shape))
    for path, shape in sorted(shapes.items())
  ]
  for origin in _checkpoints(origins):
    origin.files.verify()
  with new_directory(Path(to)) as directory:
    words = copy_tokenizer(Path(tokenizer or origins['decoder'].files.path), directory / 'tokenizer')
    if len(words) > model.decoder.vocab_size:
      raise ConfigError(f'tokenizer: expected at most {model.decoder.vocab_size} tokens; found {len(words)}')
    experiment = Experiment(model, _data(whole, words, template), TrainConfig())
    write_run(directory, experiment, planned, max_shard_bytes=shard_bytes, progress=progress)
  return experiment


def _data(whole: HfCheckpoint | None, words: transformers.PreTrainedTokenizerFast, template: str) -> DataConfig:
  """How a whole model's samples are laid out; the template given, else stored, else that of the special tokens."""
  stored = dict(whole.parts.data) if whole else {}
  special = next((name for token, name in _TEMPLATES.items() if token in words.get_vocab()), 'vicuna_v1')
  data = DataConfig(**{'template': special, **stored, **({'template': template} if template else {})})
  load_template(data.template)
  return data


def describe(experiment: Experiment) -> str:
  """The imported model in one line."""
  model = experiment.model
  count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
  return (
    f'{count:,} parameters; {model.tokens_per_visual} vision token(s) per image; {model.prefusion.num_layers} '
    f'pre-fusion layers; template {experiment.data.template}'
  )


def _open(sources: Sources) -> tuple[HfCheckpoint | None, dict[str, HfCheckpoint | str]]:
  """The whole, and module -> where it comes from: a checkpoint, or how it is made. Absent modules stay absent."""
  whole = open_checkpoint(sources.whole) if sources.whole else None
  origins: dict[str, HfCheckpoint | str] = dict.fromkeys(whole.modules, whole) if whole else {}
  for module in ('vision', 'decoder', 'projector'):
    if path := getattr(sources, module):
      checkpoint = open_checkpoint(path)
      if module not in checkpoint.modules:
        raise DataError('E_FAMILY', str(path), f'expected a {module}; found {", ".join(checkpoint.modules)}')
      origins[module] = checkpoint
  if whole is None:
    origins.setdefault('projector', _RANDOM)
    origins['compressor'] = _RANDOM
    if sources.prefusion_layers:
      origins['prefusion'] = sources.prefusion_init
  if missing := [f'--{module}' for module in ('vision', 'decoder', 'projector') if module not in origins]:
    there = f'{whole} has only {", ".join(whole.modules)}' if whole else 'without --from they are needed'
    raise ConfigError(f'expected {" and ".join(missing)}: {there}')
  return whole, origins


def _model(whole: HfCheckpoint | None, origins: Mapping[str, HfCheckpoint | str], sources: Sources) -> LlavaMiniConfig:
  vision, decoder = origins['vision'], origins['decoder']
  for module, checkpoint in (('vision', vision), ('decoder', decoder)):
    if getattr(checkpoint.parts, module) is None:
      raise ConfigError(f'{checkpoint}: its config does not describe the {module} in it; give --{module}')
  tower = dataclasses.replace(vision.parts.vision, keep_unused_layers=vision.keeps_unused_layers)
  if whole:
    tower = dataclasses.replace(tower, select_layer=whole.parts.select_layer)
    compressor = whole.parts.compressor or CompressorConfig(kind='none')
    prefusion = whole.parts.prefusion or PrefusionConfig(num_layers=0)
  else:
    compressor = CompressorConfig(grid=sources.compressor_grid)
    prefusion = PrefusionConfig(num_layers=sources.prefusion_layers, init=sources.prefusion_init)
  return LlavaMiniConfig(vision=tower, compressor=compressor, prefusion=prefusion, decoder=decoder.parts.decoder)


def _checkpoints(origins: Mapping[str, HfCheckpoint | str]) -> list[HfCheckpoint]:
  found = {id(origin): origin for origin in origins.values() if isinstance(origin, HfCheckpoint)}
  return list(found.values())


def _check(origins: Mapping[str, HfCheckpoint | str], shapes: Mapping[str, tuple[int, ...]]) -> None:
  lines = []
  for checkpoint in _checkpoints(origins):
    mine = {path: shape for path, shape in shapes.items() if origins[path.split('/')[0]] is checkpoint}
    if faults := checkpoint.faults(mine):
      lines += [f'{checkpoint} does not fit its config:', *(f'  {fault}' for fault in faults)]
  if lines:
    raise CheckpointError('\n'.join(lines))


def _drawn(model: LlavaMiniConfig, seed: int, path: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
  """A parameter initialised at random, layer by layer if it is stacked; the compiler drops the rest of its module."""
  module, name = path.split('/', 1)
  stacked = name.startswith(_LAYERS)

  def build(key: jax.Array) -> jax.Array:
    rngs = nnx.Rngs(key)
    if module == 'compressor':
      made = QueryCompressor(model, rngs=rngs)
    elif module == 'prefusion':
      made = LlamaLayer(model.decoder, rngs=rngs)
    else:
      made = Projector(model.vision.hidden_size, model.decoder.hidden_size, rngs=rngs)
    return flatten(nnx.to_pure_dict(nnx.state(made)))[name.removeprefix(_LAYERS)]

  # On the host, whatever accelerator there is; optimising would take longer than it runs.
  host = jax.local_devices(backend='cpu')[0]
  draw = jax.jit(build, compiler_options=dict(xla_backend_optimization_level=0))
  with jax.default_device(host):
    key = jax.random.fold_in(jax.random.key(seed), MODULES.index(module))
    keys = jax.random.split(nnx.Rngs(key).params(), shape[0]) if stacked else [key]
  for key in keys:
    with jax.default_device(host):
      drawn = draw(key)
    yield np.asarray(drawn)


def _pieces(
  origins: Mapping[str, HfCheckpoint | str], model: LlavaMiniConfig, seed: int, path: str, shape: tuple[int, ...]
) -> Callable[[], Iterable[np.ndarray]]:
  origin = origins[path.split('/')[0]]
  if isinstance(origin, HfCheckpoint):
    return lambda: origin.layers(path, shape)
  if origin == _DECODER:
    return lambda: origins['decoder'].layers(path.replace('prefusion/', 'decoder/', 1), shape)
  return lambda: _drawn(model, seed, path, shape)

"""Memory and time of the commands that move checkpoints, on a checkpoint generated as large as asked for.

Every command runs in a process of its own; what is reported is the peak that Linux saw of it: `resident` counts mapped
files (which the system takes back when it needs the room), `anonymous` is what the process itself holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import transformers

from llava_mini_jax.config import LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.convert.hf_checkpoint import CONFIG
from llava_mini_jax.convert.names import CLIP, LLAMA, Names, wanted_tensors
from llava_mini_jax.convert.run_weights import CHECKPOINTS, read_experiment
from llava_mini_jax.convert.tensor_writer import Planned, write_tensors
from llava_mini_jax.data.tokenizer import save_tokenizer, train_tokenizer
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.presets import PRESETS
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.tree import parameter_shapes, unflatten

_POLL_SECONDS = 0.1
_SHARDS = '--max_shard_size=2GB'


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one command. MiB, seconds."""

  command: str
  seconds: float
  resident: float
  anonymous: float


def _model(layers: int) -> LlavaMiniConfig:
  """Vicuna-7B's width, so many layers of the decoder, and 3 of the tower."""
  model = PRESETS['vicuna_7b']()
  return dataclasses.replace(
    model,
    vision=dataclasses.replace(model.vision, num_hidden_layers=3, keep_unused_layers=True),
    decoder=dataclasses.replace(model.decoder, num_hidden_layers=layers),
  )


def generate(directory: Path, layers: int) -> None:
  """A Llama of Vicuna-7B's width and so many layers in `directory/llama`, and a tower of 3 layers in `directory/clip`.

  Both float16 with random weights, in shards of at most 1 GB, written tensor by tensor.
  """
  model = _model(layers)
  shapes, decoder, vision = parameter_shapes(model), model.decoder, model.vision
  llama = transformers.LlamaConfig(
    vocab_size=decoder.vocab_size,
    hidden_size=decoder.hidden_size,
    intermediate_size=decoder.intermediate_size,
    num_hidden_layers=layers,
    num_attention_heads=decoder.num_attention_heads,
    num_key_value_heads=decoder.num_key_value_heads,
  )
  clip = transformers.CLIPVisionConfig(
    hidden_size=vision.hidden_size,
    intermediate_size=vision.intermediate_size,
    num_hidden_layers=vision.num_hidden_layers,
    num_attention_heads=vision.num_attention_heads,
    image_size=vision.image_size,
    patch_size=vision.patch_size,
  )
  for name, config, names, module in (('llama', llama, LLAMA, 'decoder'), ('clip', clip, CLIP[0], 'vision')):
    mine = {path: shape for path, shape in shapes.items() if path.split('/')[0] == module}
    _write(directory / name, config.to_dict(), names, mine)
  save_tokenizer(train_tokenizer(['what color is the square?'], vocab_size=280), directory / 'llama')


def _write(directory: Path, config: dict, names: Names, shapes: dict[str, tuple[int, ...]]) -> None:
  directory.mkdir(parents=True)
  (directory / CONFIG).write_text(json.dumps(config))
  half, rng = np.dtype('float16'), np.random.default_rng(0)

  def drawn(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    yield (0.02 * rng.standard_normal(shape, np.float32)).astype(half)

  tensors = wanted_tensors(names.rules(), shapes)
  planned = [Planned(name, shape, half, lambda shape=shape: drawn(shape)) for name, shape in tensors.items()]
  write_tensors(directory, planned, max_shard_bytes=10**9)


def generate_trained(workdir: Path, layers: int) -> None:
  """The same decoder and tower, random in float32 and without pre-fusion, as the checkpoint of a trained run.

  All of it is in memory at once.
  """
  model, rng = dataclasses.replace(_model(layers), prefusion=PrefusionConfig(num_layers=0)), np.random.default_rng(0)
  params = {path: rng.standard_normal(shape, np.float32) for path, shape in parameter_shapes(model).items()}
  config = Experiment(model, DataConfig(), TrainConfig()).to_dict()
  with Checkpoints(workdir / CHECKPOINTS, keep=1) as checkpoints:
    state = dict(params=unflatten(params), frozen={}, step=np.array(1, np.int32))
    checkpoints.save(1, state, dict(config=json.loads(json.dumps(config))))
  save_tokenizer(train_tokenizer(['what color is the square?'], vocab_size=280), workdir / 'tokenizer')


def measure(arguments: Sequence[str]) -> Cost:
  """Runs `python ARGUMENTS` to its end. Needs Linux. Raises CalledProcessError if it fails."""
  started, resident, anonymous = time.perf_counter(), 0.0, 0.0
  process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
  status = Path(f'/proc/{process.pid}/status')
  while process.poll() is None:
    found = {name: int(kib) / 1024 for name, kib in re.findall(r'(VmRSS|RssAnon):\s+(\d+) kB', status.read_text())}
    resident, anonymous = max(resident, found.get('VmRSS', 0.0)), max(anonymous, found.get('RssAnon', 0.0))
    time.sleep(_POLL_SECONDS)
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, arguments)
  return Cost(' '.join(map(str, arguments)), time.perf_counter() - started, resident, anonymous)


def import_costs(directory: Path, layers: int) -> Iterator[Cost]:
  """Of importing generated parts with random pre-fusion into `directory/run`, and of exporting that.

  Args:
    directory: new; takes 6 bytes for each parameter of the parts, and 4 GB.
  """
  generate(directory, layers)
  parts = f'--vision={directory}/clip', f'--decoder={directory}/llama'
  yield measure(['launch/convert.py', 'import', *parts, f'--to={directory}/run', _SHARDS])
  yield _export(directory)


def export_costs(directory: Path, layers: int) -> Iterator[Cost]:
  """Of exporting a trained run; `directory` is new, and takes 6 bytes for each parameter."""
  generate_trained(directory / 'run', layers)
  yield _export(directory)


def _export(directory: Path) -> Cost:
  return measure(
    ['launch/convert.py', 'export', f'--from={directory}/run', f'--to={directory}/hf', '--dtype=bfloat16', _SHARDS]
  )


def describe(directory: Path, rows: Iterator[Cost]) -> Iterator[str]:
  """Two lines for each, as soon as it is there, and for a process that only imports; last the sizes of parameters."""
  for cost in itertools.chain([measure(['-c', 'import llava_mini_jax.convert.import_model'])], rows):
    yield f'{cost.command}'
    yield f'  {cost.seconds:.0f} s, resident {cost.resident:,.0f} MiB, anonymous {cost.anonymous:,.0f} MiB'
  shapes = parameter_shapes(read_experiment(directory / 'run').model)
  sizes = {path: math.prod(shape) * 4 / 2**20 for path, shape in shapes.items()}
  largest = max(sizes, key=sizes.get)
  yield f'{sum(sizes.values()):,.0f} MiB of float32 parameters, the largest is {largest}: {sizes[largest]:,.0f} MiB'

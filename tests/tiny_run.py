"""A dataset and a model so small that a whole run takes seconds, and that run, made once for all tests.

The file is itself a config, --config=tests/tiny_run.py:DATASET. The model learns the dataset by heart: images of one
colour, and two questions about each.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
from PIL import Image

from llava_mini_jax.config import CompressorConfig, DecoderConfig, LlavaMiniConfig, PrefusionConfig, VisionConfig
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

REPOSITORY = Path(__file__).parents[1]
COLORS = {
  'red': (220, 30, 30),
  'green': (30, 200, 40),
  'blue': (30, 60, 220),
  'white': (250, 250, 250),
  'black': (10, 10, 10),
  'yellow': (240, 220, 20),
}
QUESTIONS = ('color?', 'please tell me what color the picture is')

MODEL = LlavaMiniConfig(
  vision=VisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
  ),
  compressor=CompressorConfig(num_heads=2),
  prefusion=PrefusionConfig(num_layers=1),
  decoder=DecoderConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
  ),
  detach_text=False,
  dtype='float32',
)


def picture(color: str, size: tuple[int, int] = (24, 16)) -> bytes:
  out = io.BytesIO()
  Image.new('RGB', size, COLORS[color]).save(out, 'PNG')
  return out.getvalue()


STEPS, SAVE_EVERY, LOG_EVERY, RATE = 128, 16, 4, 1e-2


def experiment(dataset: os.PathLike | str, **train) -> Experiment:
  """Batches of eight of the twelve records, on every device; `train` replaces fields of the TrainConfig."""
  defaults = dict(groups=(('.*', RATE),), batch_size=8, epochs=1e3, max_steps=STEPS, mesh=(-1, 1, 1))
  return Experiment(
    model=MODEL,
    data=DataConfig(dataset=str(dataset), template='chatml', row_length=64),
    train=TrainConfig(**{**defaults, 'log_every': LOG_EVERY, 'save_every': SAVE_EVERY, **train}),
  )


def get_config(dataset: str) -> ml_collections.ConfigDict:
  return experiment(dataset).to_config_dict()


def sample(color: str, i: int) -> dict:
  """Question i about a colour, as an annotation file has it."""
  turns = [{'from': 'human', 'value': f'<image>\n{QUESTIONS[i]}'}, {'from': 'gpt', 'value': color}]
  return dict(id=f'{color}-{i}', image=f'{color}.png', category=('short', 'long')[i], conversations=turns)


@functools.cache
def make_dataset(base: Path) -> Path:
  """A prepared dataset with the split `train`; the images lie beside it, in files named after their colour.

  Args:
    base: `tmp_path_factory.getbasetemp()`.
  """
  root = base / 'tiny'
  root.mkdir()
  for color in COLORS:
    (root / f'{color}.png').write_bytes(picture(color))
  (root / 'train.json').write_text(json.dumps([sample(color, i) for color in COLORS for i in range(len(QUESTIONS))]))
  prepare([str(root / 'train.json')], root / 'data', media_roots=[root])
  return root / 'data'


def environment(devices: int, cache: Path | None = None) -> dict[str, str]:
  """Of a process with so many emulated devices. XLA compiles without optimizing, which is much faster.

  cache: a directory of compiled programs, that runs of one test share; None = each compiles.
  """
  return {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'tests')]),
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_COMPILATION_CACHE': 'true' if cache else 'false',
    **({'JAX_COMPILATION_CACHE_DIR': str(cache)} if cache else {}),
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0',
  }


def command(script: str, *arguments, devices: int = 1, cache: Path | None = None, **pipes) -> subprocess.Popen:
  """Starts launch/SCRIPT.py in that `environment`."""
  program = [sys.executable, str(REPOSITORY / 'launch' / f'{script}.py'), *map(str, arguments)]
  defaults = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  return subprocess.Popen(program, cwd=REPOSITORY, env=environment(devices, cache), text=True, **{**defaults, **pipes})


def start_training(
  dataset: Path, workdir: Path, *overrides: str, devices: int = 1, cache: Path | None = None
) -> subprocess.Popen:
  """launch/train.py; what it prints goes to the file `workdir`.log."""
  with workdir.with_suffix('.log').open('a') as log:
    config = f'--config={Path(__file__).relative_to(REPOSITORY)}:{dataset}'
    words = config, f'--workdir={workdir}', *overrides
    return command('train', *words, devices=devices, cache=cache, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: Path) -> Path:
  """Waits for a training run to end well."""
  assert process.wait() == 0, workdir.with_suffix('.log').read_text()
  return workdir


@functools.cache
def trained(base: Path) -> Path:
  """The workdir of a finished run on eight devices, data parallel. Never to be written to; `base` as above."""
  workdir = base / 'trained'
  return finish(start_training(make_dataset(base), workdir, devices=8), workdir)

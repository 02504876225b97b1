"""What a model costs and what a dataset shows.

python -m llava_mini_jax.analyze flops --config=configs/llava_mini_vicuna_7b.py --text=43 --out=docs
python -m llava_mini_jax.analyze samples --dataset=data/scenes --split=test --out=docs/scenes.png
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.analyze.samples import sample_sheet
from llava_mini_jax.cli import launch
from llava_mini_jax.config import ConfigError, require_choice

_CONFIG = config_flags.DEFINE_config_file('config', help_string='flops: experiment, FILE.py or FILE.py:arguments.')
_DATASET = flags.DEFINE_string('dataset', None, 'samples: prepared dataset.')
_SPLIT = flags.DEFINE_string('split', 'test', 'samples: split of the dataset.')
_OUT = flags.DEFINE_string('out', None, 'samples: PNG to write. flops: directory of the pictures; none = no pictures.')


def _samples() -> str:
  if not (_DATASET.value and _OUT.value):
    raise ConfigError('samples: expected --dataset and --out; found one or none')
  sample_sheet(_DATASET.value, _SPLIT.value, Path(_OUT.value))
  return f'written to {_OUT.value}'


COMMANDS = {'samples': _samples}


def main(words: Sequence[str]) -> None:
  name = words[1] if len(words) == 2 else ' '.join(words[1:])
  require_choice('analyze', name, tuple(COMMANDS))
  print(COMMANDS[name]())


if __name__ == '__main__':
  launch(main, arguments=True)

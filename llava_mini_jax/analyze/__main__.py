"""What a model costs, where it looks, and what a dataset shows.

python -m llava_mini_jax.analyze flops --config=configs/llava_mini_vicuna_7b.py --text=43 --out=docs
python -m llava_mini_jax.analyze samples --dataset=data/scenes --split=test --out=docs/scenes.png
python -m llava_mini_jax.analyze attention --workdir=runs/quickstart --dataset=data/easy_vqa --out=runs/attention
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.analyze import cost_report
from llava_mini_jax.analyze.attention_report import attention_report
from llava_mini_jax.analyze.samples import sample_sheet
from llava_mini_jax.cli import launch
from llava_mini_jax.config import ConfigError, require_choice
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh

_CONFIG = config_flags.DEFINE_config_file('config', help_string='flops: experiment, FILE.py or FILE.py:arguments.')
_TEXT = flags.DEFINE_integer(
  'text', cost_report.PAPER_TEXT, 'flops: tokens of the instruction; 43 are those of the paper.', lower_bound=1
)
_DATASET = flags.DEFINE_string('dataset', None, 'samples, attention: prepared dataset.')
_SPLIT = flags.DEFINE_string('split', 'test', 'samples, attention: split of the dataset.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'attention: a run, trained or imported.')
_STEP = flags.DEFINE_integer('step', None, 'attention: of the run; default: the newest.', lower_bound=0)
_SAMPLES = flags.DEFINE_integer('samples', 256, 'attention: records to see.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch_size', 16, 'attention: rows together.', lower_bound=1)
_WINDOW = flags.DEFINE_integer(
  'window', 0, 'attention: consecutive layers that do not see vision; 0 = a quarter of them.', lower_bound=0
)
_OUT = flags.DEFINE_string(
  'out', None, 'samples: PNG to write. attention: directory. flops: directory of the pictures; none = no pictures.'
)


def _samples() -> str:
  if not (_DATASET.value and _OUT.value):
    raise ConfigError('samples: expected --dataset and --out; found one or none')
  sample_sheet(_DATASET.value, _SPLIT.value, Path(_OUT.value))
  return f'written to {_OUT.value}'


def _flops() -> str:
  if _CONFIG.value is None:
    raise ConfigError('flops: expected --config; found none')
  experiment = Experiment.from_dict(_CONFIG.value)
  text = cost_report.describe(experiment, _TEXT.value)
  if not _OUT.value:
    return text
  paths = cost_report.pictures(experiment.model, _TEXT.value, Path(_OUT.value))
  return '\n'.join([text, '', *(f'written: {path}' for path in paths)])


def _attention() -> str:
  if not (_WORKDIR.value and _DATASET.value and _OUT.value):
    raise ConfigError('attention: expected --workdir, --dataset and --out; found some or none of them')
  run = load_run(Path(_WORKDIR.value), make_mesh(), _STEP.value)
  sizes = dict(samples=_SAMPLES.value, batch_size=_BATCH.value, window=_WINDOW.value)
  attention_report(run, Path(_DATASET.value), _SPLIT.value, Path(_OUT.value), **sizes)
  return f'written to {_OUT.value}/README.md'


COMMANDS = {'attention': _attention, 'flops': _flops, 'samples': _samples}


def main(words: Sequence[str]) -> None:
  name = words[1] if len(words) == 2 else ' '.join(words[1:])
  require_choice('analyze', name, tuple(COMMANDS))
  print(COMMANDS[name]())


if __name__ == '__main__':
  launch(main, arguments=True)

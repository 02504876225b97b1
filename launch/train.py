"""Trains a LLaVA-Mini.

python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/tiny
Any field can be overridden: --config.train.batch_size=64. Run the same command again to resume.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.cli import launch
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment: FILE.py or FILE.py:arguments.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of checkpoints, logs and curves.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(_) -> None:
  train(Experiment.from_dict(_CONFIG.value), Path(_WORKDIR.value))


if __name__ == '__main__':
  launch(main)

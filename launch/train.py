"""Trains a LLaVA-Mini.

python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/tiny
Any field can be overridden: --config.train.batch_size=64. Run the same command again to resume.
On several hosts run it once on each: SLURM, GKE and TPU VMs are recognised, else name the processes (docs/pods.md),
--coordinator=10.0.0.1:8476 --num_processes=4 --process_id=0
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.cli import define_process_flags, launch
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.profile import parse_steps

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment: FILE.py or FILE.py:arguments.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of checkpoints, logs and curves.')
_PROFILE = flags.DEFINE_string('profile_steps', '', 'FIRST:END, as 10:15: trace steps 10 to 14 into WORKDIR/profile.')
define_process_flags()
flags.mark_flags_as_required(['config', 'workdir'])


def main(_) -> None:
  train(Experiment.from_dict(_CONFIG.value), Path(_WORKDIR.value), profile_steps=parse_steps(_PROFILE.value))


if __name__ == '__main__':
  launch(main, several=True)

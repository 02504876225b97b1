"""Trains a LLaVA-Mini.

python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/tiny
Any field can be overridden: --config.train.batch_size=64. Run the same command again to resume. A run that differs
from the one in WORKDIR is refused, unless --allow_config_change=config.train.seed names all that does.
On several hosts run it once on each: SLURM, GKE and TPU VMs are recognised, else name the processes (docs/pods.md),
--coordinator=10.0.0.1:8476 --num_processes=4 --process_id=0
On SIGTERM it saves where it is and ends with status 75: the same command goes on from there.
"""

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.cli import define_process_flags, launch
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.goodput import process_age
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.preemption import Preemption
from llava_mini_jax.train.profile import parse_steps

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment: FILE.py or FILE.py:arguments.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of checkpoints, logs and curves.')
_PROFILE = flags.DEFINE_string('profile_steps', '', 'FIRST:END, as 10:15: trace steps 10 to 14 into WORKDIR/profile.')
_ALLOWED = flags.DEFINE_multi_string(
  'allow_config_change', [], 'What may differ from the run that is resumed, named as in the refusal; may be repeated.'
)
_FALLBACK = flags.DEFINE_bool(
  'fallback', True, 'Whether to go on from an older checkpoint if the newest is damaged; --nofallback ends there.'
)
define_process_flags()
flags.mark_flags_as_required(['config', 'workdir'])


def main(_) -> None:
  began = time.perf_counter() - process_age()
  experiment, steps = Experiment.from_dict(_CONFIG.value), parse_steps(_PROFILE.value)
  changes = dict(allowed=_ALLOWED.value, fallback=_FALLBACK.value)
  with Preemption() as preemption:
    train(experiment, Path(_WORKDIR.value), profile_steps=steps, began=began, preemption=preemption, **changes)


if __name__ == '__main__':
  launch(main, several=True)

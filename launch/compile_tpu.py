"""Compiles a step for a pod that need not be there and says whether it fits, what it moves and how long it takes.

python launch/compile_tpu.py --config=configs/llava_mini_vicuna_7b.py:stage2 --topology=v5e-64
python launch/compile_tpu.py --config=configs/llava_mini_vicuna_7b.py:stage2 --topology=v5e-64 \
  --config.train.mesh='(8, 8, 1)' --json=a.json
python launch/compile_tpu.py --config=configs/llava_mini_vicuna_7b.py:stage2 --topology=v5e-1 --step=prefill \
  --params=bfloat16
Two configs side by side: --against=configs/llava_mini_llama31_8b.py:stage2, or --against_topology, --against_mesh.

Needs `pip install -e '.[tpu]'`, no TPU. docs/preflight.md says how far the predictions can be trusted.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_mini_jax.analyze.preflight import Preflight, preflight
from llava_mini_jax.analyze.preflight_report import compare, describe, to_json
from llava_mini_jax.analyze.programs import STEPS, make_program
from llava_mini_jax.analyze.topologies import Topology, parse_options, start_without_devices, topology
from llava_mini_jax.cli import integers, launch
from llava_mini_jax.experiment import Experiment

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment: FILE.py or FILE.py:arguments.')
_AGAINST = config_flags.DEFINE_config_file('against', help_string='A second experiment, to compare.')
_TOPOLOGY = flags.DEFINE_string('topology', 'v5e-64', 'Chips: v5e-64, 2xv5e-256, v5p:2x4x4, cpu-8.')
_AGAINST_TOPOLOGY = flags.DEFINE_string('against_topology', None, 'Topology of the second; default: the same.')
_STEP = flags.DEFINE_enum('step', 'train', STEPS, 'Which program.')
_BATCH = flags.DEFINE_integer('batch', 0, 'Global rows; 0 = as configured, or one per device.', lower_bound=0)
_MESH = flags.DEFINE_list('mesh', None, 'data,fsdp,tensor; default: as configured.')
_AGAINST_MESH = flags.DEFINE_list('against_mesh', None, 'Mesh of the second; default: the same.')
_TEXT = flags.DEFINE_integer('text', 64, 'Text tokens of a prompt.', lower_bound=1)
_NEW = flags.DEFINE_integer('new_tokens', 128, 'Tokens of an answer.', lower_bound=1)
_PARAMS = flags.DEFINE_enum('params', 'float32', ['float32', 'bfloat16'], 'Parameters, unless training.')
_OPTIONS = flags.DEFINE_list('compiler_options', [], 'NAME=VALUE,…; they win over what the program has.')
_KERNELS = flags.DEFINE_float(
  'kernel_efficiency', None, "Share of the peak that Pallas kernels reach; default: chip's."
)
_TOP = flags.DEFINE_integer('top', 10, 'How many instructions to list.', lower_bound=0)
_JSON = flags.DEFINE_string('json', None, 'Write the report here; - prints it instead of the text.')
_HLO = flags.DEFINE_string('hlo', None, "Write the compiled program's text here.")
flags.mark_flags_as_required(['config'])


def _report(config: flags.FlagHolder, place: Topology, mesh: list[str] | None) -> tuple[Preflight, str]:
  program = make_program(
    Experiment.from_dict(config.value),
    place,
    step=_STEP.value,
    batch=_BATCH.value,
    mesh=integers('mesh', mesh) if mesh else None,
    text=_TEXT.value,
    new_tokens=_NEW.value,
    dtype=_PARAMS.value,
  )
  name = Path(config_flags.get_config_filename(flags.FLAGS[config.name])).name
  options = parse_options(_OPTIONS.value)
  return preflight(program, place, name=name, options=options, kernel_efficiency=_KERNELS.value)


def main(_) -> None:
  cases = [(_CONFIG, topology(_TOPOLOGY.value), _MESH.value)]
  if _AGAINST.value or _AGAINST_TOPOLOGY.value or _AGAINST_MESH.value:
    where, mesh = _AGAINST_TOPOLOGY.value or _TOPOLOGY.value, _AGAINST_MESH.value or _MESH.value
    cases.append((_AGAINST if _AGAINST.value else _CONFIG, topology(where), mesh))
  start_without_devices([place for _, place, _ in cases])
  reports, texts = zip(*(_report(*case) for case in cases), strict=True)
  values = [to_json(report, _TOP.value) for report in reports]
  encoded = json.dumps(values[0] if len(values) == 1 else values, indent=2)
  if _HLO.value:
    Path(_HLO.value).write_text(texts[0])
  if _JSON.value == '-':
    print(encoded)
    return
  if _JSON.value:
    Path(_JSON.value).write_text(encoded + '\n')
  print('\n\n'.join(describe(report, _TOP.value) for report in reports))
  if len(values) == 2:
    print('\n' + compare(*values))


if __name__ == '__main__':
  launch(main, keep=False)

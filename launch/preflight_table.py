"""The paper's stages on pods: docs/preflight.json, the table in docs/preflight.md and docs/preflight.png.

python launch/preflight_table.py --models=vicuna_7b --stages=stage2,stage1 --topologies=v5e-64
python launch/preflight_table.py --models=
Minutes per cell; what docs/preflight.json has is kept, and --models= only writes table and picture anew.
"""

from pathlib import Path

from absl import flags

from llava_mini_jax.analyze import preflight_table
from llava_mini_jax.cli import launch

_MODELS = flags.DEFINE_list('models', list(preflight_table.MODELS), 'Which models.')
_STAGES = flags.DEFINE_list('stages', list(preflight_table.STAGES), 'Which stages.')
_TOPOLOGIES = flags.DEFINE_list('topologies', list(preflight_table.TOPOLOGIES), 'Which chips.')
_ARGUMENTS = flags.DEFINE_multi_string('argument', [], 'Further argument of launch/compile_tpu.py, for all cells.')
_DOCS = flags.DEFINE_string('docs', 'docs', 'Directory of the table.')


def main(_) -> None:
  docs = Path(_DOCS.value)
  file, document = docs / 'preflight.json', docs / 'preflight.md'
  wanted = preflight_table.cells(_MODELS.value, _STAGES.value, _TOPOLOGIES.value)
  for cell, outcome in preflight_table.fill(file, wanted, _ARGUMENTS.value):
    print(f'{cell.key}: {outcome}', flush=True)
  table = preflight_table.read(file)
  if table:
    document.write_text(preflight_table.insert(document.read_text(), preflight_table.markdown(table)))
    preflight_table.picture(table, docs / 'preflight.png')


if __name__ == '__main__':
  launch(main)

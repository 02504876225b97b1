"""The whole way as a user goes it, command by command: checkpoints in, both stages, questions, checkpoints out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import COLORS, REPOSITORY, picture

pytest.importorskip('torch')
sys.path.insert(0, str(Path(__file__).parent / 'convert'))
import hf_directories as hf  # noqa: E402

from llava_mini_jax.infer.load import load_run  # noqa: E402
from llava_mini_jax.sharding import make_mesh  # noqa: E402
from llava_mini_jax.train.tree import flatten  # noqa: E402

pytestmark = pytest.mark.slow
CONFIG = """
from llava_mini_jax.convert.run_weights import read_experiment
from llava_mini_jax.recipes import paper_stage

def get_config(stage):
  model = read_experiment('runs/mine_start').model
  return paper_stage(model, stage, template='chatml', name='mine').to_config_dict()
"""
PROGRAM = """
import json, sys, launcher
print(json.dumps([launcher.main(cases) for cases in json.load(sys.stdin)]))
"""
SMALL = '--config.data.row_length=96', '--config.train.batch_size=2', '--config.train.mesh=(1,1,1)'
FEW = '--split=train', '--batch_size=6', '--max_new_tokens=4'
ASK = '--image=red.png', '--max_new_tokens=4', 'what color is the square?'


def train(stage: str) -> tuple[str, ...]:
  return 'train', f'--config=mine.py:{stage}', f'--workdir=runs/mine_{stage}', *SMALL


def prepare(name: str) -> tuple[str, ...]:
  return 'prepare_data', f'--source={name}.json', '--media_root=.', '--tokenizer=llama', f'--out=data/llava_{name}'


# Each group needs what the one before it leaves; the commands of a group run side by side.
TRAINING = (
  {
    'start': ('convert', 'import', '--vision=clip', '--decoder=llama', '--prefusion_layers=1', '--to=runs/mine_start'),
    'captions': prepare('captions'),
    'instructions': prepare('instructions'),
  },
  {'stage1': train('stage1')},
  {'stage2': train('stage2')},
)
AFTERWARDS = (
  {
    'evaluate': ('evaluate', '--workdir=runs/mine_stage2', '--dataset=data/llava_instructions', *FEW),
    'chat': ('chat', '--checkpoint=runs/mine_stage2', *ASK),
    'export': ('convert', 'export', '--from=runs/mine_stage2', '--to=out'),
  },
  {'again': ('convert', 'import', '--from=out', '--to=runs/again')},
  {'chat again': ('chat', '--checkpoint=runs/again', *ASK)},
)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('stages')
  hf.clip(root / 'clip')
  hf.llama(root / 'llama')
  (root / 'mine.py').write_text(CONFIG)
  captions, instructions = [], []
  for color in COLORS:
    (root / f'{color}.png').write_bytes(picture(color))
    for found, question in ((captions, '<image>'), (instructions, '<image>\nwhat color is the square?')):
      turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': f'the square is {color}.'}]
      found.append(dict(id=color, image=f'{color}.png', conversations=turns))
  (root / 'captions.json').write_text(json.dumps(captions))
  (root / 'instructions.json').write_text(json.dumps(instructions))
  return root


def outcomes(place: Path, groups: tuple[dict, ...]) -> dict[str, dict]:
  """What came of every command, by name."""
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'tests')]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  cases = [[dict(script=step[0], arguments=step[1:], parse=False) for step in group.values()] for group in groups]
  program = [sys.executable, '-c', PROGRAM]
  done = subprocess.run(program, cwd=place, env=environment, input=json.dumps(cases), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  names = [name for group in groups for name in group]
  return dict(zip(names, (result for part in json.loads(done.stdout) for result in part), strict=True))


@pytest.fixture(scope='module')
def results(place) -> dict[str, dict]:
  return outcomes(place, TRAINING)


@pytest.fixture(scope='module')
def later(place, results) -> dict[str, dict]:
  return outcomes(place, AFTERWARDS)


def parameters(place: Path, run: str) -> dict[str, np.ndarray]:
  loaded = load_run(place / 'runs' / run, make_mesh((1, 1, 1), devices=jax.devices()[:1]))
  return {path: np.asarray(leaf) for path, leaf in flatten(loaded.params).items()}


@pytest.fixture(scope='module')
def params(place, results) -> dict[str, dict[str, np.ndarray]]:
  return {name: parameters(place, f'mine_{name}') for name in ('start', 'stage1', 'stage2')}


@pytest.mark.parametrize('name', [name for group in TRAINING for name in group])
def test_every_command_ends_well(results, name):
  assert results[name]['status'] == 0, results[name]['stderr']


@pytest.mark.parametrize('name', [name for group in AFTERWARDS for name in group])
def test_every_later_command_ends_well(later, name):
  assert later[name]['status'] == 0, later[name]['stderr']


def changed(before: dict, after: dict) -> set[str]:
  return {path for path in before.keys() & after.keys() if not np.array_equal(before[path], after[path])}


def test_stage_1_trains_the_projector_alone(results, params):
  start, stage1 = params['start'], params['stage1']
  assert changed(start, stage1) == {path for path in stage1 if path.startswith('projector/')}
  assert start.keys() - stage1.keys() == {path for path in start if path.split('/')[0] in ('compressor', 'prefusion')}
  assert 'from runs/mine_start: loaded vision, projector, decoder; left out' in results['stage1']['stdout']


def test_stage_2_goes_on_from_it(results, params):
  stage1, stage2 = params['stage1'], params['stage2']
  assert 'from runs/mine_stage1: loaded vision, projector, decoder; left out none' in results['stage2']['stdout']
  frozen = {path for path in stage1 if path.startswith('vision/')} | {'decoder/embed_tokens'}
  assert changed(stage1, stage2) == stage1.keys() - frozen
  assert {path.split('/')[0] for path in stage2.keys() - stage1.keys()} == {'compressor', 'prefusion'}


@pytest.mark.parametrize(('stage', 'steps'), [('stage1', 3), ('stage2', 6)])
def test_every_step_is_logged(place, results, stage, steps):
  lines = (place / 'runs' / f'mine_{stage}' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['step'] for row in rows] == list(range(1, steps + 1))
  assert all(0 < row['loss'] < 20 and row['grad_norm'] > 0 for row in rows)


def test_the_answers_are_scored(place, later):
  found = json.loads((place / 'runs' / 'mine_stage2' / 'evaluation' / 'answers_real.json').read_text())
  assert [row['id'] for row in found['answers']] == list(COLORS) and found['summary']['count'] == len(COLORS)
  assert later['evaluate']['stdout'].startswith('real     images   exact match ')


def test_the_way_out_and_in_again_changes_nothing(place, later, params):
  again = parameters(place, 'again')
  assert again.keys() == params['stage2'].keys()
  assert changed(params['stage2'], again) == set()
  assert later['chat']['stdout'] == later['chat again']['stdout'] != ''

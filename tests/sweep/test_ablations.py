"""The files of configs/ablations: every point fits its rows, costs something, and finds what it starts from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_run import REPOSITORY

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.run_start import starting_paths
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.scenes import Scenes
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage1
from llava_mini_jax.sweep.grid import cost, load_sweep
from llava_mini_jax.train.tree import parameter_shapes

ABLATIONS = sorted((REPOSITORY / 'configs' / 'ablations').glob('*.py'))


@pytest.fixture(scope='module')
def sixteen_scenes(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp('scenes') / 'data'
  prepare(['scenes'], out, scenes=Scenes(16))
  return out


@pytest.mark.parametrize('file', ABLATIONS, ids=lambda path: path.stem)
def test_ablations(file, sixteen_scenes):
  """Every point of every file fits: a model can be built, rows hold its tokens, and it costs something."""
  changes = {'data.dataset': str(sixteen_scenes), 'train.batch_size': 4, 'train.init_from': ''}
  sweep = load_sweep(file, changes, (0,))
  for point, seed in sweep.runs():
    experiment = sweep.experiment(point, seed)
    found = cost(experiment)
    assert found.steps == 1 and 0 < found.prompt_flops < found.training_flops
    assert found.tokens + experiment.data.fused_text <= experiment.data.row_length
    if named := re.search(r'tokens(\d+)', point.name):
      assert int(named[1]) == found.tokens


@pytest.mark.parametrize('file', ABLATIONS, ids=lambda path: path.stem)
def test_ablations_find_their_start(file):
  """Each point has from stage 1 what it does not train from random numbers; and room for all questions of a scene."""
  start = scenes_stage1(LlavaMiniConfig.preset('tiny'), epochs=1.0).model
  sweep = load_sweep(file, {})
  for point, seed in sweep.runs():
    experiment = sweep.experiment(point, seed)
    loaded = starting_paths(Path('start'), start, experiment.model)
    anew = [path for path in parameter_shapes(experiment.model) if path not in loaded]
    (fresh,) = experiment.train.init_fresh
    assert all(re.fullmatch(fresh, path) for path in anew), point.name
    tokens = experiment.model.slots_per_visual(1 + experiment.data.grid**2 if experiment.data.grid > 1 else 1)
    assert experiment.data.row_length == tokens + SCENE_TEXT, point.name


def test_table_6_is_the_papers_grid():
  sweep = load_sweep(REPOSITORY / 'configs' / 'ablations' / 'table6.py', {})
  assert len(sweep.seeds) >= 3
  grid = [
    (e.model.prefusion.num_layers, e.model.tokens_per_visual) for p in sweep.points for e in [sweep.experiment(p, 0)]
  ]
  assert grid == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (0, 4), (0, 9), (0, 16), (0, 64)]

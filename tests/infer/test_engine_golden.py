"""The engine's core against greedy ids recorded from the released package, every row of a call in one decode batch."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from asking import one_device
from golden_cases import GOLDEN, Part, case_id, load_case, load_model
from tiny_run import experiment

from llava_mini_jax.data.rows import RowShape, build_row
from llava_mini_jax.infer.core import Core
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Laid
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.infer.stream import Stream
from llava_mini_jax.types import IMAGE_TOKEN_ID

pytestmark = pytest.mark.usefixtures('quick_compilation')


def recorded(path: Path) -> list[Part]:
  """Calls with generated ids; rows without a tag are fused with an image there, which no prompt can ask for."""
  parts = [part for part in load_case(path).parts if 'gen_ids' in part.recorded and not part.broken]
  return [part for part in parts if (part.ids == IMAGE_TOKEN_ID).any(1).all()]


PATHS = [path for path in sorted(GOLDEN.glob('cases/*/*.npz')) if recorded(path)]
assert PATHS, f'no generated ids under {GOLDEN}'


@functools.cache
def core(root: Path) -> Core:
  config, graphdef, params = load_model(root)
  asked = dataclasses.replace(experiment(''), model=config)
  return Core(Loaded(asked, None, graphdef, params, one_device(), 0), slots=4, max_length=64, visual_chunk=4)


def lay(part: Part, row: int) -> Laid:
  ids, frames = part.ids[row][part.keep[row]], part.visuals[row]
  length = len(ids) - 1 + len(frames) * part.config.tokens_per_visual
  shape = RowShape.for_model(part.config, length=length, visuals=len(frames))
  fields = build_row(ids, np.zeros(len(ids), bool), shape, where='row', visuals_per_tag=[len(frames)])
  fused = fields['fuse_index'][0, fields['fuse_mask'][0]]
  return Laid('row', fields['tokens'], fields['slot_index'], fused, [list(frames)])


@pytest.mark.parametrize('path', PATHS, ids=case_id)
def test_recorded_ids(path):
  for part in recorded(path):
    expected, asked = part.recorded['gen_ids'].reshape(len(part.ids), -1), core(part.root)
    streams = []
    for row in range(len(part.ids)):
      rules = Sampling(max_new_tokens=expected.shape[1])
      streams.append(Stream(rules, 0, end=(), decode=lambda ids: '', advance=asked.step))
      asked.add(lay(part, row), streams[-1])
    assert [stream.result().ids for stream in streams] == expected.tolist(), part.name

"""The paper's Table 10 at tiny size: compressors without pre-fusion, on generated scenes.

The paper's tokens are of 576, ours of 64 in about the same share.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/sweep.py configs/ablations/table10.py --workdir=runs/table10
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import scenes_from_scratch
from llava_mini_jax.sweep.grid import Point, Sweep

QUERY = {1: 1, 16: 2, 64: 3, 144: 4}  # the paper's tokens: ours, a side
OTHERS = {('mqt', 2): 2, ('mqt', 36): 4, ('mqt', 256): 28, ('prumerge', 32): 4, ('prumerge_plus', 144): 16}  # ours


def get_sweep() -> Sweep:
  points = []
  for paper, grid in QUERY.items():
    changes = {'model.compressor.kind': 'query', 'model.compressor.grid': grid}
    points.append(Point(f'query_tokens{grid**2}', changes, {'tokens': paper}, ('query',)))
  for (kind, paper), tokens in OTHERS.items():
    changes = {'model.compressor.kind': kind, 'model.compressor.keep': tokens}
    changes |= {'model.compressor.grid': 6, 'model.compressor.elastic': True} if kind == 'mqt' else {}
    points.append(Point(f'{kind}_tokens{tokens}', changes | {'data.row_length': 128}, {'tokens': paper}, (kind,)))
  points = [Point(p.name, {**p.changes, 'model.prefusion.num_layers': 0}, p.paper, p.series) for p in points]
  base = scenes_from_scratch(LlavaMiniConfig.preset('tiny'), epochs=2.0)
  return Sweep('Table 10 at tiny size: compressors without pre-fusion', base, tuple(points))

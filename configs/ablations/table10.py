"""The paper's Table 10 at tiny size: compressors without pre-fusion, on generated scenes.

The paper's tokens are of 576, ours of 64 in about the same share, and PruMerge merges 4 neighbours for its 32. Each
number of mqt's tokens is trained by itself; the paper's are one model, trained with all and asked with fewer. PruMerge
keeps what a layer's class token attends to: CLIP has learnt that, but here the layer is as it was initialised, so that
it keeps patches at random.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table10.py --workdir=runs/table10
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep, changed, with_text_room

QUERY = {1: 1, 16: 2, 64: 3, 144: 4}  # the paper's tokens: ours, a side
KEEP = {('mqt', 2): 2, ('mqt', 36): 4, ('mqt', 256): 28, ('prumerge', 32): 3, ('prumerge_plus', 144): 8}


def get_sweep() -> Sweep:
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  points = []
  for paper, grid in QUERY.items():
    changes = {'model.compressor.kind': 'query', 'model.compressor.grid': grid}
    points.append(Point(f'query_tokens{grid**2}', changes, {'tokens': paper}, ('query',)))
  for (kind, paper), keep in KEEP.items():
    own = {'model.compressor.grid': 6} if kind == 'mqt' else {'model.compressor.neighbours': 4}
    changes = {'model.compressor.kind': kind, 'model.compressor.keep': keep, **own}
    tokens = changed(base, changes).model.tokens_per_visual
    points.append(Point(f'{kind}_tokens{tokens}', changes, {'tokens': paper}, (kind,)))
  points = [Point(p.name, {**p.changes, 'model.prefusion.num_layers': 0}, p.paper, p.series) for p in points]
  return Sweep('Table 10 at tiny size: compressors without pre-fusion', base, with_text_room(base, points, SCENE_TEXT))

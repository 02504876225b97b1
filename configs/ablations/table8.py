"""The paper's Table 8 at tiny size: learnt queries against average pooling, four pre-fusion layers, on scenes.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table8.py --workdir=runs/table8
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep, with_text_room

PAPER = {  # (compressor, tokens): FLOPs (T), VQAv2, GQA, MMB; queries are printed as 2.42 and 2.44 G more
  ('average', 1): (1.96, 76.1, 59.8, 64.0),
  ('query', 1): (1.96, 77.6, 60.9, 65.6),
  ('average', 4): (2.01, 76.9, 60.3, 65.1),
  ('query', 4): (2.01, 77.7, 60.9, 66.7),
}


def get_sweep() -> Sweep:
  points = []
  for (kind, tokens), printed in PAPER.items():
    changes = {'model.compressor.kind': kind, 'model.compressor.grid': round(tokens**0.5)}
    paper = dict(zip(('FLOPs (T)', 'VQAv2', 'GQA', 'MMB'), printed, strict=True))
    points.append(Point(f'{kind}_tokens{tokens}', changes | {'model.prefusion.num_layers': 4}, paper, (kind,)))
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  return Sweep('Table 8 at tiny size: what compresses', base, with_text_room(base, points, SCENE_TEXT))

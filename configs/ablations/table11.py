"""The paper's Table 11 at tiny size: pre-fusion without compression, on generated scenes.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table11.py --workdir=runs/table11
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep, with_text_room

PAPER = {0: (78.5, 62.0, 64.3), 4: (80.0, 62.9, 66.2)}  # pre-fusion layers, all 576 tokens: VQAv2, GQA, MMB


def get_sweep() -> Sweep:
  points = []
  for layers, printed in PAPER.items():
    changes = {'model.prefusion.num_layers': layers, 'model.compressor.kind': 'none'}
    paper = dict(zip(('VQAv2', 'GQA', 'MMB'), printed, strict=True))
    points.append(Point(f'layers{layers}_every_patch', changes, paper, series=('every patch',)))
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  return Sweep('Table 11 at tiny size: pre-fusion without compression', base, with_text_room(base, points, SCENE_TEXT))

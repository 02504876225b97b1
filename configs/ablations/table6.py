"""The paper's Table 6 at tiny size: pre-fusion layers at one token, and tokens without pre-fusion, on generated scenes.

The paper's 16, 64 and 144 of 576 tokens become 4, 9 and 16 of 64.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table6.py --workdir=runs/table6
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep, with_text_room

PAPER = {  # (pre-fusion layers, tokens): FLOPs (T), VQAv2, GQA, MMB; three layers are printed as 1.81
  (0, 1): (0.96, 72.4, 54.2, 57.7),
  (1, 1): (1.21, 74.1, 55.4, 59.2),
  (2, 1): (1.46, 75.3, 56.7, 62.1),
  (3, 1): (1.81, 76.9, 58.9, 64.9),
  (4, 1): (1.96, 77.6, 60.9, 65.6),
  (0, 16): (1.16, 74.8, 55.5, 60.4),
  (0, 64): (1.79, 76.0, 57.6, 63.1),
  (0, 144): (2.85, 76.9, 59.1, 64.9),
  (0, 576): (8.55, 78.5, 62.0, 64.3),
}
GRIDS = {1: 1, 16: 2, 64: 3, 144: 4}  # the paper's tokens: ours, a side


def get_sweep() -> Sweep:
  points = []
  for (layers, tokens), printed in PAPER.items():
    every, side = tokens == 576, GRIDS.get(tokens, 1)
    changes = {'model.prefusion.num_layers': layers, 'model.compressor.kind': 'none' if every else 'query'}
    points.append(
      Point(
        name='every_patch' if every else f'layers{layers}_tokens{side**2}',
        changes=changes | {'model.compressor.grid': side},
        paper=dict(zip(('tokens', 'FLOPs (T)', 'VQAv2', 'GQA', 'MMB'), (tokens, *printed), strict=True)),
        series=('pre-fusion, 1 token',) * (tokens == 1) + ('no pre-fusion',) * (layers == 0),
      )
    )
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  return Sweep('Table 6 at tiny size: pre-fusion layers and tokens', base, with_text_room(base, points, SCENE_TEXT))

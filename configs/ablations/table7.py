"""The paper's Table 7 at tiny size: tokens at two resolutions, four pre-fusion layers, on generated scenes.

64 pixels stand for the paper's 336, and 128 in 2 × 2 crops and the whole image for 672. The tower sees the same
scenes, drawn at 128 pixels, in both; it has learnt on whole ones (stage 1), so crops, twice as large, are new to it.
The paper's 16, 64, 144 and 576 tokens become 4, 9, 16 and 64 at either; its 4 tokens at 336 pixels have no
counterpart, for there is nothing between 1 and 4.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --scene_pixels=128 --out=data/scenes_128
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table7.py --workdir=runs/table7 --dataset=data/scenes_128
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import SCENE_TEXT, scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep, with_text_room

GRIDS = {1: 1, 16: 2, 64: 3, 144: 4, 576: 8}  # the paper's tokens: ours, a side
TOKENS = {1: (1, 16, 64), 2: (16, 64, 144, 576)}  # crops a side: the paper's tokens


def get_sweep() -> Sweep:
  points = []
  for crops, tokens in TOKENS.items():
    for paper in tokens:
      grid = GRIDS[paper]
      changes = {'data.grid': crops, 'model.compressor.grid': grid, 'model.prefusion.num_layers': 4}
      points.append(
        Point(
          name=f'pixels{64 * crops}_tokens{grid**2}',
          changes=changes,
          paper={'pixels': 336 * crops, 'tokens': paper},
          series=(f'{64 * crops} pixels',),
        )
      )
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  return Sweep('Table 7 at tiny size: resolution and tokens', base, with_text_room(base, points, SCENE_TEXT))

"""The paper's Table 7 at tiny size: tokens at two resolutions, four pre-fusion layers, on generated scenes.

64 pixels stand for the paper's 336, and 128 in 2 × 2 crops and the whole image for 672. The tower sees the same scenes,
drawn at 128 pixels, in both.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --scene_pixels=128 --out=data/scenes_128
python launch/sweep.py configs/ablations/table7.py --workdir=runs/table7 --dataset=data/scenes_128
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import scenes_from_scratch
from llava_mini_jax.sweep.grid import Point, Sweep

TOKENS = {1: ((1, 1), (4, 2), (16, 3), (64, 4)), 2: ((16, 2), (64, 3), (144, 4), (576, 8))}  # crops a side: paper, ours


def get_sweep() -> Sweep:
  points = []
  for crops, tokens in TOKENS.items():
    for paper, grid in tokens:
      changes = {'data.grid': crops, 'model.compressor.grid': grid, 'model.prefusion.num_layers': 4}
      points.append(
        Point(
          name=f'pixels{64 * crops}_tokens{grid**2}',
          changes=changes | {'data.row_length': 176 if grid == 8 else 96},
          paper={'pixels': 336 * crops, 'tokens': paper},
          series=(f'{64 * crops} pixels',),
        )
      )
  base = scenes_from_scratch(LlavaMiniConfig.preset('tiny'), epochs=2.0)
  return Sweep('Table 7 at tiny size: resolution and tokens', base, tuple(points))

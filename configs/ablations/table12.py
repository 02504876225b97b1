"""The paper's Table 12 at tiny size: compression outside of the language model or after its first layer.

Its layer in the paper is not printed. Inside, the compressor works in the space of the language model; so does the one
outside that it is compared with.

python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/train.py --config=configs/tiny_scenes.py:stage1 --workdir=runs/scenes_stage1
python launch/sweep.py configs/ablations/table12.py --workdir=runs/table12
"""

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.recipes import scenes_stage2
from llava_mini_jax.sweep.grid import Point, Sweep

PAPER = {0: (1.96, 77.6, 60.9, 65.6), 1: (1.84, 76.3, 60.1, 64.5)}  # within: FLOPs (T), VQAv2, GQA, MMB


def get_sweep() -> Sweep:
  points = []
  for within, printed in PAPER.items():
    layers = 0 if within else 1  # the layers inside see patches and text as pre-fusion does
    changes = {'model.compressor.within': within, 'model.compressor.space': 'llm', 'model.prefusion.num_layers': layers}
    paper = dict(zip(('FLOPs (T)', 'VQAv2', 'GQA', 'MMB'), printed, strict=True))
    points.append(Point(f'within{within}' if within else 'outside', changes, paper, ('placement',)))
  base = scenes_stage2(LlavaMiniConfig.preset('tiny'), epochs=0.4)
  return Sweep('Table 12 at tiny size: outside or within the language model', base, tuple(points))

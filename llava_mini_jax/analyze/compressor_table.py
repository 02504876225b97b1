"""The table of docs/compressors.md: tokens and FLOPs of each kind at the sizes of LLaVA-v1.5 7B.

python -m llava_mini_jax.analyze.compressor_table
"""

from __future__ import annotations

import dataclasses

from llava_mini_jax.analyze.flops import forward_flops
from llava_mini_jax.compressor_recipes import DEFAULTS
from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.markdown import line

TEXT = 43
READS = dict(  # and its C
  query=('patches', 'grid²'),
  average=('patches', 'grid²'),
  mqt=('patches', '`keep`, or grid²'),
  prumerge=('keys and class attention', '`keep` + 1'),
  prumerge_plus=('keys and class attention', '2 · `keep` + 1'),
  tokenpacker=('hidden states', 'grid²'),
  llama_vid=('the question', '1 + grid²'),
  voco=('nothing', '`keep`'),
  none=('–', 'P'),
)


def rows() -> list[str]:
  """One line of the table for each kind."""
  base = LlavaMiniConfig.preset('vicuna_7b')
  base = dataclasses.replace(base, prefusion=dataclasses.replace(base.prefusion, num_layers=0))
  found = {}
  for kind, compressor in DEFAULTS.items():
    config = dataclasses.replace(base, compressor=compressor)
    tokens = config.tokens_per_visual
    flops = forward_flops(config, rows=1, length=TEXT + tokens, visuals=1, fused_text=TEXT)
    found[kind] = config, tokens, flops
  least = found['none'][2]
  lines = []
  for kind, (config, tokens, flops) in found.items():
    beyond = []
    if tower := flops.vision - least.vision:
      beyond.append(f'tower {tower / 1e9:.2f} G')
    if config.compressor_class and config.compressor_class.keeps_patches:
      beyond.append(f'{config.vision.num_patches} patches in the decoder while the prompt is read')
    count = f'{config.new_tokens(1) or tokens}'
    own = f'{flops.compressor / 1e9:.3f} G' if flops.compressor else '0'
    fields = ', '.join(f'`{field}`' for field in (config.compressor_class.fields if config.compressor_class else ()))
    cells = [f'`{kind}`', *READS[kind], fields or '–', own, ', '.join(beyond) or '–', count]
    lines.append(line(cells))
  return lines


if __name__ == '__main__':
  print('\n'.join(rows()))

"""How the systems that the paper compares with were trained, beside `recipes.paper_stage` for LLaVA-Mini itself.

| kind | tokens at 336 pixels | stage 1 | stage 2 |
|---|---|---|---|
| query, average | 1 | `recipes.paper_stage` | the same |
| none (LLaVA-v1.5) | 576 | projector, 1e-3, batch 256 | projector, decoder, 2e-5, batch 128, 1 epoch |
| mqt | 256 trained, any number asked | projector, compressor, all 256 | + decoder, 2 to 256 tokens, 2 epochs |
| tokenpacker | 36 | projector, compressor | + decoder, 1 epoch |
| llama_vid | 2 | projector, compressor | + decoder, 1 epoch |
| voco | 1, behind 576 patches | that of none | + decoder, 2 epochs |
| prumerge | 32 | that of none | on LLaVA-v1.5: LoRA 128, alpha 256, 2e-4; projector 2e-5; 1 epoch |
| prumerge_plus | 145 | that of none | the same |

Rates and batches of a row that names none are those of LLaVA-v1.5. All without pre-fusion, with text embeddings that
train; with `prefusion_layers`, those start anew in stage 2. Sources: the systems' own training scripts. LLaMA-VID's
batch of stage 2 and its epochs are taken from LLaVA-v1.5, VoCo's single token is the paper's (its code has two), and
PruMerge's 32 tokens stand for what its outliers come to in the mean.
"""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import COMPRESSORS, CompressorConfig, LlavaMiniConfig, require_choice
from llava_mini_jax.experiment import Experiment, TrainConfig
from llava_mini_jax.recipes import paper_stage

DEFAULTS = {
  'query': CompressorConfig(),
  'average': CompressorConfig(kind='average'),
  'mqt': CompressorConfig(kind='mqt', grid=16, num_heads=16, elastic=True),
  'prumerge': CompressorConfig(kind='prumerge', keep=31),
  'prumerge_plus': CompressorConfig(kind='prumerge_plus', keep=72),
  'tokenpacker': CompressorConfig(kind='tokenpacker', grid=6),
  'llama_vid': CompressorConfig(kind='llama_vid'),
  'voco': CompressorConfig(kind='voco', keep=1),
  'none': CompressorConfig(kind='none'),
}
_BY_ALL_PATCHES = ('prumerge', 'prumerge_plus', 'voco')  # stage 1 is that of LLaVA-v1.5


def compared_stage(
  model: LlavaMiniConfig, kind: str, stage: str, *, template: str, name: str, prefusion_layers: int = 0
) -> Experiment:
  """Stage 1 or 2 of a system with its own compressor, on any tower and decoder.

  Args:
    model: its `compressor` and the number of its pre-fusion layers are replaced, except for `query` and `average`,
      which keep the model's pre-fusion.
    stage: stage1 or stage2.
    name: begins the names of the runs, `runs/{name}_{kind}_stage1`; all begin with `runs/{name}_start`.
  Raises:
    ConfigError: another kind or stage, or a model that cannot have the compressor.
  """
  require_choice('kind', kind, COMPRESSORS)
  require_choice('stage', stage, ('stage1', 'stage2'))
  compressor = DEFAULTS[kind]
  if kind in ('query', 'average'):
    changed = dataclasses.replace(model, compressor=compressor)
    return paper_stage(changed, stage, template=template, name=name)
  first = stage == 'stage1'
  if first:  # of mqt with all its queries
    compressor = DEFAULTS['none'] if kind in _BY_ALL_PATCHES else dataclasses.replace(compressor, elastic=False)
  prefusion = dataclasses.replace(model.prefusion, num_layers=0 if first else prefusion_layers)
  base = paper_stage(model, stage, template=template, name=name)
  changed = dataclasses.replace(model, compressor=compressor, prefusion=prefusion, detach_text=False)
  train = _stage1(kind, name) if first else _stage2(kind, name)
  return Experiment(changed, base.data, train)


def _stage1(kind: str, name: str) -> TrainConfig:
  trained = '(projector|compressor)/.*'
  return TrainConfig(
    groups=((trained, 1e-3), ('.*', 'frozen')), init_from=f'runs/{name}_start', init_fresh=(trained,), epochs=1.0
  )


def _stage2(kind: str, name: str) -> TrainConfig:
  stage1 = f'runs/{name}_{"none" if kind in _BY_ALL_PATCHES else kind}_stage1'
  fresh = ('(compressor|prefusion)/.*',)
  if kind.startswith('prumerge'):
    return TrainConfig(
      lora_rank=128,
      lora_alpha=256.0,
      lora_targets=('decoder/layers/.*_proj',),
      groups=(('lora/.*', 2e-4), ('(vision|decoder)/.*', 'frozen'), ('.*', 2e-5)),
      init_from=f'runs/{name}_none_stage2',
      init_fresh=fresh,
      batch_size=128,
      epochs=1.0,
    )
  return TrainConfig(
    groups=(('vision/.*', 'frozen'), ('.*', 2e-5)),
    init_from=stage1,
    init_fresh=fresh,
    batch_size=128,
    epochs=2.0 if kind in ('mqt', 'voco') else 1.0,
  )

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

Rates and batches of a row that names none are those of LLaVA-v1.5. `query` and `average` are LLaVA-Mini's, with its
pre-fusion; the others have none, and text embeddings that train. `prefusion_layers` gives any kind another number, in
stage 2, where they start anew. Sources: the systems' own training scripts. LLaMA-VID's batch of stage 2 and its epochs
are taken from LLaVA-v1.5, VoCo's single token is the paper's (its code has two), and PruMerge's 32 tokens stand for
what its outliers come to in the mean. Both stages of `none` hold the whole tower, for PruMerge goes on from them with
one layer more than the others read. LLaMA-VID's stage 2 takes one question of each record, since its token reads all
instruction tokens of its row: that of an earlier question would know a later one.
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
  model: LlavaMiniConfig, kind: str, stage: str, *, template: str, name: str, prefusion_layers: int | None = None
) -> Experiment:
  """Stage 1 or 2 of a system with its own compressor, on any tower and decoder.

  Args:
    model: its `compressor` and the number of its pre-fusion layers are replaced.
    stage: stage1 or stage2.
    name: begins the names of the runs, `runs/{name}_{kind}_stage1`, of query and average `runs/{name}_stage1`; all
      begin with `runs/{name}_start`.
    prefusion_layers: of stage 2; None = of query and average those of the model, of the others 0.
  Raises:
    ConfigError: another kind or stage, or a model that cannot have the compressor.
  """
  require_choice('kind', kind, COMPRESSORS)
  require_choice('stage', stage, ('stage1', 'stage2'))
  compressor = DEFAULTS[kind]
  first, own = stage == 'stage1', kind in ('query', 'average')
  layers = prefusion_layers if prefusion_layers is not None else model.prefusion.num_layers if own else 0
  prefusion = dataclasses.replace(model.prefusion, num_layers=0 if first else layers)
  if own:
    changed = dataclasses.replace(model, compressor=compressor, prefusion=prefusion)
    return paper_stage(changed, stage, template=template, name=name)
  if first:  # of mqt with all its queries
    compressor = DEFAULTS['none'] if kind in _BY_ALL_PATCHES else dataclasses.replace(compressor, elastic=False)
  vision = dataclasses.replace(model.vision, keep_unused_layers=True) if compressor.kind == 'none' else model.vision
  base = paper_stage(model, stage, template=template, name=name)
  changed = dataclasses.replace(model, vision=vision, compressor=compressor, prefusion=prefusion, detach_text=False)
  train = _stage1(kind, name) if first else _stage2(kind, name)
  alone = kind == 'llama_vid' and not first
  return Experiment(changed, dataclasses.replace(base.data, max_turns=1) if alone else base.data, train)


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

"""The paper's training stages (Table 9, Sec. 4.3) as functions of a model; `configs/` names decoder and template.

| stage | starts from | reads | trains |
|---|---|---|---|
| stage1 | `runs/start`: CLIP tower and language model, imported | captions, every patch to the decoder | projector |
| stage1_full | the same | captions, compressed and fused as in stage 2 | projector, compressor, pre-fusion |
| stage2 | stage 1 | instructions, one token per image | all but the tower |
| stage2_hd | stage 1 | instructions, 2 × 2 crops and the whole image, 8 × 8 tokens | all but the tower |
| stage2_video | stage 1 | instructions about images and videos (a frame per second, 60 at most) | all but the tower |
| stage2_lora | stage 1 | as stage2 | projector, compressor, pre-fusion, and adapters of the decoder |
| finetune_qlora | stage 2 | as stage2 | projector, compressor, and adapters of pre-fusion and decoder, kept in 4 bits |

Batches of stage2_video are of like length, images and videos apart, so that images are not laid out for 60 frames.

stage1_full is what the released training script does; the paper's stage 1 has neither compressor nor pre-fusion.
stage2_lora is not the paper's: rank 128, alpha 256 and the adapters' rate are those of LLaVA's finetune_lora.sh. Nor is
finetune_qlora, for one chip of 16 GB or more: rank 64, alpha 16, rate and batch are QLoRA's for 7B and 13B
(arXiv:2305.14314, Appendix B).
"""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import LlavaMiniConfig, require_choice
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

STAGES = ('stage1', 'stage1_full', 'stage2', 'stage2_hd', 'stage2_video', 'stage2_lora', 'finetune_qlora')
FRAMES = 60
SCENE_TEXT = 280  # tokens of text that every generated scene's questions and answers fit in
VISUAL_COUNTS = (1, 8, FRAMES)  # of a batch: an image, a few of them or a short clip, a video


def paper_stage(model: LlavaMiniConfig, stage: str, *, template: str, name: str) -> Experiment:
  """One stage for any decoder: AdamW, cosine, warm-up 0.03, batch 256.

  Stage 1 is one epoch at 1e-3, stage 2 two epochs, the decoder at 1e-4 and the multimodal modules at 1e-5. Text
  embeddings are detached, as in the released code: unless they are the output head too, they get no gradient and are
  left out of the optimizer.

  Args:
    name: begins the names of the runs: `runs/{name}_start`, `runs/{name}_stage1`.
  Raises:
    ConfigError: another stage.
  """
  require_choice('stage', stage, STAGES)
  if stage.startswith('stage1'):
    return _stage1(model, full=stage == 'stage1_full', start=f'runs/{name}_start')
  return _stage2(model, stage, template=template, name=name)


def _stage1(model: LlavaMiniConfig, *, full: bool, start: str) -> Experiment:
  trained = '(projector|compressor|prefusion)/.*' if full else 'projector/.*'
  if not full:
    model = model.without_compression()
  train = TrainConfig(
    groups=((trained, 1e-3), ('(vision|decoder)/.*', 'frozen')), init_from=start, init_fresh=(trained,), epochs=1.0
  )
  return Experiment(
    model, DataConfig(dataset='data/llava_captions', template='plain', row_length=1024, truncate=True), train
  )


def _stage2(model: LlavaMiniConfig, stage: str, *, template: str, name: str) -> Experiment:
  tied = model.decoder.tie_word_embeddings  # then the table is the head too, and trains
  data = DataConfig(dataset='data/llava_instructions', template=template, row_length=2048, truncate=True)
  if stage == 'stage2_hd':
    model = dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, grid=8))
    data = dataclasses.replace(data, grid=2)
  if stage == 'stage2_video':
    model = dataclasses.replace(model, visual_chunk=12)
    data = dataclasses.replace(
      data,
      dataset='',
      mixture=(('data/llava_instructions', 'train', 'all', 1.0), ('data/video_instructions', 'train', 'all', 1.0)),
      visuals_per_row=FRAMES,
      video_max_frames=FRAMES,
      fused_text=1024,
      group_by_length=True,
      visual_counts=VISUAL_COUNTS,
    )
  train = TrainConfig(
    groups=(
      ('vision/.*', 'frozen'),
      *(() if tied else (('decoder/embed_tokens', 'frozen'),)),
      ('(projector|compressor|prefusion)/.*', 1e-5),
      ('decoder/.*', 1e-4),
    ),
    init_from=f'runs/{name}_stage1',
    init_fresh=('(compressor|prefusion)/.*',),
    epochs=2.0,
  )
  if stage == 'stage2_lora':
    train = dataclasses.replace(
      train,
      lora_rank=128,
      lora_alpha=256.0,
      lora_targets=('decoder/layers/.*_proj',),
      groups=(('lora/.*', 2e-4), ('(vision|decoder)/.*', 'frozen'), ('.*', 1e-5)),
    )
  if stage == 'finetune_qlora':
    train = dataclasses.replace(
      train,
      init_from=f'runs/{name}_stage2',
      init_fresh=(),
      batch_size=16,
      accumulate=16,
      param_dtype='bfloat16',
      lora_base='int4',
      lora_rank=64,
      lora_alpha=16.0,
      lora_targets=('(prefusion|decoder)/layers/.*_proj',),
      groups=(('lora/.*', 2e-4), ('(projector|compressor)/.*', 1e-5), ('.*', 'frozen')),
    )
  return Experiment(model, data, train)


def scenes_stage1(model: LlavaMiniConfig, *, epochs: float) -> Experiment:
  """For a small model what tower, language model and stage 1 are in the paper: it learns to see and to answer.

  Every patch goes to the decoder, and all parameters train from random numbers, on generated scenes (`data/scenes.py`).
  The tower is held whole, for PruMerge goes on with one layer more than the others read.
  """
  model = model.without_compression()
  model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, keep_unused_layers=True))
  train = TrainConfig(
    groups=(('.*', 6e-4),), batch_size=16, epochs=epochs, weight_decay=0.05, beta2=0.99, log_every=20, save_every=500
  )
  return Experiment(model, _side_by_side(text=256, slots=model.tokens_per_visual), train)


def scenes_stage2(model: LlavaMiniConfig, *, epochs: float) -> Experiment:
  """On from `scenes_stage1` as the paper's stage 2 from its own: compressor and pre-fusion anew, the tower frozen.

  Rows hold all questions about a scene; those of a sweep's points too, if `sweep.grid.with_text_room` made them with
  `SCENE_TEXT`.
  """
  train = dataclasses.replace(
    scenes_stage1(model, epochs=epochs).train,
    groups=(('vision/.*', 'frozen'), ('.*', 6e-4)),
    init_from='runs/scenes_stage1',
    init_fresh=('(compressor|prefusion)/.*',),
  )
  return Experiment(model, _side_by_side(text=SCENE_TEXT, slots=model.tokens_per_visual), train)


def _side_by_side(*, text: int, slots: int) -> DataConfig:
  """The questions about a scene in one row, as many as fit."""
  sizes = dict(row_length=text + slots, fused_text=224)
  return DataConfig(dataset='data/scenes', template='qa', side_by_side=True, **sizes)

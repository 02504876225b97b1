"""The paper's two training stages (Table 9, Sec. 4.3) as functions of a model; `configs/` names data and sizes."""

from __future__ import annotations

import dataclasses

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig, PrefusionConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

STAGES = ('stage1', 'stage2')


def paper_stage(model: LlavaMiniConfig, stage: str, *, template: str, dataset: str) -> Experiment:
  """One stage for any decoder: AdamW, cosine, warm-up 0.03, batch 256.

  stage1: caption pretraining; the projector alone trains (1e-3, 1 epoch), every patch goes to the decoder, compressor
  and pre-fusion are absent.
  stage2: instruction tuning; all but the vision tower train (decoder 1e-4, multimodal modules 1e-5, 2 epochs). Text
  embeddings are detached, as in the released code, so they get no gradient and are left out of the optimizer.

  Raises:
    ConfigError: another stage.
  """
  if stage == 'stage1':
    model = dataclasses.replace(
      model, compressor=CompressorConfig(kind='none'), prefusion=PrefusionConfig(num_layers=0)
    )
    groups = (('projector/.*', 1e-3), ('(vision|decoder)/.*', 'frozen'))
    data = DataConfig(dataset=dataset, template='plain', row_length=1024)
    return Experiment(model, data, TrainConfig(groups=groups, epochs=1.0))
  if stage == 'stage2':
    groups = (
      ('vision/.*', 'frozen'),
      ('decoder/embed_tokens', 'frozen'),
      ('(projector|compressor|prefusion)/.*', 1e-5),
      ('decoder/.*', 1e-4),
    )
    data = DataConfig(dataset=dataset, template=template, row_length=2048)
    return Experiment(model, data, TrainConfig(groups=groups, epochs=2.0))
  raise ConfigError(f'stage: expected one of {", ".join(STAGES)}; found {stage!r}')

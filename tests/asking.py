"""Models with random weights that can be asked, and what `generate` says for each prompt alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import transformers
from jax.sharding import Mesh
from small_model import quick_jit, random_params
from tiny_run import experiment

from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.generate import generate
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Prompt, PromptEncoder
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.tree import merge, sharded_model, unflatten

MODEL = dict(decoder=dict(num_hidden_layers=2, num_attention_heads=4), prefusion=dict(num_layers=2))


def one_device() -> Mesh:
  return make_mesh((1, 1, 1), devices=jax.devices()[:1])


def asked(data: dict | None = None, **model) -> Experiment:
  """The tiny run's experiment with two layers everywhere and such fields; sections of the model as mappings."""
  base = experiment('')
  sections = {name: {**MODEL.get(name, {}), **model.pop(name, {})} for name in ('decoder', 'prefusion', 'compressor')}
  changed = {name: dataclasses.replace(getattr(base.model, name), **fields) for name, fields in sections.items()}
  return dataclasses.replace(
    base, model=dataclasses.replace(base.model, **changed, **model), data=dataclasses.replace(base.data, **data or {})
  )


def loaded(config: Experiment, tokenizer: transformers.PreTrainedTokenizerFast, mesh: Mesh | None = None) -> Loaded:
  """With weights large enough for answers to be long and odd."""
  mesh = mesh or one_device()
  graphdef, leaves = sharded_model(config.model, mesh)
  params = {path: jax.device_put(2 * x, leaves[path].sharding) for path, x in random_params(config.model).items()}
  return Loaded(config, tokenizer, graphdef, unflatten(params), mesh, 0)


def images(*seeds: int, size: tuple[int, int] = (20, 28)) -> list[np.ndarray]:
  """Noise, each of its own seed."""
  return [np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed in seeds]


def question(text: str, *media: Sequence[np.ndarray], name: str = 'prompt') -> Prompt:
  """Images lead, a video is more than one frame."""
  tags = ''.join('<image>\n' if len(some) == 1 else '<video>\n' for some in media)
  return Prompt([{'role': 'user', 'content': tags + text}], media, name)


def alone(run: Loaded, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
  """Greedy ids of one prompt after another by `generate`, which knows neither slots nor buckets.

  Rows are padded alike, so that one program serves all; the end of a turn ends nothing.
  """
  encoder = PromptEncoder(run.experiment, run.tokenizer)
  encoded = [encoder.encode(prompt) for prompt in prompts]
  shape = encoder.shape(encoder.sizes(prompts, encoded))
  whole = quick_jit(lambda params, batch: generate(merge(run.graphdef, params), batch, max_new_tokens=tokens))
  batches = [encoder.batch([p], [e], shape, rows=1) for p, e in zip(prompts, encoded, strict=True)]
  return [np.asarray(whole(run.params, batch))[0].tolist() for batch in batches]

"""How fast a run is, between two looks at the clock; counts the shapes the device computes, so padding is included."""

from __future__ import annotations

import functools
import time

import jax
import numpy as np

from llava_mini_jax.analyze.flops import forward_flops, peak_flops, training_flops
from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.train.lora import PREFIX, adapted_paths
from llava_mini_jax.train.step import Trainer
from llava_mini_jax.train.tree import flatten
from llava_mini_jax.types import Batch


@jax.jit
def _share_in_use(segment_ids: jax.Array) -> jax.Array:
  return (segment_ids > 0).mean()


def trained_modules(trainer: Trainer) -> dict[str, set[str]]:
  """`trains` and `adapts` of `flops.training_flops`."""
  paths = flatten(trainer.abstract['params'])
  own = {path for path in paths if not path.startswith(PREFIX) and path != 'decoder/embed_tokens'}
  return {name: {path.split('/')[0] for path in of} for name, of in (('trains', own), ('adapts', adapted_paths(paths)))}


class Throughput:
  def __init__(self, config: LlavaMiniConfig, trainer: Trainer):
    self._config = config
    modules = trained_modules(trainer)
    self._flops_of = functools.cache(lambda sizes: training_flops(config, **modules, **dict(sizes)))
    self._peak = peak_flops(config.dtype)
    self._time: float | None = None
    self._reset()

  def _reset(self) -> None:
    self._steps, self._tokens, self._images, self._flops = 0, 0, 0, 0.0
    self._filled: list[jax.Array] = []

  def count(self, batch: Batch) -> None:
    """A step on this global batch."""
    rows, length = batch.tokens.shape
    visuals, views = batch.pixels.shape[1:3]
    sizes = dict(rows=rows, length=length, visuals=visuals, views=views, fused_text=batch.fuse_index.shape[2])
    self._steps += 1
    self._tokens += rows * length
    self._images += rows * visuals
    self._filled.append(_share_in_use(batch.segment_ids))
    self._flops += self._flops_of(tuple(sizes.items()))
    if batch.features is not None:
      self._flops -= forward_flops(self._config, **sizes).vision  # which nobody computes

  def since_last(self) -> dict[str, float]:
    """{} the first time, which would time the compilation."""
    now, before = time.perf_counter(), self._time
    self._time = now
    found = {}
    if before is not None:
      seconds = now - before
      found = dict(
        steps_per_second=self._steps / seconds,
        tokens_per_second=self._tokens / seconds,
        images_per_second=self._images / seconds,
        row_fill=float(np.mean(jax.device_get(self._filled))),
        mfu=self._flops / seconds / self._peak,
      )
    self._reset()
    return found

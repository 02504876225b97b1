"""What memory a video takes on the device, by number of frames: encoding, pre-fusion and splicing of one row.

`LlavaMiniConfig.visual_chunk` frames are in flight at a time, so what grows with the video is its pixels (the
argument), one row of C tokens per frame (the output) and the float32 sum of that row; nothing of the towers does.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.data.rows import build_row
from llava_mini_jax.infer.prompts import prompt_shape
from llava_mini_jax.models.llava_mini import LlavaMini, build
from llava_mini_jax.train.tree import abstract_model
from llava_mini_jax.types import IMAGE_TOKEN_ID, Batch


def video_row(config: LlavaMiniConfig, frames: int, text: int = 32) -> Batch:
  """One row, as asking lays it out: a video of black frames, then `text` instruction tokens."""
  shape = prompt_shape(config, length=frames * config.tokens_per_visual + text, text=text, visuals=frames)
  ids = np.r_[IMAGE_TOKEN_ID, np.ones(text, np.int32)].astype(np.int32)
  row = build_row(ids, np.zeros(len(ids), bool), shape, where='video', visuals_per_tag=[frames])
  size = config.vision.image_size
  row['pixels'] = np.broadcast_to(np.uint8(0), (shape.visuals, 1, size, size, 3))  # takes no memory before it is used
  return Batch(**{name: value[np.newaxis] for name, value in row.items()})


def memory_by_frames(
  config: LlavaMiniConfig, frames: Sequence[int], *, run: bool, text: int = 32
) -> Iterator[dict[str, Any]]:
  """One row of the table per number of frames, in ascending order.

  Args:
    run: also encode such a video with random weights, which must fit this machine, and report the process's peak
      resident memory so far. Without, nothing of the size of the model or the video is allocated.
  Yields:
    {frames, argument_bytes (pixels and indices), output_bytes, temporary_bytes (compiler's own figure) and, if run,
    peak_resident_bytes}.
  """
  graphdef, abstract = abstract_model(config)
  encode = jax.jit(lambda params, batch: LlavaMini.embed(nnx.merge(graphdef, params), batch))
  params = nnx.split(build(config, jax.random.key(0)))[1] if run else abstract
  for count in sorted(frames):
    batch = video_row(config, count, text)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    compiled = encode.lower(params, shapes).compile()
    memory = compiled.memory_analysis()
    batch_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    found = dict(
      frames=count,
      argument_bytes=batch_bytes,
      output_bytes=memory.output_size_in_bytes,
      temporary_bytes=memory.temp_size_in_bytes,
    )
    if run:
      tokens = jax.block_until_ready(compiled(params, jax.device_put(batch)))
      if not np.isfinite(np.asarray(tokens[0, :: max(1, count // 8)])).all():
        raise FloatingPointError(f'{count} frames: the tokens are not finite')
      found['peak_resident_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
      del batch, tokens
    yield found


def describe(rows: Sequence[dict[str, Any]]) -> str:
  """The table, in MiB."""
  columns = [name for name in rows[0] if name != 'frames']
  lines = ['frames  ' + '  '.join(f'{name.removesuffix("_bytes"):>14}' for name in columns) + '   (MiB)']
  for row in rows:
    lines.append(f'{row["frames"]:6}  ' + '  '.join(f'{row[name] / 2**20:14.1f}' for name in columns))
  return '\n'.join(lines)

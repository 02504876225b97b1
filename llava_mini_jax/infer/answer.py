"""Answers of all processes of a run, batch by batch: for evaluation. One process asks through `engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_mini_jax.data.conversation import end_of_turn, load_template
from llava_mini_jax.infer.generate import generate
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Prompt, PromptEncoder
from llava_mini_jax.sharding import batch_sharding, check_batch, replicated, use_mesh
from llava_mini_jax.train.tree import merge
from llava_mini_jax.types import Batch


class Answerer:
  """Asks a loaded model. Greedy; an answer ends with the template's end of turn or after `max_new_tokens`."""

  def __init__(self, run: Loaded, *, max_new_tokens: int = 32):
    self.run, self.max_new_tokens = run, max_new_tokens
    self.encoder = PromptEncoder(run.experiment, run.tokenizer)
    graphdef = run.graphdef
    eos_id = end_of_turn(run.tokenizer, load_template(run.experiment.data.template))
    self._generate = jax.jit(
      lambda params, batch: generate(merge(graphdef, params), batch, max_new_tokens=max_new_tokens, eos_id=eos_id),
      out_shardings=replicated(run.mesh),  # every process reads all answers
    )

  def answers(self, prompts: Sequence[Prompt], *, batch_size: int) -> Iterator[str]:
    """One answer per prompt, in order; the next batch is read and prepared while the devices work on one.

    Lengths and numbers of visuals are rounded up, so a few programs serve all batches.

    Args:
      prompts: may be read when they are asked for; a process asks for those of its own rows, once each, and for the
        last one where a shorter last batch leaves it no other.
      batch_size: rows per device batch; a last, shorter batch is padded.
    Raises:
      MeshError: batch_size does not divide over the mesh. DataError: a bad prompt, by name.
    """
    check_batch(batch_size, self.run.mesh)
    waiting = None
    for start in range(0, len(prompts), batch_size):
      count = min(batch_size, len(prompts) - start)
      batch = self._own_batch(prompts, start, count, rows=batch_size)
      with use_mesh(self.run.mesh):
        ids = self._generate(self.run.params, batch)
      if waiting:
        yield from self._texts(*waiting)
      waiting = ids, count
    if waiting:
      yield from self._texts(*waiting)

  def _own_batch(self, prompts: Sequence[Prompt], start: int, count: int, *, rows: int) -> Batch:
    """The global batch of `count` prompts from `start` on, of which this process reads what its devices hold."""
    where = batch_sharding(self.run.mesh)
    held = [range(rows)[part] for (part,) in where.addressable_devices_indices_map((rows,)).values()]
    # A row past the last prompt repeats it, as `PromptEncoder.batch` does.
    mine = sorted({min(row, count - 1) for part in held for row in part})
    place = {row: index for index, row in enumerate(mine)}
    own = [prompts[start + row] for row in mine]
    encoded = [self.encoder.encode(prompt) for prompt in own]
    sizes = self.encoder.sizes(own, encoded)
    if jax.process_count() > 1:  # all rows of a batch have one shape
      sizes = tuple(multihost_utils.process_allgather(np.array(sizes, np.int32)).max(axis=0).tolist())
    local = self.encoder.batch(own, encoded, self.encoder.shape(sizes), rows=len(own))

    def put(array: np.ndarray) -> jax.Array:
      def of_device(index: tuple[slice, ...]) -> np.ndarray:
        return array[[place[min(row, count - 1)] for row in range(rows)[index[0]]]]

      return jax.make_array_from_callback((rows, *array.shape[1:]), where, of_device)

    return jax.tree.map(put, local)

  def _texts(self, ids: jax.Array, count: int) -> list[str]:
    return [self._decode_text(row[row >= 0]) for row in np.asarray(ids)[:count]]

  def _decode_text(self, ids: Sequence[int]) -> str:
    return self.run.tokenizer.decode(ids, skip_special_tokens=True).strip()

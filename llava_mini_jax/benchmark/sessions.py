"""What is saved once an image or a video has been seen: time and FLOPs of later questions, and memory of long videos.

Enters: the name of a size, as `asking.model_of`. Leaves: seconds to the first token of a question asked afresh and of
one asked in a session, without history; bytes on the devices by number of frames.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llava_mini_jax.analyze.flops import later_question_flops, prompt_flops
from llava_mini_jax.benchmark.asking import KINDS, engine_of, model_of, random_run, requests, text_tokens
from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.markdown import table
from llava_mini_jax.sharding import make_mesh

ONE_TOKEN = Sampling(max_new_tokens=1, ignore_end=True)
KEPT = {'image': ('seen',), 'hd': ('seen',), 'images': ('seen',), 'video': ('seen', 'features')}


@dataclasses.dataclass(frozen=True)
class Gain:
  """Seconds to the first token: medians of the rounds."""

  size: str
  kind: str
  keep: str  # of `visuals.KEEP`
  afresh: float
  later: float
  flops_afresh: float
  flops_later: float


def gains(size: str, *, dtype: str = '', rounds: int = 20) -> Iterator[Gain]:
  """Each kind of input with visuals, and each way to keep them."""
  run = random_run(model_of(size, dtype), make_mesh((1, 1, 1), jax.devices()[:1]))
  for kind, ways in KEPT.items():
    engine = engine_of(run, KINDS[kind], 1)
    (asked,) = requests(run.experiment.model, KINDS[kind], 1, 1)
    for keep in ways:
      media = [engine.look(some, keep=keep, grid=asked.grid) for some in asked.prompt.media]
      times = [(_first(engine, asked), _first(engine, _about(media, asked, i))) for i in range(rounds + 1)]
      afresh, later = (statistics.median(times) for times in zip(*times[1:], strict=True))  # the first compiles
      flops = _flops(run.experiment.model, kind, keep, text_tokens(engine, asked))
      yield Gain(size, kind, keep, afresh, later, *flops)


def _first(engine: Engine, request: Request) -> float:
  began = time.perf_counter()
  engine.generate([request])
  return time.perf_counter() - began


def _about(media: Sequence, asked: Request, number: int) -> Request:
  """Another question about what is kept; what was fused with an earlier one would not be read again."""
  text = asked.prompt.turns[0]['content'].replace('this', f'thi{chr(ord("a") + number % 26)}')
  return dataclasses.replace(asked, prompt=Prompt([{'role': 'user', 'content': text}], media), sampling=ONE_TOKEN)


def _flops(model: LlavaMiniConfig, kind: str, keep: str, text: int) -> tuple[float, float]:
  sizes = dict(visuals=KINDS[kind].visuals, views=KINDS[kind].views)
  whole = prompt_flops(model, text, **sizes)
  if keep == 'features':
    return whole.total, whole.total - whole.vision
  return whole.total, later_question_flops(model, text, earlier=0, **sizes).prefusion + whole.decoder


@dataclasses.dataclass(frozen=True)
class Held:
  """Of a session with one video, after a question about it."""

  frames: int
  seeing: int  # bytes on the devices besides weights and slots
  slot: int  # bytes of the decoder's row, which holds a token per frame
  host: int  # bytes of features in host memory
  frames_per_second: float  # while it is shown
  question: float  # seconds to the first token of a question that is new, with all that is compiled


def video_sessions(size: str, frames: Sequence[int], *, chunk: int = 16, dtype: str = '') -> Iterator[Held]:
  """A session for each length, features on the host."""
  model = model_of(size, dtype)
  room = max(frames) + 128
  decoder = dataclasses.replace(model.decoder, max_position_embeddings=max(room, model.decoder.max_position_embeddings))
  run = random_run(dataclasses.replace(model, decoder=decoder), make_mesh((1, 1, 1), jax.devices()[:1]))
  weights = sum(x.nbytes for x in jax.tree.leaves(run.params))
  side = model.vision.image_size
  for count in sorted(frames):
    engine = Engine(run, slots=1, max_length=count + 128, visual_chunk=chunk)
    noise = (np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8) for i in range(count))
    for few in {min(chunk, count), count % chunk or chunk}:  # compiles
      engine.look(np.zeros((few, side, side, 3), np.uint8), keep='features')
    began = time.perf_counter()
    video = engine.look(noise, keep='features')
    shown = time.perf_counter() - began
    video.of_video = True
    asked = [Request(Prompt([{'role': 'user', 'content': f'<video>\n{text}'}], [video]), ONE_TOKEN) for text in 'ab']
    question = [_first(engine, request) for request in asked][-1]
    slot = sum(x.nbytes for x in jax.tree.leaves(engine.core.state))
    live = sum(x.nbytes for x in jax.live_arrays())
    yield Held(count, live - weights - slot, slot, video.host_bytes, count / shown, question)
    del engine, video, asked


def describe_gains(found: Sequence[Gain]) -> str:
  head = ['size', 'input', 'kept', 'afresh ms', 'later ms', 'speed-up', 'GFLOP afresh', 'later', 'ratio']
  rows = []
  for g in found:
    cells = [g.size, g.kind, g.keep, f'{1e3 * g.afresh:.1f}', f'{1e3 * g.later:.1f}', f'{g.afresh / g.later:.1f}']
    cells += [f'{g.flops_afresh / 1e9:.2f}', f'{g.flops_later / 1e9:.2f}', f'{g.flops_afresh / g.flops_later:.1f}']
    rows.append(cells)
  return '\n'.join(table(head, rows))


def describe_video(found: Sequence[Held]) -> str:
  head = ['frames', 'device MiB, seeing', 'device MiB, row', 'host MiB', 'frames/s', 'new question s']
  rows = []
  for h in found:
    sizes = [f'{x / 2**20:.2f}' for x in (h.seeing, h.slot, h.host)]
    rows.append([h.frames, *sizes, f'{h.frames_per_second:.0f}', f'{h.question:.2f}'])
  return '\n'.join(table(head, rows))

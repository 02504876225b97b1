"""How fast a model with random weights answers: by kind of input, and by number of requests at once.

Enters: a model's config. Leaves: seconds to the first token of all requests, which come together, and tokens per second
after it. `as_v15` gives the model that it is compared with: the same tower, projector and decoder, but every patch goes
to the decoder, and there is no pre-fusion (LLaVA-v1.5). `torch_asking` does the same work in torch.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_mini_jax.analyze.flops import prompt_flops
from llava_mini_jax.benchmark.train_step import SIZES
from llava_mini_jax.config import LlavaMiniConfig, require_choice
from llava_mini_jax.data.tokenizer import train_tokenizer
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.load import Loaded, slimmed
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.markdown import table
from llava_mini_jax.models.llava_mini import build
from llava_mini_jax.presets import PRESETS
from llava_mini_jax.sharding import make_mesh, use_mesh
from llava_mini_jax.train.tree import flatten, sharded_model, unflatten

QUESTION = 'What is this?'
MINI, V15 = 'LLaVA-Mini', 'LLaVA-v1.5 style'
_ROOM = 96  # tokens of a question and its answer in a slot, besides vision


@dataclasses.dataclass(frozen=True)
class Kind:
  """tags: of one prompt, with how many visuals each stands for. grid: as `Request.grid`."""

  tags: tuple[tuple[str, int], ...] = ()
  grid: int = 1

  @property
  def visuals(self) -> int:
    return sum(count for _, count in self.tags)

  @property
  def views(self) -> int:
    return self.grid**2 + 1 if self.grid > 1 else 1


KINDS = {
  'text': Kind(),
  'image': Kind((('<image>', 1),)),
  'hd': Kind((('<image>', 1),), grid=2),
  'images': Kind((('<image>', 1),) * 4),
  'video': Kind((('<video>', 16),)),
}
OF_V15 = ('image', 'images')
OF_TORCH = ('text', 'image', 'images', 'video')


def model_of(size: str, dtype: str = '') -> LlavaMiniConfig:
  """Of `train_step.SIZES` or a preset, in another dtype unless that is ''. Raises ConfigError for another name."""
  require_choice('size', size, tuple(SIZES | PRESETS))
  model = SIZES[size]().model if size in SIZES else PRESETS[size]()
  longest = KINDS['images'].visuals * model.vision.num_patches + _ROOM  # as LLaVA-v1.5
  most = max(model.decoder.max_position_embeddings, longest)
  decoder = dataclasses.replace(model.decoder, max_position_embeddings=most)
  return dataclasses.replace(model, decoder=decoder, dtype=dtype or model.dtype)


def random_run(model: LlavaMiniConfig, mesh: Mesh, *, quantize: str = '', seed: int = 0) -> Loaded:
  """As `load_run` gives a run, slim."""
  graphdef, leaves = sharded_model(model, mesh)
  dtype = np.dtype(model.dtype)

  @functools.partial(jax.jit, out_shardings={path: leaf.sharding for path, leaf in leaves.items()})
  def draw(key):
    made = flatten(nnx.to_pure_dict(nnx.split(build(model, key))[1]))
    return {path: slimmed(path, value, dtype) for path, value in made.items()}

  with use_mesh(mesh):
    params = draw(jax.random.key(seed))
  if quantize:
    params = {path: slimmed(path, value, dtype, quantize) for path, value in params.items()}
  tokenizer = train_tokenizer([QUESTION], min(512, model.decoder.vocab_size))
  experiment = Experiment(model, DataConfig(dataset='none', template='qa'), TrainConfig())
  return Loaded(experiment, tokenizer, graphdef, unflatten(params), mesh, 0)


def as_v15(run: Loaded) -> Loaded:
  """The model that LLaVA-Mini is compared with, with those weights of `run` that it has."""
  model = run.experiment.model.without_compression()
  graphdef, leaves = sharded_model(model, run.mesh)
  params = flatten(run.params)
  return dataclasses.replace(
    run,
    experiment=dataclasses.replace(run.experiment, model=model),
    graphdef=graphdef,
    params=unflatten({path: params[path] for path in leaves}),
  )


def requests(model: LlavaMiniConfig, kind: Kind, count: int, tokens: int, seed: int = 0) -> list[Request]:
  """So many prompts of one kind, each with its own images of noise, answered in so many tokens."""
  rng, side = np.random.default_rng(seed), model.vision.image_size
  made = []
  for i in range(count):
    media = [rng.integers(0, 256, (of_tag, side, side, 3), np.uint8) for _, of_tag in kind.tags]
    text = '\n'.join([*(tag for tag, _ in kind.tags), QUESTION])
    prompt = Prompt([{'role': 'user', 'content': text}], media, f'request {i}')
    made.append(Request(prompt, Sampling(max_new_tokens=tokens, ignore_end=True), grid=kind.grid))
  return made


def engine_of(run: Loaded, kind: Kind, slots: int) -> Engine:
  """Just large enough for `slots` requests of one kind; all visuals of all of them are encoded together."""
  model = run.experiment.model
  length = kind.visuals * model.slots_per_visual(kind.views) + _ROOM
  return Engine(run, slots=slots, max_length=-(-length // 32) * 32, visual_chunk=max(1, slots * kind.visuals))


@dataclasses.dataclass(frozen=True)
class Speed:
  """Of `requests` that come at once. Seconds of every round."""

  size: str
  system: str  # LLaVA-Mini, LLaVA-v1.5 style; torch
  kind: str
  requests: int
  tokens: int  # of each answer
  first: tuple[float, ...]  # until all have their first token
  rest: tuple[float, ...]  # from then until all have their last
  prompt_flops: float  # of one prompt, every product
  held_bytes: int  # on the devices: weights, slots; 0 = unknown
  peak_bytes: int = 0  # on the devices, with what is temporary; 0 = the device does not tell

  @property
  def tokens_per_second(self) -> float:
    return self.requests * (self.tokens - 1) / min(self.rest)

  @property
  def visuals_per_second(self) -> float:
    return self.requests * KINDS[self.kind].visuals / min(self.first)


def answered(engine: Engine, asked: Sequence[Request]) -> tuple[list[list[int]], float, float]:
  """Ids of each, and seconds as in `Speed`. Raises ArithmeticError if they were not read together."""
  began = time.perf_counter()
  streams = [engine.submit(request) for request in asked]
  engine.step()
  first = time.perf_counter() - began
  if any(len(stream.ids) != 1 for stream in streams):
    raise ArithmeticError(f'expected one token of every answer; found {[len(stream.ids) for stream in streams]}')
  while engine.step():
    pass
  return [stream.ids for stream in streams], first, time.perf_counter() - began - first


def text_tokens(engine: Engine, request: Request) -> int:
  """Of its prompt, without vision slots."""
  laid = engine.encoder.lay(request.prompt, request.grid)
  return len(laid.tokens) - laid.slots.size


def measure(
  run: Loaded, system: str, size: str, kind: str, count: int, *, tokens: int, rounds: int
) -> tuple[Speed, list[list[int]]]:
  """And the ids of the answers, to be compared."""
  model, what = run.experiment.model, KINDS[kind]
  engine, asked = engine_of(run, what, count), requests(model, what, count, tokens)
  ids, _, _ = answered(engine, asked)  # compiles
  found = [answered(engine, asked)[1:] for _ in range(rounds)]
  held = jax.tree.leaves((run.params, engine.core.state))
  flops = prompt_flops(model, text_tokens(engine, asked[0]), visuals=what.visuals, views=what.views).total
  first, rest = zip(*found, strict=True)
  peak = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
  speed = Speed(size, system, kind, count, tokens, first, rest, flops, sum(x.nbytes for x in held), peak)
  return speed, ids


def measure_all(
  size: str,
  kinds: Sequence[str],
  counts: Sequence[int],
  *,
  dtype: str = '',
  tokens: int = 32,
  rounds: int = 5,
  torch: bool = True,
  tell: Callable[[str], None] = print,
) -> Iterator[Speed]:
  """Every kind and count: LLaVA-Mini, and of images LLaVA-v1.5's arithmetic; each beside torch in the same run.

  Args:
    torch: also ask `torch_asking`, which does the same work with the same weights in float32.
  Raises:
    ArithmeticError: torch answers otherwise, so that the times would not be of the same work.
  """
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  mini = random_run(model_of(size, dtype), mesh)
  systems = {MINI: mini, V15: as_v15(mini)}
  asker = None
  if torch:
    from llava_mini_jax.benchmark.torch_asking import TorchAsker  # needs torch, which [convert] brings

    asker = TorchAsker(mini)
  for kind in kinds:
    require_choice('kind', kind, tuple(KINDS))
    for count in counts:
      for system, run in systems.items():
        if system == V15 and kind not in OF_V15:
          continue
        tell(f'{size}, {kind}, {count} at once: {system}')
        speed, ids = measure(run, system, size, kind, count, tokens=tokens, rounds=rounds)
        yield speed
        if asker and kind in OF_TORCH:
          yield asker.measure(run, speed, ids, rounds=rounds)


def describe(found: Sequence[Speed]) -> str:
  """A table, with the ratio to torch's time (below 1: faster), and v1.5's time to first token over LLaVA-Mini's."""
  by_place = {(s.size, s.kind, s.requests, s.system): s for s in found}
  head = ['size', 'input', 'at once', 'system', 'first token ms', 'tokens/s', 'images/s', 'prompt GFLOP', 'MiB held']
  rows = []
  for s in found:
    peer = by_place.get((s.size, s.kind, s.requests, f'{s.system}, torch'))
    v15 = by_place.get((s.size, s.kind, s.requests, V15)) if s.system == MINI else None
    visuals = f'{s.visuals_per_second:,.1f}' if KINDS[s.kind].visuals else ''
    cells = [s.size, s.kind, s.requests, s.system, f'{1e3 * min(s.first):,.1f}', f'{s.tokens_per_second:,.0f}', visuals]
    held = max(s.held_bytes, s.peak_bytes)
    cells += [f'{s.prompt_flops / 1e9:,.2f}', f'{held / 2**20:,.0f}' if held else '']
    cells += [f'{min(s.first) / min(peer.first):.2f}', f'{min(s.rest) / min(peer.rest):.2f}'] if peer else ['', '']
    rows.append([*cells, f'{min(v15.first) / min(s.first):.2f}' if v15 else ''])
  return '\n'.join(table([*head, 'of torch: first', 'rest', 'v1.5 / Mini: first'], rows))

"""The next token of every slot: greedy or drawn, each by its own rules and from its own seed.

Enters: logits float32[B vocab] and the `Controls` of each slot. Leaves: one token per slot. Order of the rules, as in
`transformers` (generation/logits_process.py): repetition penalty (arXiv:1909.05858, section 4.1), temperature, top-k,
top-p (arXiv:1904.09751), min-p (arXiv:2407.01082). A draw is the largest of logits plus Gumbel noise, and the noise
depends on the seed and on how many tokens the slot has said: not on the slot, nor on what others say.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import ConfigError

COLDEST = 1e-6  # a lower temperature is greedy: logits divided by it would not be finite
MAX_LOGPROBS = 20  # OpenAI's limit of `top_logprobs`


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one answer is chosen and when it ends.

  Raises ConfigError: a value that cannot be.
  """

  max_new_tokens: int = 64
  temperature: float = 0.0  # 0 = greedy, and so is what is below COLDEST
  top_k: int = 0  # the k likeliest; 0 = all
  top_p: float = 1.0  # the fewest of the likeliest that have so much of the probability
  min_p: float = 0.0  # those with at least so much of the likeliest one's probability
  repetition_penalty: float = 1.0  # of tokens of the prompt and the answer
  seed: int = 0
  stop_ids: tuple[int, ...] = ()  # besides the template's end of turn
  stop: tuple[str, ...] = ()  # the answer ends before one of these
  top_logprobs: int = 0  # alternatives told of each token
  ignore_end: bool = False  # goes on after the template's end of turn

  def __post_init__(self):
    _expect('max_new_tokens', 'a positive integer', self.max_new_tokens, _whole(self.max_new_tokens, 1))
    _expect('temperature', 'a number from 0', self.temperature, _within(self.temperature, 0, math.inf))
    _expect('top_k', '0 or more', self.top_k, _whole(self.top_k, 0))
    _expect('top_p', 'more than 0, at most 1', self.top_p, _within(self.top_p, 0, 1) and self.top_p > 0)
    _expect('min_p', 'a probability', self.min_p, _within(self.min_p, 0, 1))
    penalty = self.repetition_penalty
    _expect('repetition_penalty', 'a positive number', penalty, _within(penalty, 0, math.inf) and penalty > 0)
    _expect('seed', 'an integer of 32 bits, 0 or more', self.seed, _whole(self.seed, 0) and self.seed < 2**32)
    _expect('stop', 'texts that are not empty', self.stop, all(isinstance(s, str) and s for s in self.stop))
    _expect('stop', 'a tuple', self.stop, isinstance(self.stop, tuple))
    few = _whole(self.top_logprobs, 0) and self.top_logprobs <= MAX_LOGPROBS
    _expect('top_logprobs', f'0 to {MAX_LOGPROBS}', self.top_logprobs, few)


def _whole(value: object, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _within(value: object, low: float, high: float) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value < math.inf


def _expect(field: str, expected: str, found: object, holds: bool) -> None:
  if not holds:
    raise ConfigError(f'Sampling.{field}: expected {expected}; found {found!r}')


DEFAULT = Sampling()


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Controls:
  """The numbers of `Sampling`, one of each per slot."""

  temperature: jax.Array  # float32[B]
  top_k: jax.Array  # int32[B]
  top_p: jax.Array  # float32[B]
  min_p: jax.Array  # float32[B]
  repetition_penalty: jax.Array  # float32[B]
  seed: jax.Array  # uint32[B]

  @classmethod
  def of(cls, sampling: list[Sampling]) -> Controls:
    """NumPy arrays, one row for each."""
    types = dict(top_k=np.int32, seed=np.uint32)
    names = [field.name for field in dataclasses.fields(cls)]
    rows = {n: np.array([getattr(s, n) for s in sampling], types.get(n, np.float32)) for n in names}
    rows['temperature'][rows['temperature'] < COLDEST] = 0
    return cls(**rows)


def choose(logits: jax.Array, used: jax.Array, said: jax.Array, controls: Controls) -> jax.Array:
  """float32[B vocab], tokens so far bool[B vocab], number of tokens said int32[B] -> int32[B]."""
  penalty = controls.repetition_penalty[:, None]
  logits = jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  greedy = jnp.argmax(logits, -1).astype(jnp.int32)

  def drawn():
    likely = allowed(logits / jnp.where(controls.temperature > 0, controls.temperature, 1.0)[:, None], controls)
    noise = jax.vmap(lambda seed, at: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), at), logits.shape[1:]))
    found = jnp.argmax(likely + noise(controls.seed, said), -1).astype(jnp.int32)
    return jnp.where(controls.temperature > 0, found, greedy)

  return jax.lax.cond((controls.temperature > 0).any(), drawn, lambda: greedy)  # sorting the vocabulary costs time


def allowed(logits: jax.Array, controls: Controls) -> jax.Array:
  """Logits [B vocab] -> the same, -inf where top-k, top-p or min-p leave a token out; the likeliest always stays."""
  vocab = logits.shape[1]
  ranked = jnp.flip(jnp.sort(logits, axis=-1), -1)
  rank = jnp.arange(vocab)
  kept = rank < jnp.where(controls.top_k > 0, controls.top_k, vocab)[:, None]
  # Each rule sees what the one before it left, as the processors of transformers do.
  before = jnp.cumsum(_probabilities(ranked, kept), -1) - _probabilities(ranked, kept)
  kept &= (before < controls.top_p[:, None]) | (rank == 0)
  share = _probabilities(ranked, kept)
  kept &= share >= controls.min_p[:, None] * share[:, :1]
  least = jnp.min(jnp.where(kept, ranked, jnp.inf), -1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)


def _probabilities(logits: jax.Array, kept: jax.Array) -> jax.Array:
  return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)


def log_probabilities(logits: jax.Array, tokens: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the model itself gave the tokens int32[B], before any rule, and the likeliest ones.

  Returns:
    float32[B]; float32[B top] and int32[B top], falling.
  """
  logits = jax.nn.log_softmax(logits, axis=-1)
  best, ids = jax.lax.top_k(logits, min(top, logits.shape[1]))
  return jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0], best, ids.astype(jnp.int32)

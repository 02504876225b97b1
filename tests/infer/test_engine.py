"""The engine: any mix in one call gives what each prompt gives alone, whoever joins or leaves in between."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from asking import alone, asked, images, loaded, question
from tiny_run import make_dataset

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.infer.core import PromptFailed
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.sharding import MeshError, make_mesh

pytestmark = pytest.mark.usefixtures('quick_compilation')

TOKENS = 6
MIX = [
  question('what color is it?', images(0)),
  question('hello'),
  question('compare these two pictures, please', images(1), images(2)),
  question('what happens?', images(*range(3, 8))),
  question('and what color is the other picture that the first one shows so well?', images(9)),
  question('col?', images(10, 11, 12), images(13)),
]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(make_dataset(tmp_path_factory.getbasetemp()) / 'tokenizer')


@pytest.fixture(scope='module')
def run(tokenizer):
  return loaded(asked(), tokenizer)


@pytest.fixture(scope='module')
def engine(run):
  return Engine(run, slots=4, max_length=128, visual_chunk=4)


@pytest.fixture(scope='module')
def expected(run):
  return alone(run, MIX, TOKENS)


def greedy(prompt, tokens: int = TOKENS, **fields) -> Request:
  return Request(prompt, Sampling(max_new_tokens=tokens, ignore_end=True, **fields))


def test_a_mix_gives_what_each_gives_alone(engine, expected):
  """Six prompts of different kinds and lengths, in four slots; ids exactly."""
  assert len({tuple(ids) for ids in expected}) == len(MIX) and all(len(set(ids)) > 1 for ids in expected)
  answers = engine.generate([greedy(prompt) for prompt in MIX])
  assert [answer.ids for answer in answers] == expected
  assert {answer.finish for answer in answers} == {'length'}
  assert [engine.generate([greedy(prompt)])[0].ids for prompt in MIX] == expected
  assert [answer.ids for answer in engine.generate([greedy(prompt) for prompt in reversed(MIX)])] == expected[::-1]


def test_staggered_joins_give_the_same(engine, expected):
  """One more request after every step, each of another length."""
  streams = []
  for i, prompt in enumerate(MIX):
    streams.append(engine.submit(greedy(prompt, TOKENS - i % 3)))
    engine.step()
  assert [s.result().ids for s in streams] == [ids[: TOKENS - i % 3] for i, ids in enumerate(expected)]


def test_a_cancelled_request_frees_its_slot(engine, expected):
  """Four slots are taken by answers that would go on; the fifth request waits for one, and only one, to leave."""
  long = [engine.submit(greedy(MIX[i], 60)) for i in range(4)]
  waiting = engine.submit(greedy(MIX[4]))
  for _ in range(3):
    engine.step()
  assert [len(s.ids) for s in long] == [3] * 4 and not waiting.ids
  long[1].cancel()
  engine.step()
  assert (long[1].finish, len(long[1].ids), len(waiting.ids)) == ('cancelled', 3, 1)
  queued = engine.submit(greedy(MIX[0]))
  queued.cancel()
  assert waiting.result().ids == expected[4]
  assert (queued.finish, queued.ids) == ('cancelled', [])
  assert long[0].ids[:TOKENS] == expected[0]
  for stream in long:
    stream.cancel()
  assert not engine.step()
  assert long[3].result().finish == 'cancelled'


def test_draws_depend_on_the_seed_alone(engine):
  rules = dict(temperature=1.5, top_p=0.95)
  requests = [greedy(MIX[0], seed=seed, **rules) for seed in range(4)]
  together = [answer.ids for answer in engine.generate([*requests, greedy(MIX[1]), requests[0]])]
  assert together[5] == together[0] and len({tuple(ids) for ids in together[:4]}) == 4
  assert [engine.generate([request])[0].ids for request in requests] == together[:4]


def test_pieces_add_up_to_the_answer(engine):
  stream = engine.submit(greedy(MIX[0], 12))
  pieces = list(stream)
  assert len(pieces) > 1 and ''.join(pieces) == stream.result().text == engine.generate([greedy(MIX[0], 12)])[0].text


def test_stop_strings_and_ids(engine, expected):
  """A stop string that spans tokens is never told, not even its beginning; a stop id ends the answer at once."""
  whole = engine.generate([greedy(MIX[0], 12)])[0]
  stop = whole.text[3:7]
  stream = engine.submit(greedy(MIX[0], 12, stop=('never said', stop)))
  assert ''.join(stream) == stream.text == whole.text[: whole.text.find(stop)].strip()
  assert stream.finish == 'stop' and len(stream.ids) < 12
  ended = engine.generate([greedy(MIX[0], stop_ids=(expected[0][2],))])[0]
  first = expected[0].index(expected[0][2])
  assert (ended.ids, ended.finish) == (expected[0][: first + 1], 'stop')


def test_log_probabilities(engine, expected):
  """Greedy tokens are the likeliest, each by the probability told; asking for them changes nothing."""
  answer, other = engine.generate([greedy(MIX[0], top_logprobs=3), greedy(MIX[1])])
  assert answer.ids == expected[0] and other.top_logprobs == [[]] * TOKENS
  for token, logprob, top in zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=True):
    assert len(top) == 3 and top[0] == (token, pytest.approx(logprob, abs=1e-5)) and top[0][1] >= top[1][1] < 0


def test_nothing_is_compiled_after_warming_up(run):
  engine = Engine(run, slots=4, max_length=128, visual_chunk=4)
  engine.warm_up([greedy(MIX[0])])
  before = dict(engine.core.programs.compiled)
  assert before['prefill'] == 2 and before['step'] == 1 and before['see'] == 2  # for one row and for four
  answers = engine.generate([greedy(question(f'color {i}?', images(20 + i)), 1 + i % 4) for i in range(9)])
  assert len(answers) == 9 and engine.core.programs.compiled == before


def test_high_resolution_beside_plain_images(run, engine, expected):
  """Each as if the experiment had its grid."""
  sharp = dataclasses.replace(run, experiment=asked(dict(grid=2)))
  (sharply,) = alone(sharp, MIX[:1], TOKENS)
  assert sharply != expected[0]
  requests = [greedy(MIX[0]), dataclasses.replace(greedy(MIX[0]), grid=2), greedy(MIX[4])]
  assert [answer.ids for answer in engine.generate(requests)] == [expected[0], sharply, expected[4]]


@pytest.mark.parametrize(
  'model',
  [
    dict(prefusion=dict(fuse_compressed=False)),
    dict(prefusion=dict(num_layers=0), compressor=dict(kind='none')),
    dict(compressor=dict(grid=2, space='llm'), prefusion=dict(fuse_token_zero=True)),
    dict(compressor=dict(kind='mqt', grid=3, keep=4)),
    dict(compressor=dict(kind='average', grid=2)),
  ],
  ids=str,
)
def test_other_models(tokenizer, model):
  """Without pre-fusion and compressor, as LLaVA-v1.5, and with the paper's switches."""
  run = loaded(asked(**model), tokenizer)
  prompts = MIX[:3]
  answers = Engine(run, slots=4, max_length=128).generate([greedy(prompt) for prompt in prompts])
  assert [answer.ids for answer in answers] == alone(run, prompts, TOKENS)


@pytest.mark.parametrize(
  'compressor',
  [
    dict(kind='llama_vid', space='vision'),
    dict(kind='voco', keep=1),
    dict(kind='prumerge', keep=3, neighbours=2, elastic=True, space='vision'),
    dict(kind='average', within=1, space='llm'),
  ],
  ids=str,
)
def test_what_a_question_changes_is_refused(tokenizer, compressor):
  run = loaded(asked(compressor=compressor), tokenizer)
  with pytest.raises(ConfigError, match='^Engine: expected a compressor whose tokens are the same for every question'):
    Engine(run, slots=4, max_length=128)


def test_eight_devices_answer_as_one(tokenizer, expected):
  """Slots and visuals over data × fsdp, heads and vocabulary over tensor; the slots are donated."""
  engine = Engine(loaded(asked(), tokenizer, make_mesh((2, 2, 2))), slots=8, max_length=128)
  keys = engine.core.state.cache.keys
  assert keys.shape[1:3] == (8, 128) and keys.addressable_shards[0].data.shape[1:4] == (2, 128, 1)
  answers = engine.generate([greedy(prompt) for prompt in MIX])
  assert [answer.ids for answer in answers] == expected
  assert keys.is_deleted() and engine.core.state.cache.keys.sharding == keys.sharding


def test_a_row_longer_than_a_chunk_of_prefill(run, expected, monkeypatch):
  monkeypatch.setattr('llava_mini_jax.infer.programs.PREFILL_CHUNK', 24)
  (answer,) = Engine(run, slots=1, max_length=128).generate([greedy(MIX[4])])
  assert answer.prompt_tokens > 48 and answer.ids == expected[4]


def test_a_request_that_fails_takes_no_other_with_it(engine, expected, monkeypatch):
  """Its own stream ends; what it was is raised once, to who drives the engine."""
  other = engine.submit(greedy(MIX[1]))
  engine.step()
  with monkeypatch.context() as patch:
    patch.setattr(engine.core.programs, 'see', lambda *_: (_ for _ in ()).throw(RuntimeError('out of memory')))
    broken = engine.submit(greedy(MIX[0]))
    with pytest.raises(PromptFailed, match='prompt: out of memory'):
      engine.step()
  assert (broken.result().finish, broken.result().ids) == ('failed', [])
  assert other.result().ids == expected[1]


@pytest.mark.parametrize('bad', [None, 1])
def test_a_prefill_of_several_that_fails_is_tried_one_by_one(engine, monkeypatch, bad):
  """Only the one at fault fails; if none does by itself, all are answered."""
  texts = ['aa', 'bb', 'cc']
  alone = [engine.generate([greedy(question(text))])[0].ids for text in texts]
  prefill, groups = engine.core._prefill, []

  def fails(group, *arguments):
    groups.append([work.laid.name for work in group])
    if len(group) > 1 or groups[-1] == [str(bad)]:
      raise ValueError('no memory for them')
    prefill(group, *arguments)

  monkeypatch.setattr(engine.core, '_prefill', fails)
  streams = [engine.submit(greedy(question(text, name=str(i)))) for i, text in enumerate(texts)]
  while any(not stream.finish for stream in streams):
    try:
      engine.step()
    except PromptFailed as error:
      assert str(error) == f'{bad}: no memory for them'
  assert groups == [['0', '1', '2'], ['0'], ['1'], ['2']]
  assert [stream.ids for stream in streams] == [[] if i == bad else ids for i, ids in enumerate(alone)]
  assert [stream.finish for stream in streams] == ['failed' if i == bad else 'length' for i in range(3)]


def test_a_prefill_that_takes_the_slots_with_it(run, monkeypatch):
  """Its programs write into the state that they are given: once that is gone, no prompt alone is to blame."""
  engine = Engine(run, slots=2, max_length=64, visual_chunk=4)

  def fails(params, state, *_):
    jax.tree.map(lambda leaf: leaf.delete(), state)
    raise ValueError('the device is lost')

  monkeypatch.setattr(engine.core.programs, 'prefill', fails)
  streams = [engine.submit(greedy(question(text))) for text in ('aa', 'bb')]
  with pytest.raises(ValueError, match='the device is lost'):
    engine.step()
  assert [stream.finish for stream in streams] == ['failed'] * 2


def test_what_does_not_fit_is_refused(engine, run):
  with pytest.raises(DataError) as caught:
    engine.submit(greedy(question('hi', name='long one'), 128))
  size = len(engine.encoder.lay(question('hi')).tokens)
  told = f'E_TOO_LONG: long one: expected at most 128 tokens; found {size} of the prompt and 128 of the answer'
  assert str(caught.value) == told
  with pytest.raises(ConfigError, match='Engine.max_length: expected 2 to 4096, the decoder.max_position_embeddings'):
    Engine(run, max_length=5000)
  with pytest.raises(MeshError, match='batch size 3 is not a multiple of data × fsdp = 8'):
    Engine(dataclasses.replace(run, mesh=make_mesh((8, 1, 1))), slots=3)

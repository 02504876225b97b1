"""Chat completions as OpenAI's own client asks for them, beside what the engine says by itself."""

from __future__ import annotations

import math
import threading

import numpy as np
import openai
import pytest
from asking import images, question
from serving import NAME, data_uri, png, shows, wait
from video_clips import clip

from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.infer.engine import Request
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling

pytestmark = pytest.mark.usefixtures('quick_compilation')
TOKENS = 6


def create(server, content='hello', **fields):
  messages = [dict(role='user', content=content)]
  return server.openai.chat.completions.create(**{**dict(model=NAME, messages=messages, max_tokens=TOKENS), **fields})


def expected(engine, text, *media, tokens=TOKENS, **fields):
  return engine.generate([Request(question(text, *media), Sampling(max_new_tokens=tokens, **fields))])[0]


@pytest.mark.parametrize('kept', [False, True], ids=['first', 'again'])
@pytest.mark.parametrize('count', [0, 1, 2])
def test_an_answer_is_the_engines(server, engine, count, kept):
  """Text, one image, two: sent as data URIs, and again, when their vision part is reused."""
  media = [images(10 * count + i) for i in range(count)]
  answer = create(server, shows(*(data_uri(png(some[0])) for some in media)))
  alone = expected(engine, 'color?', *media)
  assert answer.choices[0].message.content == alone.text and alone.text
  assert answer.choices[0].finish_reason == alone.finish
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (alone.prompt_tokens, len(alone.ids))
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
  assert usage.prompt_tokens_details.cached_tokens == (count if kept else 0)  # one token per image
  assert usage.vision == dict(visuals=count, reused=count if kept else 0)


def test_a_stream_tells_the_same_in_pieces(server, engine):
  chunks = list(create(server, stream=True, max_tokens=20, stream_options=dict(include_usage=True), logprobs=True))
  alone = expected(engine, 'hello', tokens=20)
  *said, last, usage = chunks
  assert ''.join(chunk.choices[0].delta.content for chunk in said) == alone.text
  assert len(said) > 3 and said[0].choices[0].delta.role == 'assistant'
  assert last.choices[0].finish_reason == alone.finish and not last.choices[0].delta.content
  assert all(chunk.usage is None and 'usage' in chunk.model_fields_set for chunk in (*said, last))
  assert usage.choices == [] and usage.usage.completion_tokens == len(alone.ids)
  told = [token.logprob for chunk in said if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
  np.testing.assert_allclose(told, alone.logprobs, rtol=1e-4, atol=1e-5)


def test_without_stream_options_no_usage_is_told(server):
  chunks = list(create(server, stream=True))
  assert all('usage' not in chunk.model_fields_set and chunk.choices for chunk in chunks)


def test_logprobs(server, engine):
  told = create(server, logprobs=True, top_logprobs=3).choices[0].logprobs.content
  alone = expected(engine, 'hello', top_logprobs=3)
  np.testing.assert_allclose([token.logprob for token in told], alone.logprobs, rtol=1e-4, atol=1e-5)
  for token, one, best in zip(told, alone.ids, alone.top_logprobs, strict=True):
    assert token.token == engine.run.tokenizer.decode([one], skip_special_tokens=False)
    assert len(token.top_logprobs) == 3 and math.isclose(token.top_logprobs[0].logprob, best[0][1], rel_tol=1e-4)
  assert create(server).choices[0].logprobs is None


def test_stop_strings(server, engine):
  whole = expected(engine, 'hello', tokens=20).text
  stop = whole[len(whole) // 2 :][:2].strip() or whole[-1]
  for given in (stop, [stop, 'never said']):
    choice = create(server, max_tokens=20, stop=given).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)].strip(), 'stop')


def test_a_seed_decides_what_is_drawn(server, engine):
  drawn = [create(server, temperature=1.5, seed=seed, top_p=0.9).choices[0].message.content for seed in (1, 2, 1)]
  assert drawn[0] == drawn[2] != drawn[1]
  assert drawn[0] == expected(engine, 'hello', temperature=1.5, seed=1, top_p=0.9).text
  assert len({create(server, temperature=2.0).choices[0].message.content for _ in range(4)}) > 1


def test_max_completion_tokens_and_none(server, engine):
  assert create(server, max_tokens=openai.NOT_GIVEN, max_completion_tokens=3).usage.completion_tokens <= 3
  room = engine.core.max_length - create(server).usage.prompt_tokens
  assert create(server, max_tokens=openai.NOT_GIVEN).usage.completion_tokens <= room


def test_turns_and_a_system_text(server, engine):
  """The image belongs to the first turn; it leads its turn wherever the client put it."""
  image = images(3)
  first = list(reversed(shows(data_uri(png(image[0])))))
  turns = [
    dict(role='user', content=f'{IMAGE_TAG}\ncolor?'),
    dict(role='assistant', content='red'),
    dict(role='user', content='why?'),
  ]
  alone = engine.generate([Request(Prompt(turns, [image]), Sampling(max_new_tokens=TOKENS))])[0]
  messages = [dict(role='user', content=first), *turns[1:]]
  assert create(server, messages=messages).choices[0].message.content == alone.text
  system = [dict(role='system', content='Be brief.')]
  alone = engine.generate([Request(Prompt([*system, turns[2]]), Sampling(max_new_tokens=TOKENS))])[0]
  for role in ('system', 'developer'):
    told = create(server, messages=[dict(role=role, content='Be brief.'), turns[2]])
    assert told.choices[0].message.content == alone.text


def test_an_answer_is_sent_back_as_it_came(server, engine):
  """As the client's object, and with every field that such an object can have."""
  question = dict(role='user', content='hello')
  message = create(server, messages=[question]).choices[0].message
  turns = [question, dict(role='assistant', content=message.content), dict(role='user', content='why?')]
  alone = engine.generate([Request(Prompt(turns), Sampling(max_new_tokens=TOKENS))])[0]
  empty = dict(annotations=[], refusal='', tool_calls=[])
  for sent in (message, message.model_dump(), {**message.model_dump(), **empty}):
    told = create(server, messages=[question, sent, turns[2]])
    assert told.choices[0].message.content == alone.text
  assert set(message.model_dump()) >= {'refusal', 'annotations', 'audio', 'function_call', 'tool_calls'}


def test_a_conversation_as_documented(server):
  messages = []
  for text in ('hello', 'why?', 'and then?'):
    messages.append(dict(role='user', content=text))
    messages.append(create(server, messages=messages).choices[0].message)
  assert len(messages) == 6 and messages[-1].role == 'assistant'


def test_neutral_values_change_nothing(server):
  said = create(server).choices[0].message.content
  assert create(server, tool_choice='none', parallel_tool_calls=True, n=1).choices[0].message.content == said


@pytest.mark.parametrize(('seed', 'same'), [(-1, 2**32 - 1), (-(2**63), 0), (2**63 - 1, 2**32 - 1), (2**32 + 5, 5)])
def test_seeds_of_64_bits(server, engine, seed, same):
  drawn = create(server, temperature=1.5, seed=seed).choices[0].message.content
  assert drawn == expected(engine, 'hello', temperature=1.5, seed=same).text


def test_a_video(server, engine):
  data = clip('mp4', 48)
  frames = engine.encoder.media.read(data, '<video>', 'clip')
  answer = create(server, shows(data_uri(data, 'video/mp4'), video=True))
  assert answer.usage.vision == dict(visuals=len(frames), reused=0) and len(frames) == 2
  assert answer.choices[0].message.content == expected(engine, 'color?', frames).text
  assert create(server, shows(data_uri(data, 'video/mp4'), video=True)).usage.vision['reused'] == 2


def test_many_at_once_get_what_each_gets_alone(server, engine):
  """Twelve clients, four slots."""
  texts = [f'question {i % 5}' + ' please' * i for i in range(12)]
  alone = [expected(engine, text).text for text in texts]
  told = [''] * len(texts)

  def one(i):
    told[i] = create(server, texts[i]).choices[0].message.content

  threads = [threading.Thread(target=one, args=(i,)) for i in range(len(texts))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert told == alone
  wait(lambda: server.service.worker.places.taken == 0 and engine.core.active == 0)


def test_models_and_health(server):
  (model,) = server.openai.models.list().data
  assert (model.id, model.object, model.compressor) == (NAME, 'model', 'query')
  assert server.openai.models.retrieve(NAME) == model
  assert server.http.get('/health').json() == dict(status='ok')


def test_metrics(server):
  def value(name, **labels):
    return server.service.metrics._registry.get_sample_value(f'llava_mini_{name}', labels) or 0.0

  path = '/v1/chat/completions'
  before = value('requests_total', path=path, status='200'), value('tokens_total', kind='answer')
  first = value('time_to_first_token_seconds_count'), value('answer_seconds_count')
  count = create(server).usage.completion_tokens
  server.ask(temperature=-1)
  wait(lambda: value('requests_total', path=path, status='200') == before[0] + 1)
  assert value('tokens_total', kind='answer') == before[1] + count
  assert (value('time_to_first_token_seconds_count'), value('answer_seconds_count')) == (first[0] + 1, first[1] + 1)
  assert value('requests_total', path=path, status='422') >= 1
  text = server.http.get('/metrics').text
  for name in ('requests_total', 'queue', 'active_slots', 'slots 4.0', 'time_to_first_token_seconds_bucket'):
    assert f'llava_mini_{name}' in text

"""Answers do not depend on how they are batched; scores are those of the answers; blank and swapped images are seen."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import COLORS, QUESTIONS, SAVE_EVERY, STEPS, picture, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import records
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import PAD_COLOR
from llava_mini_jax.evaluate.contact_sheet import RIGHT, WRONG
from llava_mini_jax.evaluate.run import describe, evaluate
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.sharding import MeshError, make_mesh
from llava_mini_jax.train.errors import CheckpointError

NAMES = list(COLORS)[:4]
HALF = len(NAMES)  # of the eight questions of the split
ANSWER = [{'from': 'gpt', 'value': ' RED '}]


def record(color: str, i: int) -> dict:
  """As the run was trained on; the first has no category and another spelling of the answer."""
  first = (color, i) == (NAMES[0], 0)
  turns = [{'from': 'human', 'value': f'<image>\n{QUESTIONS[i]}'}, {'from': 'gpt', 'value': color}]
  return {
    'id': f'{color}-{i}',
    'category': '' if first else ('short', 'long')[i],
    'media': [picture(color)],
    'conversations': turns[:1] + ANSWER if first else turns,
  }


RECORDS = [record(color, i) for color in NAMES for i in range(2)]


pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  directory = tmp_path_factory.mktemp('evaluate') / 'data'
  unanswered = {**RECORDS[3], 'id': 'open', 'conversations': RECORDS[3]['conversations'][:1]}
  text = {**RECORDS[3], 'media': [], 'conversations': [{'from': 'human', 'value': 'and ' + QUESTIONS[1]}, *ANSWER]}
  splits = {'test': RECORDS, 'open': [RECORDS[0], unanswered], 'text': [text]}
  records.write(directory, splits, description='for tests')
  return directory


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> Path:
  return trained(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='module')
def everywhere(workdir) -> Answerer:
  """On eight devices."""
  return Answerer(load_run(workdir, make_mesh()), max_new_tokens=4)


@pytest.fixture(scope='module')
def answerer(workdir) -> Answerer:
  """On one device."""
  return Answerer(load_run(workdir, make_mesh((1, 1, 1), devices=jax.devices()[:1])), max_new_tokens=4)


@pytest.fixture(scope='module')
def untrained(answerer) -> Answerer:
  """With random parameters, so that answers are long and odd."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: jax.device_put(rng.normal(0, 0.3, p.shape).astype(p.dtype), p.sharding), answerer.run.params
  )
  other = copy.copy(answerer)  # shares what is compiled
  other.run = dataclasses.replace(answerer.run, params=params)
  return other


@pytest.fixture(scope='module')
def evaluated(everywhere, dataset, tmp_path_factory):
  """Summary, answers and the pixels that the model saw, by kind of images; and where it was written."""
  out, found = tmp_path_factory.mktemp('evaluation') / 'new' / 'directory', {}
  with pytest.MonkeyPatch.context() as patch:
    original = everywhere.encoder.batch
    for images in ('real', 'blank', 'swapped'):
      seen = []
      patch.setattr(everywhere.encoder, 'batch', lambda *a, seen=seen, **k: seen.append(original(*a, **k)) or seen[-1])
      summary = evaluate(everywhere, dataset, 'test', out, images=images, batch_size=8)
      written = json.loads((out / f'answers_{images}.json').read_text())
      assert written['summary'] == summary
      found[images] = summary, written['answers'], np.concatenate([batch.pixels for batch in seen])[:, 0, 0]
  return found, out


def test_every_answer_is_written(evaluated):
  summary, answers, _ = evaluated[0]['real']
  assert answers == [
    {
      'id': item['id'],
      'category': item['category'],
      'question': item['conversations'][0]['value'].removeprefix('<image>\n'),
      'answer': item['id'].split('-')[0],
      'truth': item['conversations'][1]['value'],
      'correct': True,
    }
    for item in RECORDS
  ]
  assert summary == {
    'images': 'real',
    'split': 'test',
    'step': STEPS,
    'changes': [],
    'accuracy': 1.0,
    'count': 8,
    'by_category': {
      'long': {'accuracy': 1.0, 'count': 4},
      'short': {'accuracy': 1.0, 'count': 3},
      'uncategorised': {'accuracy': 1.0, 'count': 1},
    },
  }
  assert describe(summary).splitlines() == [
    'real     images   exact match 100.00% of 8 questions',
    '  long                 100.00% of 4',
    '  short                100.00% of 3',
    '  uncategorised        100.00% of 1',
  ]


def test_swapped_images_are_those_of_a_record_half_the_split_away(evaluated):
  real, swapped = (evaluated[0][images] for images in ('real', 'swapped'))
  np.testing.assert_array_equal(swapped[2], np.roll(real[2], -HALF, axis=0))
  assert (swapped[2] != real[2]).any(axis=(1, 2, 3)).all()
  for i, row in enumerate(swapped[1]):
    other = RECORDS[(i + HALF) % 8]
    assert row['answer'] == other['id'].split('-')[0], 'the answer is not about the image shown'
    assert (row['id'], row['correct']) == (RECORDS[i]['id'], False)
  assert (swapped[0]['accuracy'], swapped[0]['images']) == (0.0, 'swapped')


def test_blank_images_are_blank(evaluated):
  summary, answers, pixels = evaluated[0]['blank']
  assert (pixels == np.array(PAD_COLOR)).all()
  for i in range(2):  # the same question is answered the same way, whatever the image was
    assert len({row['answer'] for row in answers[i::2]}) == 1
  assert summary['accuracy'] <= 0.25
  assert (evaluated[0]['real'][2] != np.array(PAD_COLOR)).any()


def has_color(image: np.ndarray, color: str) -> bool:
  wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return bool((np.abs(image.astype(int) - wanted).max(axis=-1) < 8).any())


@pytest.mark.parametrize(('images', 'right'), [('real', True), ('swapped', False)])
def test_contact_sheets(evaluated, images, right):
  path = evaluated[1] / f'contact_sheet_{images}.png'
  with Image.open(path) as image:
    image.load()
    assert image.format == 'PNG'
    pixels = np.asarray(image.convert('RGB'))
  assert min(pixels.shape[:2]) > 100
  assert all(has_color(pixels, '#{:02x}{:02x}{:02x}'.format(*color)) for color in map(COLORS.get, NAMES))
  assert (has_color(pixels, RIGHT), has_color(pixels, WRONG)) == (right, not right)


def test_limit(everywhere, dataset, tmp_path):
  """The first questions alone; their images are those of the other half of the split."""
  summary = evaluate(everywhere, dataset, 'test', tmp_path, images='swapped', batch_size=8, limit=4, sheet=2)
  answers = json.loads((tmp_path / 'answers_swapped_first_4.json').read_text())['answers']
  assert [row['id'] for row in answers] == [item['id'] for item in RECORDS[:4]]
  assert [row['answer'] for row in answers] == ['blue', 'blue', 'white', 'white']
  assert summary['count'] == 4
  assert evaluate(everywhere, dataset, 'test', tmp_path, batch_size=8, limit=99)['count'] == 8


def test_questions_without_images_make_no_contact_sheet(everywhere, dataset, tmp_path):
  assert evaluate(everywhere, dataset, 'text', tmp_path, batch_size=8)['count'] == 1
  assert [path.name for path in tmp_path.iterdir()] == ['answers_real.json']


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    (
      dict(split='open'),
      DataError,
      "E_NO_TARGET: sample 'open': expected an answer to compare with; found none",
    ),
    (dict(split='val'), DataError, "E_NO_SPLIT: {dataset}: expected one of open, test, text; found 'val'"),
    (dict(images='grey'), ConfigError, "images: expected one of real, blank, swapped; found 'grey'"),
    (dict(batch_size=12), MeshError, 'batch size 12 is not a multiple of data × fsdp = 8'),
  ],
)
def test_what_cannot_be_evaluated(everywhere, dataset, tmp_path, arguments, error, message):
  with pytest.raises(error) as caught:
    evaluate(everywhere, dataset, out=tmp_path, **{'split': 'test', 'batch_size': 8, **arguments})
  assert str(caught.value) == message.format(dataset=dataset)
  assert list(tmp_path.iterdir()) == []


def turns(*texts: str) -> list[dict]:
  return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


def prompts() -> list[Prompt]:
  """Short and long, with and without an image, and one that goes on."""
  images = [np.full((16, 24, 3), color, np.uint8) for color in map(COLORS.get, NAMES)]
  return [
    Prompt(turns('<image>\ncolor?'), [images[:1]], 'short'),
    Prompt(turns('<image>\n' + QUESTIONS[1]), [[Image.fromarray(images[1])]], 'long'),
    Prompt(turns('no image'), (), 'text'),
    Prompt(turns('<image>\ncolor?', 'red', 'are you sure?'), [images[2:3]], 'second question'),
    Prompt(turns('<image>\ncolor?'), [images[3:]], 'again'),
  ]


@pytest.fixture(scope='module', params=['answerer', 'untrained'])
def asked(request):
  """Who is asked, and the answers to `prompts()`, one at a time."""
  who = request.getfixturevalue(request.param)
  one = list(who.answers(prompts(), batch_size=1))
  assert len(set(one)) >= 3, f'answers so much alike would prove little: {one}'
  return who, one


def test_batches_do_not_matter(asked):
  """Three at a time, the last batch padded; in order and in another."""
  who, one = asked
  assert list(who.answers(prompts(), batch_size=3)) == one
  assert list(who.answers(prompts()[::-1], batch_size=3)) == one[::-1]


def test_the_engine_says_the_same(asked):
  who, one = asked
  engine = Engine(who.run, slots=4, max_length=128)
  answers = engine.generate([Request(prompt, Sampling(max_new_tokens=who.max_new_tokens)) for prompt in prompts()])
  assert [answer.text for answer in answers] == one


def test_what_was_learnt_is_answered(answerer):
  found = list(answerer.answers(prompts(), batch_size=3))
  assert (found[0], found[1], found[4]) == ('red', 'green', 'white')


def test_devices_do_not_matter(answerer, evaluated):
  """Eight devices, a row on each, and one device."""
  asked = [
    Prompt(turns(item['conversations'][0]['value']), [[Image.new('RGB', (24, 16), COLORS[item['id'].split('-')[0]])]])
    for item in RECORDS
  ]
  found = list(answerer.answers(asked, batch_size=3))
  assert found == [row['answer'] for row in evaluated[0]['real'][1]]


@pytest.mark.parametrize('ask', [lambda a, p: list(a.answers([p], batch_size=1)), lambda a, p: a.encoder.lay(p)])
@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    (Prompt(turns('color?'), [[np.zeros((8, 8, 3), np.uint8)]], 'a'), 'E_IMAGE_TAGS: a: expected 1 <image> tag(s) '),
    (Prompt(turns('<image>\ncolor?'), (), 'b'), 'E_IMAGE_TAGS: b: expected 0 <image> tag(s) '),
    (Prompt(turns('color?', 'red'), (), 'c'), 'E_ROLE_ORDER: c: a generation prompt: expected the last turn '),
    (Prompt((), (), 'd'), 'E_EMPTY_TURNS: d: '),
    (Prompt(turns('<|im_end|>'), (), 'e'), 'E_SPECIAL_TOKEN: e: '),
  ],
)
def test_bad_prompts_are_named(answerer, ask, prompt, message):
  with pytest.raises(DataError) as error:
    ask(answerer, prompt)
  assert str(error.value).startswith(message)


def test_a_step_of_the_run(workdir, answerer):
  mesh = answerer.run.mesh
  assert answerer.run.step == STEPS
  older = load_run(workdir, mesh, STEPS - SAVE_EVERY)
  assert older.step == STEPS - SAVE_EVERY
  newer, older = (jax.tree.leaves(run.params) for run in (answerer.run, older))
  assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(newer, older, strict=True))
  with pytest.raises(CheckpointError) as error:
    load_run(workdir, mesh, 5)
  kept = [STEPS - 2 * SAVE_EVERY, STEPS - SAVE_EVERY, STEPS]
  assert str(error.value) == f'no checkpoint of step 5 in {workdir}/checkpoints (steps there: {kept})'


def test_no_run(tmp_path, answerer):
  with pytest.raises(CheckpointError) as error:
    load_run(tmp_path / 'run', answerer.run.mesh)
  assert str(error.value) == f'no checkpoint: {tmp_path}/run/checkpoints is not a directory'
  assert not (tmp_path / 'run').exists()

"""Each bad sample of the corpus is refused with its code and place; the good ones around it are kept."""

from __future__ import annotations

import io
import json
import os
import re

import pytest
from PIL import Image

from llava_mini_jax.data import easy_vqa
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.sources import Report, read_llava, resolve_inside


def png(color: str = 'red') -> bytes:
  out = io.BytesIO()
  Image.new('RGB', (4, 3), color).save(out, 'PNG')
  return out.getvalue()


@pytest.fixture
def root(tmp_path):
  """m/ is the media root; beside it lies what must not be reached."""
  (tmp_path / 'm' / 'sub').mkdir(parents=True)
  (tmp_path / 'm2').mkdir()
  for name in ('m/a.png', 'm/sub/b.png', 'm2/secret.png', 'secret.png'):
    (tmp_path / name).write_bytes(png())
  noise = io.BytesIO()
  Image.effect_noise((32, 32), 90).save(noise, 'PNG')
  (tmp_path / 'm' / 'broken.png').write_bytes(noise.getvalue()[:500])
  (tmp_path / 'm' / 'link_in.png').symlink_to('sub/b.png')
  (tmp_path / 'm' / 'link_out.png').symlink_to(tmp_path / 'secret.png')
  (tmp_path / 'm' / 'dir_out').symlink_to(tmp_path / 'm2')
  (tmp_path / 'm' / 'dangling.png').symlink_to('nothing.png')
  (tmp_path / 'm' / 'loop').symlink_to('loop')
  os.mkfifo(tmp_path / 'm' / 'fifo')
  return tmp_path / 'm'


def sample(**changes) -> dict:
  turns = [{'from': 'human', 'value': '<image>\nwhat?'}, {'from': 'gpt', 'value': 'red'}]
  value = {'id': 's', 'image': 'a.png', 'conversations': turns, **changes}
  return {key: item for key, item in value.items() if item is not ...}


def says(*values: str, roles=('human', 'gpt')) -> dict:
  return {'conversations': [{'from': roles[i % 2], 'value': value} for i, value in enumerate(values)]}


def read(tmp_path, text: str, name: str = 'x.json', **options):
  (tmp_path / name).write_text(text, encoding='utf-8')
  report = Report()
  found = list(read_llava(tmp_path / name, tmp_path / 'm', report, **options))
  assert report.kept == len(found)
  return found, report


def test_a_good_file(tmp_path, root):
  samples = [
    sample(id='one', category='color', extra=[1, None]),
    sample(id=2, image=['a.png', 'sub/b.png'], **says('<image><image> same?', 'yes')),
    sample(id='text', image=..., **says('hello', 'hi', 'bye', 'bye')),
    sample(id='link', image='link_in.png'),
  ]
  found, report = read(tmp_path, json.dumps(samples))
  assert report.refused == []
  assert [record['id'] for record in found] == ['one', '2', 'text', 'link']
  assert [record['category'] for record in found] == ['color', '', '', '']
  assert [len(record['media']) for record in found] == [1, 2, 0, 1]
  assert found[0]['media'] == [png()]  # the file's own bytes
  assert [record['conversations'] for record in found] == [value['conversations'] for value in samples]
  assert set(found[0]) == {'id', 'category', 'media', 'conversations'}


def test_jsonl_is_the_same(tmp_path, root):
  samples = [sample(id=str(i)) for i in range(3)]
  lines = '\n\n'.join(json.dumps(value) for value in samples)
  assert read(tmp_path, '\ufeff' + lines, 'x.jsonl') == read(tmp_path, json.dumps(samples))


TAGS = 'found {} <image> tag(s), expected {} for its image(s)'
BAD = {
  'no conversations': (
    sample(conversations=...),
    'E_FIELD',
    'expected a list of turns under "conversations"; found no such key',
  ),
  'conversations null': (sample(conversations=None), 'E_FIELD', 'conversations: expected a list; found NoneType'),
  'no turns': (
    sample(conversations=[], image=...),
    'E_EMPTY_TURNS',
    'conversations: expected at least one human turn; found none',
  ),
  'gpt first': (
    sample(**says('hi', 'x', roles=('gpt', 'human'))),
    'E_ROLE_ORDER',
    "conversations[0].from: expected human; found 'gpt'",
  ),
  'human twice': (
    sample(**says('<image>', 'x', roles=('human', 'human'))),
    'E_ROLE_ORDER',
    "conversations[1].from: expected gpt; found 'human'",
  ),
  'no answer': (
    sample(**says('<image> a?')),
    'E_NO_TARGET',
    'conversations: expected at least one gpt turn; found none',
  ),
  'number as text': (
    sample(conversations=[{'from': 'human', 'value': 3}]),
    'E_FIELD',
    'conversations[0].value: expected a string; found int',
  ),
  'turn not an object': (sample(conversations=['hi']), 'E_FIELD', 'conversations[0]: expected an object; found str'),
  'lone surrogate': (
    sample(**says('<image>\ud800', 'x')),
    'E_FIELD',
    'conversations[0].value: expected valid Unicode; found a lone surrogate at character 7',
  ),
  'surrogate category': (sample(category='\udc00'), 'E_FIELD', "character 0 of '\\udc00' is a lone surrogate"),
  'no tag': (sample(**says('what?', 'red')), 'E_IMAGE_TAGS', TAGS.format(0, 1)),
  'two tags': (sample(**says('<image>', 'a', '<image>', 'b')), 'E_IMAGE_TAGS', TAGS.format(2, 1)),
  'tag, no image': (sample(image=...), 'E_IMAGE_TAGS', TAGS.format(1, 0)),
  'tag in the answer': (
    sample(**says('what?', '<image>')),
    'E_IMAGE_TAGS',
    'conversations[1].value: expected <image> in human turns only; found one',
  ),
  'special token': (
    sample(**says('<image>', '<|im_end|>')),
    'E_SPECIAL_TOKEN',
    "expected no special token in the text; found '<|im_end|>'",
  ),
  'category a number': (sample(category=1), 'E_FIELD', 'expected a string; found a number'),
  'missing video': (sample(video='none.mp4', image=...), 'E_VIDEO_MISSING', 'no such file in {root}'),
  'missing image': (sample(image='none.png'), 'E_IMG_MISSING', 'no such file in {root}'),
  'image outside': (
    sample(image='../secret.png'),
    'E_PATH',
    "expected a path relative to the media root, without '..'",
  ),
  'image a number': (sample(image=[1]), 'E_PATH', 'expected a string; found int'),
  'broken image': (sample(image='broken.png'), 'E_IMG_TRUNCATED', None),
}


@pytest.mark.parametrize('case', BAD)
def test_one_bad_sample(tmp_path, root, case):
  bad, code, reason = BAD[case]
  samples = [sample(id='before'), bad, sample(id='after')]
  found, report = read(tmp_path, json.dumps(samples), reserved=('<|im_end|>',))
  assert [record['id'] for record in found] == ['before', 'after']
  (error,) = report.refused
  assert error.code == code
  assert error.where.startswith(f"{tmp_path}/x.json: record 1: sample 's'")
  if reason:
    assert error.message == reason.format(root=root)
  _, report = read(tmp_path, '\n'.join(map(json.dumps, samples)), 'x.jsonl', reserved=('<|im_end|>',))
  assert [(e.code, e.message) for e in report.refused] == [(error.code, error.message)]
  assert report.refused[0].where.startswith(f"{tmp_path}/x.jsonl:2: sample 's'")


BAD_TEXT = {
  'not an object': ('3', 'E_FIELD: {at}: expected an object; found a number'),
  'no id': ('{"image": "a.png"}', 'E_FIELD: {at}: id: expected a string; found null'),
  'id true': ('{"id": true}', 'E_FIELD: {at}: id: expected a string; found a boolean'),
  'NaN image': ('{"id": "s", "image": NaN}', 'E_JSON: {at}: expected an object; found NaN is not a JSON value'),
  'NaN deep': (
    '{"id": "s", "conversations": [{"from": -Infinity}]}',
    "E_JSON: {at}: sample 's': conversations: -Infinity is not a JSON value",
  ),
  'duplicate key': ('{"id": "s", "id": "t"}', "E_JSON: {at}: expected an object; found duplicate key 'id'"),
}


@pytest.mark.parametrize('case', BAD_TEXT)
def test_json_that_python_accepts_and_we_do_not(tmp_path, root, case):
  text, message = BAD_TEXT[case]
  found, report = read(tmp_path, f'[{json.dumps(sample())}, {text}]')
  assert len(found) == 1
  assert [str(error) for error in report.refused] == [message.format(at=f'{tmp_path}/x.json: record 1')]


MALFORMED = {
  'comma': ('[\n {"id": "a",}\n]', r':2:1[23]: malformed JSON: '),  # at the brace, or at the comma from Python 3.13 on
  'cut off': ('[{"id": "a"', ':1:12: malformed JSON: '),
  'empty': ('', ':1:1: malformed JSON: Expecting value'),
  'not a list': ('{"id": "a"}', ': expected a list of samples; found an object'),
  'deep': ('[' * 100_000, ':1: cannot be parsed: nested too deeply'),
  'long integer': ('[' + '1' * 5000 + ']', r':1: cannot be parsed: Exceeds the limit \(4300 digits\)'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_a_file_that_is_not_json(tmp_path, root, case):
  text, message = MALFORMED[case]
  with pytest.raises(DataError) as error:
    read(tmp_path, text)
  assert error.value.code == 'E_JSON'
  assert re.match(re.escape(f'E_JSON: {tmp_path}/x.json') + message, str(error.value))


def test_a_malformed_line_costs_one_sample(tmp_path, root):
  found, report = read(tmp_path, f'{json.dumps(sample())}\n{{"id": }}\n{"[" * 100_000}\n', 'x.jsonl')
  assert len(found) == 1
  assert [(error.code, error.where) for error in report.refused] == [
    ('E_JSON', f'{tmp_path}/x.jsonl:2:8'),
    ('E_JSON', f'{tmp_path}/x.jsonl:3'),
  ]
  assert report.refused_share == pytest.approx(2 / 3)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
  with pytest.raises(DataError) as error:
    list(read_llava(tmp_path / 'none.json', None, Report()))
  assert str(error.value) == f'E_NO_SOURCE: {tmp_path}/none.json: cannot be read (No such file or directory)'
  (tmp_path / 'x.json').write_bytes(b'["\xff"]')
  with pytest.raises(DataError, match='^E_JSON: .*/x.json: expected UTF-8; byte 2 is not$'):
    list(read_llava(tmp_path / 'x.json', None, Report()))


def test_duplicate_ids(tmp_path, root):
  text = json.dumps([sample(id=i) for i in ('a', 'b', 'a', 'a#2', 'a')])
  found, report = read(tmp_path, text)
  assert [record['id'] for record in found] == ['a', 'b', 'a#2']
  where = f'{tmp_path}/x.json: record'
  assert [str(e) for e in report.refused] == [
    f"E_DUPLICATE_ID: {where} {n}: sample 'a': the id occurred first at {where} 0" for n in (2, 4)
  ]
  found, report = read(tmp_path, text, number_duplicates=True)
  assert [record['id'] for record in found] == ['a', 'b', 'a#2', 'a#2#2', 'a#3']
  assert report.refused == []


def test_an_image_without_a_root(tmp_path):
  (tmp_path / 'x.json').write_text(json.dumps([sample()]))
  report = Report()
  assert list(read_llava(tmp_path / 'x.json', None, report)) == []
  assert report.refused[0].code == 'E_IMG_MISSING'
  assert report.refused[0].message == "names the image 'a.png', and no media root was given"


PATHS = {
  'a.png': None,
  'sub/b.png': None,
  './sub//b.png': None,
  'link_in.png': None,
  'none.png': 'E_IMG_MISSING',
  'a.png/x': 'E_IMG_MISSING',
  'dangling.png': 'E_IMG_MISSING',
  '': 'E_PATH',
  '.': 'E_PATH',
  'sub': 'E_PATH',
  'fifo': 'E_PATH',
  'loop': 'E_PATH',
  'x' * 5000: 'E_PATH',
  '../secret.png': 'E_PATH',
  '../m2/secret.png': 'E_PATH',
  '../m/a.png': 'E_PATH',
  'sub/../a.png': 'E_PATH',
  'link_out.png': 'E_PATH',
  'dir_out/secret.png': 'E_PATH',
  '/etc/passwd': 'E_PATH',
  'file:///etc/passwd': 'E_PATH',
  'http://127.0.0.1/a.png': 'E_PATH',
  'a.png\0.txt': 'E_PATH',
  '\ud800': 'E_PATH',
  3: 'E_PATH',
  None: 'E_PATH',
}


@pytest.mark.parametrize('path', PATHS, ids=lambda path: ascii(path)[:24])
def test_paths_stay_inside(root, path):
  if PATHS[path] is None:
    found = resolve_inside(root, path)
    assert found.is_file() and found.is_relative_to(root)
    return
  with pytest.raises(DataError) as error:
    resolve_inside(root, path)
  assert error.value.code == PATHS[path]


def test_a_root_that_is_itself_a_link(root):
  (root.parent / 'alias').symlink_to(root)
  assert resolve_inside(root.parent / 'alias', 'a.png') == root / 'a.png'


def test_an_absolute_path_below_the_root_is_refused_too(root):
  with pytest.raises(DataError, match='^E_PATH: '):
    resolve_inside(root, str(root / 'a.png'))


@pytest.mark.parametrize(
  ('pairs', 'expected'),
  [
    ([('what is the blue shape?', 'rectangle')], 'blue rectangle'),
    ([('what color is the circle?', 'teal')], 'teal circle'),
    ([('is there a red shape?', 'yes'), ('is no triangle present?', 'no')], 'red triangle'),
    ([('is there not a gray shape in the image?', 'no'), ('is a circle present?', 'yes')], 'gray circle'),
    ([('is there a red shape?', 'no'), ('what shape is present?', 'circle')], None),
    ([('does the image not contain a circle?', 'yes'), ('what color is the shape?', 'blue')], None),
    ([], None),
  ],
)
def test_a_caption_says_what_the_questions_imply_and_no_more(pairs, expected):
  assert easy_vqa.caption(pairs) == expected


def pairs_of(record) -> list[tuple[str, str]]:
  texts = [turn['value'] for turn in record['conversations']]
  return list(zip(texts[0::2], texts[1::2], strict=True))


def test_easy_vqa():
  splits = {name: list(found) for name, found in easy_vqa.splits().items()}
  train, test = splits['train'], splits['test']
  captions = [pair for record in train for pair in pairs_of(record) if pair[0] == easy_vqa.CAPTION_QUESTION]
  assert (len(train), len(captions), len(test)) == (4000, 3542, 9673)
  assert sum(len(pairs_of(record)) for record in train) == 38575 + 3542
  assert len({record['id'] for record in train}) == 4000 and len({record['id'] for record in test}) == 9673
  assert pairs_of(train[0])[-1] == captions[0] == ('describe the image.', 'blue rectangle')
  assert [record['id'] for record in test[:13]] == [*(f'0-{k}' for k in range(11)), '1-0', '1-1']
  assert test[0]['conversations'] == [
    {'from': 'human', 'value': '<image>\nwhat is the red shape?'},
    {'from': 'gpt', 'value': 'triangle'},
  ]
  for record in [*train, *test]:
    texts = [turn['value'] for turn in record['conversations']]
    assert len(record['media']) == 1
    assert texts[0].startswith('<image>\n') and sum('<image>' in text for text in texts) == 1
  counts = {name: sum(record['category'] == name for record in test) for name in {r['category'] for r in test}}
  assert counts == {'shape': 1257, 'color': 1280, 'yes/no shape': 1935, 'yes/no color': 5201}

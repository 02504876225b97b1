"""The corpus of bad inputs, by number: 44 kinds of images, videos and annotations, each made here.

A row of the table says what becomes of it when a dataset is prepared, and when a dataset that is already there holds
it. Refused by code, file, record and field; never replaced; what stands around it is kept. `bad_sample='mask'` leaves
padding in its place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_image_files import JPEG, png_of_size
from test_images import file_of
from test_pipeline import MODEL, iterate, take

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.records import open_split, write
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.sources import Report, read_llava
from llava_mini_jax.data.video import FrameSampler

GOOD = file_of(Image.new('RGB', (16, 16), (200, 30, 30)))
RESERVED = ('<|im_end|>',)


@dataclasses.dataclass(frozen=True)
class Case:
  """prepared, trained: the code, or '' if it is accepted; trained None = no dataset can hold it.

  changes: of a good sample; the key with ... is left out. files: beside the annotations.
  """

  number: int
  what: str
  prepared: str
  trained: str | None
  changes: dict = dataclasses.field(default_factory=dict)
  files: dict[str, Callable[[], bytes]] = dataclasses.field(default_factory=dict)
  options: dict = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return f'{self.number} {self.what}'


def image(number: int, what: str, data: bytes, code: str = '', name: str = 'a.png') -> Case:
  return Case(number, what, code, code, dict(image=name), {name: lambda: data})


def clip(kind: str, frames, **options) -> bytes:
  pytest.importorskip('av')
  import video_clips

  return video_clips.clip(kind, frames, **options)


def cut_clip() -> bytes:
  pytest.importorskip('av')
  from test_video_files import textured

  data = bytearray(clip('mp4', textured(60), options={'g': '12'}))
  middle = len(data) // 2
  data[middle : middle + 1500] = bytes(1500)
  return bytes(data)


def video(number: int, what: str, data: Callable[[], bytes], code: str = '', name: str = 'a.mp4', **options) -> Case:
  changes = dict(image=..., video=name, **says('<video> what?', 'red'))
  return Case(number, what, code, code, changes, {name: data}, options)


def says(*values, roles=('human', 'gpt')) -> dict:
  return {'conversations': [{'from': roles[i % 2], 'value': value} for i, value in enumerate(values)]}


def annotated(
  number: int, what: str, prepared: str, trained: str | None, options: dict | None = None, **changes
) -> Case:
  return Case(number, what, prepared, trained, changes, options=options or {})


ODD = {  # accepted, and what is seen of them, written down
  (15, '1 x 1'): (file_of(Image.new('RGB', (1, 1), (1, 2, 3))), [[[1, 2, 3]]]),
  (17, 'RGBA: the stored colour, alpha dropped'): (
    file_of(Image.new('RGBA', (1, 1), (200, 100, 50, 0))),
    [[[200, 100, 50]]],
  ),
  (17, 'LA'): (file_of(Image.new('LA', (1, 1), (77, 0))), [[[77, 77, 77]]]),
  (18, 'CMYK'): (file_of(Image.new('CMYK', (1, 1), (255, 0, 0, 0)), 'JPEG', quality=100), [[[0, 255, 255]]]),
  (19, '1-bit'): (file_of(Image.fromarray(np.array([[True, False]]))), [[[255] * 3, [0] * 3]]),
  (20, '16-bit gray'): (
    file_of(Image.fromarray(np.array([[255, 256, 0xFFFF]], np.uint16))),
    [[[0] * 3, [1] * 3, [255] * 3]],
  ),
}
for orientation, upright in ((3, [[2, 1]]), (6, [[1], [2]]), (8, [[2], [1]])):
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.uint8([[1, 2]]))
  ODD[21, f'EXIF orientation {orientation}'] = (
    file_of(stored, exif=exif),
    np.uint8(upright)[..., None].repeat(3, -1),
  )
palette = Image.new('P', (2, 1))
palette.putpalette([10, 20, 30, 40, 50, 60])
palette.putpixel((1, 0), 1)
ODD[16, 'palette'] = (file_of(palette), [[[10, 20, 30], [40, 50, 60]]])
gif = [Image.new('RGB', (1, 1), color) for color in ((255, 0, 0), (0, 0, 255))]
ODD[22, 'animated GIF: its first frame'] = (
  file_of(gif[0], 'GIF', save_all=True, append_images=gif[1:]),
  [[[255, 0, 0]]],
)

MIDDLE = len(JPEG) // 2  # among the coefficients
FLIPPED = JPEG[:MIDDLE] + bytes([JPEG[MIDDLE] ^ 1]) + JPEG[MIDDLE + 1 :]

CASES = [
  image(1, 'empty', b'', 'E_IMG_FORMAT'),
  image(2, 'random bytes', bytes(range(7, 99)), 'E_IMG_FORMAT'),
  image(3, 'HTML named .jpg', b'<html><body>404</body></html>', 'E_IMG_FORMAT', 'a.jpg'),
  image(4, 'header of a JPEG', JPEG[:20], 'E_IMG_FORMAT', 'a.jpg'),
  image(5, 'SVG', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'E_IMG_FORMAT', 'a.svg'),
  image(6, 'PDF', b'%PDF-1.7\n%', 'E_IMG_FORMAT'),
  image(7, '0 x 0', png_of_size(0, 0), 'E_IMG_FORMAT'),
  image(8, 'half a JPEG', JPEG[: len(JPEG) // 2], 'E_IMG_TRUNCATED'),
  image(9, '40000 x 40000', png_of_size(40000, 40000), 'E_IMG_TOO_LARGE'),
  image(10, '12000 x 12000', png_of_size(12000, 12000), 'E_IMG_TOO_LARGE'),
  image(11, '9000 x 9000', png_of_size(9000, 9000), 'E_IMG_TOO_LARGE'),
  image(12, '1 x 20000', png_of_size(1, 20000), 'E_IMG_ASPECT'),
  image(13, 'EPS', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 'E_IMG_FORMAT'),
  image(14, 'a flipped bit of a JPEG', FLIPPED),
  *(image(number, what, data) for (number, what), (data, _) in ODD.items()),
  video(23, 'no frames', lambda: clip('mkv', []), 'E_VIDEO_EMPTY'),
  video(24, 'fewer frames than asked for', lambda: clip('mp4', 3), count=5),
  video(25, 'corrupt in the middle', cut_clip, 'E_VIDEO_TRUNCATED'),
  video(26, 'text named .mp4', lambda: b'hello' * 99, 'E_VIDEO_FORMAT'),
  video(26, 'MP4 named .png', lambda: clip('mp4', 3), name='a.png'),
  video(27, 'five hours', lambda: clip('mkv', 3, times=[0, 40, 18_000_000]), 'E_VIDEO_TOO_LARGE'),
  Case(28, 'a directory of frames', 'E_PATH', None, dict(image=..., video='frames', **says('<video>', 'x'))),
  annotated(31, 'no conversations', 'E_FIELD', None, conversations=...),
  annotated(32, 'no turns', 'E_EMPTY_TURNS', 'E_EMPTY_TURNS', image=..., conversations=[]),
  annotated(33, 'gpt first', 'E_ROLE_ORDER', 'E_ROLE_ORDER', **says('<image>', 'x', roles=('gpt', 'human'))),
  annotated(33, 'human twice', 'E_ROLE_ORDER', 'E_ROLE_ORDER', **says('<image>', 'x', roles=('human', 'human'))),
  annotated(34, 'a number as text', 'E_FIELD', None, **says('<image>', 3)),
  annotated(34, 'a lone surrogate', 'E_FIELD', None, **says('<image>', '\ud800')),
  annotated(35, 'no tag, one image', 'E_IMAGE_TAGS', 'E_IMAGE_TAGS', **says('what?', 'red')),
  annotated(36, 'two tags, one image', 'E_IMAGE_TAGS', 'E_IMAGE_TAGS', **says('<image>', 'a', '<image>', 'b')),
  annotated(36, 'a tag, no image', 'E_IMAGE_TAGS', 'E_IMAGE_TAGS', image=...),
  annotated(37, 'a tag in the answer', 'E_IMAGE_TAGS', 'E_IMAGE_TAGS', **says('<image>', 'a <image>')),
  annotated(37, 'a special token', 'E_SPECIAL_TOKEN', 'E_SPECIAL_TOKEN', **says('<image>', '<|im_end|>')),
  annotated(38, 'too long', '', 'E_TOO_LONG', **says('<image>', 'red ' * 300)),
  annotated(38, 'its image cut off', '', 'E_TOO_LONG', dict(truncate=True), **says('is ' * 300 + '<image>', 'red')),
  annotated(38, 'its targets cut off', '', 'E_TOO_LONG', dict(truncate=True), **says('<image>' + 'is ' * 300, 'red')),
  annotated(39, 'an id for the second time', 'E_DUPLICATE_ID', None, id='before'),
  *(
    annotated(41, f'path {path!a:.24}', 'E_PATH', None, image=path)
    for path in (
      '../secret.png', '/etc/passwd', 'link_out.png', 'dir_out/secret.png', 'file:///etc/passwd', 'a.png\0.txt', 'fifo',
      'frames', '../m2/secret.png', '', '.', 'frames/../b.png', 'http://127.0.0.1/b.png', 'loop', 'x' * 5000,
    )
  ),
  annotated(42, 'a file that is not there', 'E_IMG_MISSING', None, image='none.png'),
]  # fmt: skip
TEXTS = [  # the record 1 of a file, or all of it, as text
  (29, 'malformed', '[\n {"id": "a"\n', 'E_JSON', ':3:1'),
  (30, 'not a list', '{"id": "a"}', 'E_JSON', ''),
  (39, 'a key for the second time', '[{good}, {{"id": "s", "id": "t"}}]', 'E_JSON', ': record 1'),
  (39, 'NaN', '[{good}, {{"id": "s", "image": NaN}}]', 'E_JSON', ': record 1'),
  (40, '100,000 lists in each other', '[' * 100_000, 'E_JSON', ':1'),
  (40, 'an integer of 5,000 digits', f'[{"1" * 5000}]', 'E_JSON', ':1'),
]
SPECIAL = {43, 44}  # of whole datasets, below


def sample(**changes) -> dict:
  value = {'id': 's', 'image': 'b.png', **says('<image> what?', 'red'), **changes}
  return {key: item for key, item in value.items() if item is not ...}


@pytest.fixture
def root(tmp_path) -> Path:
  """The media root; beside it lies what must not be reached."""
  for name in ('m/frames', 'm2'):
    (tmp_path / name).mkdir(parents=True)
  for name in ('m/b.png', 'm/frames/0.png', 'm/frames/2.png', 'm2/secret.png', 'secret.png'):
    (tmp_path / name).write_bytes(GOOD)
  (tmp_path / 'm' / 'link_out.png').symlink_to(tmp_path / 'secret.png')
  (tmp_path / 'm' / 'dir_out').symlink_to(tmp_path / 'm2')
  (tmp_path / 'm' / 'loop').symlink_to('loop')
  os.mkfifo(tmp_path / 'm' / 'fifo')
  return tmp_path / 'm'


def test_every_number_is_there():
  assert {case.number for case in CASES} | {row[0] for row in TEXTS} | SPECIAL == set(range(1, 45))
  assert sum(case.number == 41 for case in CASES) == 15


@pytest.mark.parametrize('case', CASES, ids=str)
def test_when_it_is_prepared(root, case):
  for name, make in case.files.items():
    (root / name).write_bytes(make())
  samples = [sample(id='before'), sample(**case.changes), sample(id='after')]
  file = root.parent / 'x.json'
  file.write_text(json.dumps(samples))
  report = Report()
  found = [record['id'] for record in read_llava(file, root, report, reserved=RESERVED)]
  if not case.prepared:
    assert found == ['before', 's', 'after'] and not report.refused
    return
  assert found == ['before', 'after']
  (error,) = report.refused
  assert error.code == case.prepared
  assert str(error).startswith(f"{case.prepared}: {file}: record 1: sample '{samples[1]['id']}'")
  assert '\n' not in str(error)
  for field in ('image', 'video'):
    if case.number in {*range(1, 15), *range(23, 29), 41, 42} and field in samples[1]:
      assert f'{field} {samples[1][field]!r}' in error.where


@pytest.mark.parametrize(('number', 'what', 'text', 'code', 'place'), TEXTS, ids=[f'{r[0]} {r[1]}' for r in TEXTS])
def test_text_that_is_not_an_annotation(root, number, what, text, code, place):
  file = root.parent / 'x.json'
  good = json.dumps(sample(id='before'))
  file.write_text(text.format(good=good) if '{good}' in text else text)
  report = Report()
  if '{good}' in text:
    assert [record['id'] for record in read_llava(file, root, report)] == ['before']
    (error,) = report.refused
  else:
    with pytest.raises(DataError) as caught:
      list(read_llava(file, root, report))
    error = caught.value
  assert str(error).startswith(f'{code}: {file}{place}: ') and '\n' not in str(error)


def record(case: Case | None, name: str) -> dict:
  """As a dataset holds it, checked by nobody."""
  value = sample(id=name, **(case.changes if case else {}))
  media = [make() for make in case.files.values()] if case and case.files else [GOOD] * ('image' in value)
  return {'id': name, 'category': '', 'media': media, 'conversations': value['conversations']}


@pytest.mark.parametrize('case', [case for case in CASES if case.trained is not None], ids=str)
def test_when_a_dataset_holds_it(tmp_path, case):
  directory = tmp_path / 'd'
  write(directory, {'train': [record(None, 'a'), record(case, 's'), record(None, 'b')]}, description='for tests')
  options = dict(case.options)
  sampler = FrameSampler(count=options.pop('count', 0))
  row = RowShape.for_model(MODEL, length=96, visuals=5)
  options |= dict(row=row, processor=MediaProcessor(ImageProcessor(16), sampler))
  options |= dict(shuffle=False, batch_size=1, num_epochs=1)
  split = open_split(directory, 'train')
  masked = [int(batch['bad_samples'][0]) for batch in take(iterate(split, bad_sample='mask', **options))]
  assert masked == [0, int(bool(case.trained)), 0]
  if not case.trained:
    (_, batch, _) = take(iterate(split, **options))
    assert batch['loss_mask'].any() and (batch['slot_index'] < 96).sum() == (sampler.count or 1)
    return
  with pytest.raises(DataError) as error:
    take(iterate(split, **options))
  assert error.value.code == case.trained and '\n' not in str(error.value)
  assert error.value.where.startswith(f"{directory}: record 1 of split train: sample 's'")
  if case.files:
    assert re.search(r': (image|video) 0$', error.value.where)


@pytest.mark.parametrize('case', ODD, ids=str)
def test_what_is_seen_of_an_odd_image(case):
  data, expected = ODD[case]
  found = np.asarray(load_image(data, 'here'))
  assert found.shape == np.shape(expected)
  assert np.abs(found.astype(int) - expected).max() <= (2 if case[0] == 18 else 0)  # JPEG rounds


def test_14_a_flipped_bit_is_another_dataset():
  """It decodes; a hash alone can see it."""
  assert np.asarray(load_image(FLIPPED, 'here')).shape == np.asarray(load_image(JPEG, 'here')).shape
  assert (np.asarray(load_image(FLIPPED, 'here')) != np.asarray(load_image(JPEG, 'here'))).any()


def test_14_the_fingerprint_sees_it(tmp_path):
  prints = set()
  for i, data in enumerate((JPEG, FLIPPED, JPEG)):
    write(tmp_path / str(i), {'train': [{**record(None, 'a'), 'media': [data]}]}, description='for tests')
    prints.add(open_split(tmp_path / str(i), 'train').fingerprint)
  assert len(prints) == 2


def test_43_too_few_samples(tmp_path):
  (tmp_path / 'x.json').write_text('[]')
  with pytest.raises(DataError) as error:
    prepare([str(tmp_path / 'x.json')], tmp_path / 'out')
  assert str(error.value) == 'E_EMPTY: split train: expected at least one record; found none'
  assert not (tmp_path / 'out').exists()
  with pytest.raises(DataError) as error:
    iterate([record(None, 'a')] * 3, batch_size=4, num_epochs=1)
  assert str(error.value) == 'E_EMPTY: source: expected at least one batch of 4; found 3 record(s)'


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'emptied', 'replaced', 'gone'])
def test_44_a_damaged_file_of_records(tmp_path, damage):
  """Named by file and record, when it is opened or read; no other record comes instead."""
  write(tmp_path / 'd', {'train': [record(None, str(i)) for i in range(4)]}, description='for tests', shard_size=2)
  (file, _) = sorted((tmp_path / 'd').glob('*array_record*'))
  data = file.read_bytes()
  if damage == 'gone':
    file.unlink()
  else:
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    file.write_bytes({'cut': data[: len(data) // 2], 'flipped': flipped, 'emptied': b'', 'replaced': GOOD}[damage])
  with pytest.raises(DataError) as error:
    split = open_split(tmp_path / 'd', 'train')
    take(iterate(split, shuffle=False, batch_size=1, num_epochs=1))
  assert error.value.code == 'E_DATASET_CORRUPT' and error.value.where.startswith(str(file))
  assert '\n' not in str(error.value)
  if damage != 'gone':
    assert error.value.where == f'{file}: record 0 of split train'
    found = take(iterate(split, shuffle=False, batch_size=1, num_epochs=1, bad_sample='mask'))
    assert [int(batch['bad_samples'][0]) for batch in found] == [1, 1, 0, 0]

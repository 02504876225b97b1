"""What records measure is kept, and counts for nothing but the same records, tokenizer, template and layout."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import threading

import numpy as np
import pytest
from PIL import Image
from test_packing import SIZE_OF, SIZES
from test_pipeline import MODEL, RECORDS, ROW, iterate, take

from llava_mini_jax.data import sizes as sizes_module
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.mixture import Mixture, parse
from llava_mini_jax.data.records import open_split, write
from llava_mini_jax.data.sizes import SIZES_NAME, kept_sizes, record_sizes
from llava_mini_jax.data.tokenizer import save_tokenizer, train_tokenizer
from llava_mini_jax.data.video import FrameSampler
from llava_mini_jax.experiment import DataConfig


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp('data') / 'data'
  write(directory, {'train': RECORDS}, description='for tests')
  return open_split(directory, 'train')


@pytest.fixture
def measured(monkeypatch) -> list[int]:
  """Grows by the number of records, each time that they are measured."""
  counts, measure = [], sizes_module.record_sizes
  monkeypatch.setattr(
    sizes_module, 'record_sizes', lambda source, *a, **k: counts.append(len(source)) or measure(source, *a, **k)
  )
  return counts


def test_a_restart_does_not_measure(source, tmp_path, measured, capsys):
  file = tmp_path / 'run' / SIZES_NAME
  for _ in range(3):
    found = kept_sizes(file, source, SIZE_OF)
    np.testing.assert_array_equal(found, SIZES)
    assert found.dtype == np.int32
  assert measured == [21] and [path.name for path in file.parent.iterdir()] == [SIZES_NAME]
  told = capsys.readouterr().err
  assert 'measuring: 100%' in told and '21/21' in told and 'again' not in told


def test_workers_keep_the_same(source, tmp_path):
  kept_sizes(tmp_path / 'a', source, SIZE_OF)
  kept_sizes(tmp_path / 'b', source, SIZE_OF, workers=1)
  with np.load(tmp_path / 'a') as a, np.load(tmp_path / 'b') as b:
    assert set(a) == set(b) and all((a[name] == b[name]).all() for name in a)


def other_template(tmp_path):
  file = tmp_path / 'template.jinja'
  file.write_text('{% for m in messages %}{{ m.content }}{% generation %}.{% endgeneration %}{% endfor %}')
  return file


CHANGES = {
  'template': lambda tmp_path: dict(template='qa'),
  'template file': lambda tmp_path: dict(template=other_template(tmp_path)),
  'system': lambda tmp_path: dict(system='be brief'),
  'no system': lambda tmp_path: dict(system=''),
  'tokenizer': lambda tmp_path: dict(tokenizer=train_tokenizer(['what is this?'] * 3, 270)),
  'tokens per visual': lambda tmp_path: dict(row=dataclasses.replace(ROW, tokens_per_visual=4)),
  'text only': lambda tmp_path: dict(model=dataclasses.replace(MODEL, text_only='zero_image')),
  'sampler': lambda tmp_path: dict(sampler=FrameSampler(fps=2.0)),
}


@pytest.mark.parametrize('name', CHANGES)
def test_what_measures_otherwise_is_measured_anew(source, tmp_path, measured, capsys, name):
  file = tmp_path / 'run' / SIZES_NAME
  kept_sizes(file, source, SIZE_OF)
  other = dataclasses.replace(SIZE_OF, **CHANGES[name](tmp_path))
  expected = np.array([other(record) for record in RECORDS])
  for _ in range(2):
    np.testing.assert_array_equal(kept_sizes(file, source, other), expected)
  assert measured == [21, 21]
  message = f'{file}: of other records, or of another tokenizer, template or layout; every record is measured again\n'
  assert capsys.readouterr().err.count(message) == 1


def test_a_template_file_that_says_something_else(source, tmp_path, measured):
  file, template = tmp_path / SIZES_NAME, other_template(tmp_path)
  size_of = dataclasses.replace(SIZE_OF, template=template)
  kept_sizes(file, source, size_of)
  moved = shutil.copy(template, tmp_path / 'moved.jinja')
  kept_sizes(file, source, dataclasses.replace(size_of, template=moved))
  assert measured == [21]
  assert size_of.fingerprint == dataclasses.replace(size_of, template=moved).fingerprint
  before = size_of.fingerprint
  template.write_text(template.read_text().replace('.{%', '!{%'))
  assert size_of.fingerprint != before


def test_what_changes_no_size_is_not_measured_anew(source, tmp_path, measured):
  """The size of a row, the same dataset elsewhere."""
  file = tmp_path / SIZES_NAME
  kept_sizes(file, source, SIZE_OF)
  copy = open_split(shutil.copytree(source.directory, tmp_path / 'copy'), 'train')
  larger = dataclasses.replace(SIZE_OF, row=dataclasses.replace(ROW, length=7, visuals=9))
  np.testing.assert_array_equal(kept_sizes(file, copy, larger), SIZES)
  assert measured == [21]


def test_other_records_are_measured(source, tmp_path, measured):
  write(tmp_path / 'other', {'train': RECORDS[::-1]}, description='for tests')
  other = open_split(tmp_path / 'other', 'train')
  mixture = Mixture(parse([(str(source.directory), 'train'), (str(tmp_path / 'other'), 'train', 'first:4')]), seed=0)
  file = tmp_path / SIZES_NAME
  np.testing.assert_array_equal(kept_sizes(file, source, SIZE_OF), SIZES)
  np.testing.assert_array_equal(kept_sizes(file, other, SIZE_OF), SIZES[::-1])
  np.testing.assert_array_equal(kept_sizes(file, mixture, SIZE_OF), [*SIZES, *SIZES[:-5:-1]])
  assert measured == [21, 21, 25]


@pytest.mark.parametrize('damage', ['cut', 'changed', 'empty', 'text', 'npy', 'short', 'floats'])
def test_a_damaged_file_is_told_of_and_replaced(source, tmp_path, measured, capsys, damage):
  """Whatever was cut off, and whichever byte is another one, no other sizes are ever handed out."""
  file = tmp_path / SIZES_NAME
  kept_sizes(file, source, SIZE_OF)
  whole = file.read_bytes()
  with np.load(file) as stored:
    key = stored['fingerprint']
  cases = {
    'cut': [whole[:at] for at in range(0, len(whole), 97)],
    'changed': [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 41)],
    'empty': [b''],
    'text': [b'no archive'],
  }
  for data in cases.get(damage, [None]):
    if damage == 'npy':
      with file.open('wb') as out:
        np.save(out, SIZES)
    elif damage in ('short', 'floats'):
      with file.open('wb') as out:
        np.savez(out, fingerprint=key, sizes=SIZES[:-1] if damage == 'short' else SIZES.astype(np.float32))
    else:
      file.write_bytes(data)
    measured.clear()
    capsys.readouterr()
    np.testing.assert_array_equal(kept_sizes(file, source, SIZE_OF), SIZES)
    told = capsys.readouterr().err
    if measured:  # else the byte was one that nothing reads
      assert told.startswith(f'{file}: ') and '; every record is measured again\n' in told
      assert file.read_bytes() == whole
    assert measured or damage == 'changed'


class Canary:
  """Unpickled, it makes a directory."""

  def __init__(self, directory):
    self.directory = str(directory)

  def __reduce__(self):
    return os.mkdir, (self.directory,)


def test_kept_sizes_run_no_code(source, tmp_path, capsys):
  file, canary = tmp_path / SIZES_NAME, tmp_path / 'canary'
  pickled = np.empty(1, object)
  pickled[0] = Canary(canary)
  np.savez(file, fingerprint=pickled, sizes=SIZES)
  np.testing.assert_array_equal(kept_sizes(file, source, SIZE_OF), SIZES)
  assert 'damaged' in capsys.readouterr().err
  assert not canary.exists()
  np.savez(file, fingerprint=pickled, sizes=SIZES)
  with np.load(file, allow_pickle=True) as stored:
    assert stored['fingerprint'].shape == (1,) and canary.exists(), 'the canary itself does not work'


def test_nothing_is_kept_of_records_that_cannot_be_measured(tmp_path):
  write(tmp_path / 'bad', {'train': [*RECORDS[:3], {**RECORDS[3], 'media': []}]}, description='for tests')
  with pytest.raises(DataError, match="^E_IMAGE_TAGS: .*/bad: record 3 of split train: sample '3': "):
    kept_sizes(tmp_path / 'run' / SIZES_NAME, open_split(tmp_path / 'bad', 'train'), SIZE_OF)
  assert not (tmp_path / 'run').exists()


def test_many_may_write_at_once(source, tmp_path):
  """As the processes of a run do that share a disk."""
  file, found = tmp_path / SIZES_NAME, []
  threads = [threading.Thread(target=lambda: found.append(kept_sizes(file, source, SIZE_OF))) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(found) == 6 and all((sizes == SIZES).all() for sizes in found)
  assert [path.name for path in tmp_path.iterdir()] == [SIZES_NAME]


@pytest.mark.parametrize('how', [dict(pack=True), dict(group_by_length=True)])
def test_an_order_from_kept_sizes_is_the_same(source, tmp_path, measured, how):
  save_tokenizer(SIZE_OF.tokenizer, tmp_path / 'tokenizer')
  config = DataConfig(
    dataset=str(source.directory),
    tokenizer=str(tmp_path / 'tokenizer'),
    template='chatml',
    row_length=96,
    visuals_per_row=2,
    **how,
  )
  kept = tmp_path / SIZES_NAME
  orders = [load_inputs(config, MODEL).order(batch_size=2, seed=0, kept=path)(1) for path in (kept, kept, None)]
  listed = [[str(item) for item in order] for order in orders]
  assert listed == [listed[0]] * 3 and measured == [21]


@pytest.mark.parametrize('text_only', ['skip', 'zero_image'])
@pytest.mark.parametrize('system', [None, '', 'be brief'])
def test_sizes_are_those_of_the_rows(text_only, system):
  model = dataclasses.replace(MODEL, text_only=text_only)
  sizes = record_sizes(RECORDS, dataclasses.replace(SIZE_OF, model=model, system=system))
  assert sizes.dtype == np.int32
  (batch,) = take(iterate(batch_size=21, shuffle=False, model=model, system=system), 1)
  np.testing.assert_array_equal(sizes[:, 0], batch['segment_ids'].sum(axis=1))
  np.testing.assert_array_equal(sizes[:, 1], batch['fuse_mask'].any(axis=2).sum(axis=1))


def test_several_slots_for_each_visual():
  sizes = record_sizes(RECORDS, dataclasses.replace(SIZE_OF, row=dataclasses.replace(ROW, tokens_per_visual=5)))
  np.testing.assert_array_equal(sizes[:, 0], SIZES[:, 0] + 4 * SIZES[:, 1])


def test_workers_find_the_same_sizes(tmp_path):
  write(tmp_path / 'data', {'train': RECORDS}, description='for tests')
  np.testing.assert_array_equal(record_sizes(open_split(tmp_path / 'data', 'train'), SIZE_OF, workers=2), SIZES)


def moving(frames: int) -> bytes:
  """A GIF of 5 frames a second."""
  pictures = [Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)) for i in range(frames)]
  out = io.BytesIO()
  pictures[0].save(out, 'GIF', save_all=True, append_images=pictures[1:], duration=200)
  return out.getvalue()


@pytest.mark.parametrize(
  ('sampler', 'frames'),
  [
    (FrameSampler(fps=2.5), 3),
    (FrameSampler(fps=5, max_frames=4), 4),
    (FrameSampler(count=4), 4),
    (FrameSampler(count=4, rule='released'), 4),
    (FrameSampler(count=9, rule='released'), 6),
  ],
)
def test_videos_are_measured_as_they_are_laid_out(sampler, frames):
  turns = [{'from': 'human', 'value': 'what <video> is <image>'}, {'from': 'gpt', 'value': 'this'}]
  record = {'id': 'v', 'category': '', 'media': [moving(6), RECORDS[0]['media'][0]], 'conversations': turns}
  shape = dataclasses.replace(ROW, visuals=8)
  sizes = record_sizes([record], dataclasses.replace(SIZE_OF, row=shape, sampler=sampler))
  assert sizes[0, 1] == frames + 1
  (batch,) = take(iterate([record], row=shape, processor=MediaProcessor(ImageProcessor(16), sampler), batch_size=1), 1)
  assert (batch['segment_ids'].sum(), (batch['slot_index'] < 96).sum()) == tuple(sizes[0])


def test_a_damaged_video_is_named():
  turns = [{'from': 'human', 'value': '<video>'}, {'from': 'gpt', 'value': 'this'}]
  record = {'id': 'v', 'category': '', 'media': [b'no video'], 'conversations': turns}
  with pytest.raises(DataError, match="^E_VIDEO_FORMAT: sample 'v': video: "):
    SIZE_OF(record)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_record_that_cannot_be_measured(workers):
  with pytest.raises(DataError) as error:
    record_sizes([*RECORDS[:3], {**RECORDS[3], 'media': []}], SIZE_OF, workers=workers)
  expected = 'expected 0 <image> or <video> tag(s) for its media; found 1'
  assert str(error.value) == f"E_IMAGE_TAGS: sample '3': {expected}"

"""From an annotation file with images, videos and text, through preparation and pipeline, to the visuals of a row."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import IMAGE_MEAN, ConfigError, LlavaMiniConfig
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.pipeline import make_iterator
from llava_mini_jax.data.prepare import prepare
from llava_mini_jax.data.video import FrameSampler
from llava_mini_jax.experiment import DataConfig

pytest.importorskip('av')
from video_clips import clip, number, numbered  # noqa: E402

TINY = LlavaMiniConfig.preset('tiny')
LONG = r'^E_TOO_LONG: .*: record '
MODEL = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, image_size=32, patch_size=8))
SAMPLES = [
  ('image', dict(image='red.png'), '<image>\ncolor?'),
  ('video', dict(video='clip.mp4'), '<image>\nwhat happens?'),  # as LLaVA's own video data write it
  ('both', dict(image=['red.png', 'blue.png'], video='clip.mp4'), 'first <image> then <video>, last <image>'),
  ('text', {}, 'no picture'),
]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  root = tmp_path_factory.mktemp('media')
  for color in ('red', 'blue'):
    Image.new('RGB', (40, 20), color).save(root / f'{color}.png')
  (root / 'clip.mp4').write_bytes(clip('mp4', [numbered(i, 64, 64) for i in range(72)]))  # three seconds
  turns = lambda question: [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'yes'}]  # noqa: E731
  samples = [dict(id=name, conversations=turns(question), **media) for name, media, question in SAMPLES]
  (root / 'all.json').write_text(json.dumps(samples))
  prepare([str(root / 'all.json')], root / 'data', media_roots=[root])
  return root


def iterate(source, num_epochs: int = 1, augment: Augment | None = None, **fields):
  """One row per sample, in order."""
  config = DataConfig(**dict(dataset=str(source / 'data'), template='qa', row_length=64, visuals_per_row=6) | fields)
  inputs = load_inputs(config, MODEL)
  return make_iterator(
    inputs.source,
    tokenizer=inputs.tokenizer,
    template=config.template,
    model=MODEL,
    row=inputs.row,
    processor=inputs.processor,
    batch_size=1,
    seed=0,
    num_epochs=num_epochs,
    shuffle=False,
    augment=augment,
  )


def rows(source, **fields) -> list[dict[str, np.ndarray]]:
  iterator = iterate(source, **fields)
  return [{name: value[0] for name, value in batch.items()} for batch in iterator]


def present(row) -> np.ndarray:
  """Which visuals have slots."""
  return row['slot_index'][:, 0] < len(row['tokens'])


def color(pixels) -> str:
  red, _, blue = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
  return 'red' if red > 200 and blue < 60 else 'blue' if blue > 200 and red < 60 else 'frame'


def test_every_kind_of_sample(source):
  image, video, both, text = rows(source)
  assert [present(row).sum() for row in (image, video, both, text)] == [1, 3, 5, 0]
  assert [number(frame[0]) for frame in video['pixels'][:3]] == [0, 24, 48]  # a frame per second, in time order
  assert [color(visual[0]) for visual in both['pixels'][:5]] == ['red', 'frame', 'frame', 'frame', 'blue']
  np.testing.assert_array_equal(both['pixels'][1:4], video['pixels'][:3])
  slots = both['slot_index'][:5, 0]
  assert (np.diff(slots) > 0).all() and slots[3] - slots[1] == 2 and slots[4] > slots[3] + 1
  for row, visuals in ((image, 1), (video, 3), (both, 5)):
    assert (row['fuse_index'][:visuals] == row['fuse_index'][0]).all()  # every visual is fused with all of the text
    assert row['fuse_mask'][0].any() and not row['fuse_mask'][visuals:].any()
  assert not text['fuse_mask'].any() and text['loss_mask'].any()


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (dict(video_fps=2.0), [0, 12, 24, 36, 48, 60]),
    (dict(video_fps=1.0, video_frames=2), None),
    (dict(video_fps=24.0, video_max_frames=4), None),
  ],
)
def test_which_frames_are_seen(source, fields, expected):
  row = rows(source, **(fields | dict(visuals_per_row=8)))[1]
  found = [number(frame[0]) for frame in row['pixels'][present(row)]]
  if expected is None:
    sampler = FrameSampler(*(fields.get(f'video_{name}', 0) for name in ('fps', 'frames', 'max_frames')))
    media = MediaProcessor(ImageProcessor(32), sampler)
    expected = [number(frame) for frame in media.read(source / 'clip.mp4', '<video>', 'here')]
    assert len(expected) == (fields.get('video_frames') or fields['video_max_frames'])
  assert found == expected


def test_high_resolution(source):
  """Crops in raster order and the whole image last, for images and frames alike."""
  row = rows(source, grid=2)[2]
  assert row['pixels'].shape == (6, 5, 32, 32, 3)
  media = MediaProcessor(ImageProcessor(32, 'pad', 2, 'pad_then_split'))
  expected = media.views(Image.open(source / 'red.png').convert('RGB'))
  np.testing.assert_array_equal(row['pixels'][0], expected)
  frame = media.read(source / 'clip.mp4', '<video>', 'here')[1]
  np.testing.assert_array_equal(row['pixels'][2], media.views(frame))
  assert {(order, grid): rows(source, grid=grid, grid_order=order)[0]['pixels'].shape[1] for order in
          ('split_then_pad', 'resize') for grid in (2, 3)} == {
    ('split_then_pad', 2): 5, ('split_then_pad', 3): 10, ('resize', 2): 5, ('resize', 3): 10}  # fmt: skip


def test_frames_are_squashed_as_released_or_treated_as_images(source):
  frame = numbered(5, 64, 32)
  data = clip('mp4', [frame] * 24)
  squashed, whole = (MediaProcessor(ImageProcessor(32), frame_resize=how) for how in ('squash', 'aspect'))
  assert squashed.read(data, '<video>', 'here')[0].shape == (32, 32, 3)
  (seen,) = whole.read(data, '<video>', 'here')
  assert seen.shape == (32, 64, 3)
  mean = np.rint(255 * np.asarray(IMAGE_MEAN))
  assert np.abs(whole.views(seen)[0, 0, 0] - mean).max() <= 1  # padded above, not squashed
  with pytest.raises(ConfigError, match=r'^MediaProcessor.frame_resize: expected one of squash, aspect; found'):
    MediaProcessor(ImageProcessor(32), frame_resize='crop')


def test_frames_of_a_video_are_augmented_alike(source):
  """Mirrored all or none; two images of a sample each for themselves."""
  plain = rows(source)[1]['pixels'][:3]
  seen = set()
  for batch in list(iterate(source, num_epochs=8, augment=Augment(flip=0.5, shift=0)))[1::4]:
    frames = batch['pixels'][0, :3]
    mirrored = np.array_equal(frames, plain[:, :, :, ::-1])
    assert mirrored or np.array_equal(frames, plain)
    seen.add(mirrored)
  assert seen == {True, False}


def test_a_video_longer_than_the_row(source):
  with pytest.raises(
    DataError,
    match=LONG + r"1 of split train: sample 'video': expected at most 2 visual\(s\) per row; found 3",
  ):
    rows(source, visuals_per_row=2)


@pytest.mark.parametrize(
  ('media', 'question', 'message'),
  [
    (dict(video='clip.mp4'), 'no tag', "sample 'bad': found 0 <video> tag(s), expected 1 for its video(s)"),
    (dict(image='red.png', video='clip.mp4'), '<image> <image>', 'found 2 <image> tag(s), expected 1 for its image(s)'),
    (dict(image='red.png'), '<video>', 'found 0 <image> tag(s), expected 1 for its image(s)'),
    ({}, '<image>', 'found 1 <image> tag(s), expected 0 for its image(s)'),
    (dict(video=['clip.mp4', 'clip.mp4']), '<image>', 'found 1 <video> tag(s), expected 2 for its video(s)'),
    (dict(video='red.png'), '<video>', "sample 'bad': video 'red.png': "),
    (dict(video='../clip.mp4'), '<video>', "expected a path relative to the media root, without '..'"),
    (dict(video='none.mp4'), '<video>', 'no such file in '),
  ],
)
def test_bad_samples_are_named(source, tmp_path, media, question, message):
  turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'yes'}]
  (tmp_path / 'bad.json').write_text(json.dumps([dict(id='bad', conversations=turns, **media)]))
  with pytest.raises(DataError) as error:
    prepare([str(tmp_path / 'bad.json')], tmp_path / 'out', media_roots=[source])
  assert message in str(error.value) and error.value.code == 'E_REFUSED'


def test_each_source_has_its_own_root(source, tmp_path):
  files = []
  for name in ('red', 'blue'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.png').write_bytes((source / f'{name}.png').read_bytes())
    turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': name}]
    (tmp_path / f'{name}.json').write_text(json.dumps([dict(id=name, image='x.png', conversations=turns)]))
    files.append(str(tmp_path / f'{name}.json'))
  roots = [tmp_path / 'red', tmp_path / 'blue']
  prepare(files, tmp_path / 'out', splits=['red', 'blue'], media_roots=roots)
  for name in ('red', 'blue'):
    config = DataConfig(dataset=str(tmp_path / 'out'), split=name, row_length=64)
    assert load_inputs(config, MODEL).source[0]['media'] == [(source / f'{name}.png').read_bytes()]
  with pytest.raises(ConfigError, match=r'^media_root: expected one, or one for each of 2 source\(s\); found 3'):
    prepare(files, tmp_path / 'other', splits=['red', 'blue'], media_roots=[*roots, source])


def test_long_samples_are_cut_or_refused_packed_or_not(tmp_path):
  """And one that would lose its image, or all that it could teach, is refused all the same."""
  turns = lambda question, answer: [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]  # noqa: E731
  long, short = turns('q', 'yes ' * 60), turns('q', 'yes')
  (tmp_path / 'a.json').write_text(json.dumps([dict(id=str(i), conversations=c) for i, c in enumerate((long, short))]))
  prepare([str(tmp_path / 'a.json')], tmp_path / 'data')
  (tmp_path / 'b.json').write_text(json.dumps([dict(id='b', conversations=turns('q ' * 60, 'yes'))]))
  prepare([str(tmp_path / 'b.json')], tmp_path / 'bad')

  def epoch(dataset, **fields):
    config = DataConfig(**dict(dataset=str(dataset), template='qa', row_length=32) | fields)
    inputs = load_inputs(config, MODEL)
    order = inputs.order(batch_size=1, seed=0)
    iterator = inputs.iterator(order, batch_size=1, seed=0, shard_index=0, shard_count=1)
    return [next(iterator) for _ in range(inputs.rows(order, 1.0))]

  for fields in (dict(truncate=True), dict(truncate=True, pack=True)):
    found = epoch(tmp_path / 'data', **fields)
    assert sorted(int((batch['segment_ids'] > 0).sum()) for batch in found)[-1] == 32
    assert len(found) == 2
  with pytest.raises(DataError, match=LONG + "0 of split train: sample '0': expected at most 32 tokens"):
    epoch(tmp_path / 'data')
  with pytest.raises(DataError, match=LONG + "0 of split train: sample 'b': expected a token to learn to fit; found"):
    epoch(tmp_path / 'bad', truncate=True)

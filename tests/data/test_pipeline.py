"""What the pipeline hands out depends on seed and position alone; every resume goes on exactly."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax.config import IMAGE_MEAN, ConfigError, LlavaMiniConfig
from llava_mini_jax.data import samples as samples_module
from llava_mini_jax.data.augment import Augment
from llava_mini_jax.data.conversation import encode, load_template
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import ImageProcessor, load_image
from llava_mini_jax.data.media import MediaProcessor
from llava_mini_jax.data.pipeline import make_iterator
from llava_mini_jax.data.records import open_split, write
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.tokenizer import train_tokenizer
from llava_mini_jax.types import Batch

COUNT = 21
_TINY = LlavaMiniConfig.preset('tiny')
MODEL = dataclasses.replace(
  _TINY,
  vision=dataclasses.replace(_TINY.vision, image_size=16),
  decoder=dataclasses.replace(_TINY.decoder, vocab_size=512),
)
ROW = RowShape.for_model(MODEL, length=96, visuals=2)


def picture(seed: int) -> bytes:
  pixels = np.full((16, 16, 3), 255, np.uint8)
  pixels[4:9, 3:10] = np.random.default_rng(seed).integers(0, 255, (5, 7, 3))
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def record(i: int) -> dict:
  """Three questions about one image; every seventh is text only, every eighth has two images."""
  images = 0 if i % 7 == 6 else 2 if i % 8 == 7 else 1
  values = ['<image>\n' * images + f'what is {i}?', f'this is {i}', 'is it so?', 'yes', 'or not?', 'no']
  turns = [{'from': ('human', 'gpt')[n % 2], 'value': value} for n, value in enumerate(values)]
  return {'id': str(i), 'category': '', 'media': [picture(100 * i + n) for n in range(images)], 'conversations': turns}


RECORDS = [record(i) for i in range(COUNT)]
TOKENIZER = train_tokenizer(turn['value'] for item in RECORDS for turn in item['conversations'])


def iterate(source=RECORDS, **options):
  defaults = dict(
    tokenizer=TOKENIZER,
    template='chatml',
    model=MODEL,
    row=ROW,
    processor=MediaProcessor(ImageProcessor(16)),
    batch_size=4,
    seed=3,
  )
  return make_iterator(source, **{**defaults, **options})


RANDOM = dict(augment=Augment(flip=0.5, shift=4), max_turns=2)


def take(iterator, count=None) -> list[dict[str, np.ndarray]]:
  return [{k: np.array(v) for k, v in batch.items()} for _, batch in zip(range(count or 10**9), iterator, strict=False)]


def assert_equal(a, b):
  assert len(a) == len(b)
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def questions(batch) -> list[str]:
  return [TOKENIZER.decode(row[row > 0]) for row in batch['tokens']]


def test_the_fields_of_a_batch():
  (batch,) = take(iterate(), 1)
  others = {'branch_ids', 'features', 'kept', 'bad_samples'}
  assert batch.keys() == {field.name for field in dataclasses.fields(Batch)} - others
  b, m, length = 4, 2, 96
  shapes = {
    **dict.fromkeys(('tokens', 'targets', 'loss_mask', 'segment_ids', 'positions'), (b, length)),
    **dict.fromkeys(('fuse_index', 'fuse_mask'), (b, m, length)),
    'slot_index': (b, m, 1),
    'pixels': (b, m, 1, 16, 16, 3),
  }
  assert {name: array.shape for name, array in batch.items()} == shapes
  types = {'pixels': np.uint8, 'loss_mask': np.bool_, 'fuse_mask': np.bool_}
  assert {name: array.dtype for name, array in batch.items()} == {name: types.get(name, np.int32) for name in shapes}


def test_rows_are_the_records_in_order():
  batches = take(iterate(shuffle=False, num_epochs=1))
  assert len(batches) == 5  # 21 records: the incomplete sixth batch is dropped
  rows = [{name: array[i] for name, array in batch.items()} for batch in batches for i in range(4)]
  for i, row in enumerate(rows):
    turns = [
      {'role': ('user', 'assistant')[n % 2], 'content': turn['value']}
      for n, turn in enumerate(RECORDS[i]['conversations'])
    ]
    encoded = encode(TOKENIZER, load_template('chatml'), turns)
    np.testing.assert_array_equal(row['tokens'][: len(encoded.ids)], np.maximum(encoded.ids, 0))
    np.testing.assert_array_equal(row['targets'][row['loss_mask']], encoded.ids[encoded.assistant])
    images = [np.asarray(load_image(data, '')) for data in RECORDS[i]['media']]
    for m in range(2):
      np.testing.assert_array_equal(row['pixels'][m, 0], images[m] if m < len(images) else np.zeros((16, 16, 3)))
    assert (row['slot_index'] < 96).sum() == len(images)


def test_an_epoch_visits_every_record_once_in_an_order_of_its_own():
  batches = take(iterate(batch_size=3, max_turns=None), 14)
  orders = [
    [text.split('what is ')[1].split('?')[0] for b in batches[e : e + 7] for text in questions(b)] for e in (0, 7)
  ]
  names = sorted(item['id'] for item in RECORDS)
  assert sorted(orders[0]) == sorted(orders[1]) == names
  assert orders[0] != orders[1]


def test_a_seed_decides_everything():
  assert_equal(take(iterate(**RANDOM), 8), take(iterate(**RANDOM), 8))
  a, b = take(iterate(**RANDOM), 8), take(iterate(seed=4, **RANDOM), 8)
  assert any((x['tokens'] != y['tokens']).any() for x, y in zip(a, b, strict=True))


def test_memory_changes_nothing(monkeypatch):
  expected = take(iterate(**RANDOM), 16)  # three epochs
  monkeypatch.setattr(samples_module, 'CACHE_BYTES', 5000)
  assert_equal(take(iterate(**RANDOM), 16), expected)
  monkeypatch.setattr(samples_module, 'CACHE_BYTES', 0)
  assert_equal(take(iterate(**RANDOM), 16), expected)


def test_resume_from_every_state():
  """Across the ends of epochs, and with another number of shards from there on."""
  whole = iterate(num_epochs=3, **RANDOM)
  states, batches = [whole.get_state()], []
  for batch in whole:
    batches.append(batch)
    states.append(whole.get_state())
  assert len(batches) == 3 * COUNT // 4
  assert states == [{'global_next_index': 4 * n} for n in range(len(batches) + 1)]
  for n, state in enumerate(states):
    resumed = iterate(num_epochs=3, **RANDOM)
    resumed.set_state(state)
    assert_equal(take(resumed), batches[n:])
    halves = [iterate(num_epochs=3, shard_index=i, shard_count=2, **RANDOM) for i in range(2)]
    for half in halves:
      half.set_state(state)
    assert_equal(interleave(*map(take, halves)), batches[n:])


def interleave(*shards):
  """Row i of the global batch is row i // n of shard i % n."""
  for parts in zip(*shards, strict=True):
    assert len({len(part['tokens']) for part in parts}) == 1
  return [
    {name: np.stack([part[name] for part in parts], 1).reshape(-1, *parts[0][name].shape[1:]) for name in parts[0]}
    for parts in zip(*shards, strict=True)
  ]


@pytest.mark.parametrize('shards', [2, 4])
def test_shards_make_up_the_global_batch(shards):
  expected = take(iterate(num_epochs=2, **RANDOM))
  parts = [take(iterate(num_epochs=2, shard_index=i, shard_count=shards, **RANDOM)) for i in range(shards)]
  assert_equal(interleave(*parts), expected)


def test_every_shard_has_as_many_batches():
  """Seven records over two shards: four and three of them, but three batches on both."""
  for index in range(2):
    found = take(iterate(RECORDS[:7], batch_size=2, num_epochs=1, shard_index=index, shard_count=2))
    assert len(found) == 3


def test_workers_change_nothing(tmp_path):
  write(tmp_path / 'data', {'train': RECORDS}, description='for tests')
  source = open_split(tmp_path / 'data', 'train')
  expected = take(iterate(**RANDOM), 8)
  iterator = iterate(source, worker_count=2, **RANDOM)
  found = take(iterator, 4)
  state = iterator.get_state()
  iterator.close()
  assert_equal(found, expected[:4])
  resumed = iterate(source, **RANDOM)
  resumed.set_state(state)
  assert_equal(take(resumed, 4), expected[4:])


def test_workers_run_outside_of_absl_app(tmp_path):
  program = (
    'import sys; sys.path.insert(0, sys.argv[1])\n'
    'from test_pipeline import RECORDS, iterate\n'
    "if __name__ == '__main__':\n"
    '  iterator = iterate(worker_count=1)\n'
    "  assert next(iterator)['tokens'].shape == (4, 96)\n"
    '  iterator.close()\n'
    "  assert 'tensorflow' not in sys.modules\n"
  )
  script = tmp_path / 'program.py'
  script.write_text(program)
  here = os.path.dirname(__file__)
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([here, os.path.dirname(here), *sys.path])}
  done = subprocess.run([sys.executable, script, here], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_sample_is_named(workers):
  bad = [*RECORDS[:5], {**RECORDS[5], 'media': [b'no image']}, *RECORDS[6:]]
  iterator = iterate(bad, shuffle=False, worker_count=workers)
  next(iterator)
  with pytest.raises(DataError, match="^E_IMG_FORMAT: sample '5': image 0: "):
    next(iterator)
  iterator.close()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'media': []}, "E_IMAGE_TAGS: sample '0': expected 0 <image> or <video> tag(s) for its media; found 1"),
    ({'conversations': RECORDS[0]['conversations'][:1]}, "E_NO_TARGET: sample '0': "),
    ({'conversations': []}, "E_EMPTY_TURNS: sample '0': "),
    (
      {'conversations': [RECORDS[0]['conversations'][0], {'from': 'gpt', 'value': 'Zz' * 50}]},
      "E_TOO_LONG: sample '0': expected at most 96 tokens with vision slots; found 11",
    ),
  ],
)
def test_what_is_wrong_with_a_sample(change, message):
  with pytest.raises(DataError) as error:
    next(iterate([{**RECORDS[0], **change}], batch_size=1))
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    ({'source': []}, DataError, 'E_EMPTY: source: expected at least one record; found none'),
    (
      {'source': RECORDS[:3], 'num_epochs': 1},
      DataError,
      'E_EMPTY: source: expected at least one batch of 4; found 3 record(s)',
    ),
    ({'shard_count': 3}, ConfigError, 'batch_size=4 does not divide over shard 0 of 3'),
    ({'shard_index': 2, 'shard_count': 2}, ConfigError, 'batch_size=4 does not divide over shard 2 of 2'),
    ({'max_turns': 0}, ConfigError, 'max_turns: expected at least 1; found 0'),
    (
      {'processor': MediaProcessor(ImageProcessor(32))},
      ConfigError,
      "processor.size: expected 16, the model's; found 32",
    ),
    (
      {'row': dataclasses.replace(ROW, tokens_per_visual=4)},
      ConfigError,
      "row.tokens_per_visual: expected 1, the model's; found 4",
    ),
    (
      {'model': dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab_size=64))},
      ConfigError,
      f'decoder.vocab_size=64 cannot hold the {len(TOKENIZER)} tokens of the tokenizer',
    ),
  ],
)
def test_settings(options, error, message):
  with pytest.raises(error) as caught:
    iterate(**options)
  assert str(caught.value) == message


def test_fewer_records_than_a_batch_go_round():
  (batch,) = take(iterate(RECORDS[:3]), 1)
  assert len(set(questions(batch))) == 3


def test_views_of_hd():
  (batch,) = take(iterate(RECORDS[:1], processor=MediaProcessor(ImageProcessor(16, grid=2)), batch_size=1), 1)
  assert batch['pixels'].shape == (1, 2, 5, 16, 16, 3)
  np.testing.assert_array_equal(batch['pixels'][0, 0, 4], np.asarray(load_image(RECORDS[0]['media'][0], '')))


def test_text_only_with_a_zero_image():
  """Fused with what the tower reads as zero, and without slots."""
  model = dataclasses.replace(MODEL, text_only='zero_image')
  (batch,) = take(iterate([RECORDS[6]], model=model, batch_size=1), 1)
  assert np.abs(batch['pixels'][0, 0] / 255 - IMAGE_MEAN).max() <= 0.5 / 255
  assert (batch['pixels'][0, 1] == 0).all()
  assert batch['fuse_mask'][0, 0].any() and not batch['fuse_mask'][0, 1].any()
  assert (batch['slot_index'] == 96).all()


def test_the_system_text_is_replaced():
  (batch,) = take(iterate([RECORDS[0]], batch_size=1, system='be brief'), 1)
  assert questions(batch)[0].startswith('<|im_start|>system\nbe brief<|im_end|>\n')

"""What `bad_sample='mask'` leaves of a bad sample: its place, padding and a count. All else of the stream stays."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from test_packing import SIZE_OF, SIZES, WIDE
from test_pipeline import MODEL, RANDOM, RECORDS, ROW, assert_equal, interleave, iterate, take

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.mixture import Epochs
from llava_mini_jax.data.packing import Grouped, Packed, pack_rows
from llava_mini_jax.data.records import open_split, write
from llava_mini_jax.data.rows import RowShape
from llava_mini_jax.data.sizes import SIZES_NAME, kept_sizes, record_sizes

SHORT = [RECORDS[0]['conversations'][0], {'from': 'gpt', 'value': 'Zz' * 300}]
BAD = {  # by index: what is wrong shows when the image is decoded, the tags are counted, or the row is laid out
  2: ({'media': [b'no image']}, 'E_IMG_FORMAT'),
  9: ({'media': []}, 'E_IMAGE_TAGS'),
  12: ({'conversations': SHORT}, 'E_TOO_LONG'),
}
MIXED = [{**record, **BAD[i][0]} if i in BAD else record for i, record in enumerate(RECORDS)]
MASK = dict(bad_sample='mask')


def masked_row(row: RowShape, **fields) -> dict[str, np.ndarray]:
  """Written down apart: nothing but padding."""
  by_token = {name: np.zeros(row.length, np.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  fuse = np.full((row.visuals, row.fused_text), row.length, np.int32)
  return {
    **by_token,
    'loss_mask': np.zeros(row.length, bool),
    'pixels': np.zeros((row.visuals, 1, 16, 16, 3), np.uint8),
    'fuse_index': fuse,
    'fuse_mask': fuse < row.length,
    'slot_index': np.full((row.visuals, 1), row.length, np.int32),
    'bad_samples': np.int32(1),
    **fields,
  }


def rows_of(batches) -> list[dict[str, np.ndarray]]:
  return [{name: array[i] for name, array in batch.items()} for batch in batches for i in range(len(batch['tokens']))]


def test_good_samples_are_what_they_are():
  masked, plain = (rows_of(take(iterate(num_epochs=2, **RANDOM, **policy))) for policy in (MASK, {}))
  assert_equal(masked, [row | {'bad_samples': np.int32(0)} for row in plain])


@pytest.mark.parametrize('side_by_side', [False, True])
def test_a_bad_sample_keeps_its_place(side_by_side):
  """In shuffled epochs, with augmentation: every other row is that of the stream without bad samples, to the bit."""
  row = RowShape.for_model(MODEL, length=256, visuals=2)
  options = dict(num_epochs=2, side_by_side=side_by_side, row=row, **RANDOM)
  good = rows_of(take(iterate(**options, **MASK)))
  found = rows_of(take(iterate(MIXED, **options, **MASK)))
  branches = {'branch_ids': np.zeros(256, np.int32)} if side_by_side else {}
  assert sum(row['bad_samples'] for row in found) in (5, 6)  # three an epoch; one may be in the batch that is dropped
  masked = masked_row(row, **branches)
  assert_equal(found, [masked if one['bad_samples'] else other for one, other in zip(found, good, strict=True)])


def test_resume_from_every_state():
  options = dict(num_epochs=2, **RANDOM, **MASK)
  whole = iterate(MIXED, **options)
  states, batches = [], []
  for batch in whole:
    batches.append(batch)
    states.append(whole.get_state())
  for n, state in enumerate(states, start=1):
    halves = [iterate(MIXED, shard_index=i, shard_count=2, **options) for i in range(2)]
    for half in halves:
      half.set_state(state)
    assert_equal(interleave(*map(take, halves)), batches[n:])


def test_workers_count_and_log_the_same(capfd, caplog):
  expected = take(iterate(MIXED, shuffle=False, **MASK), 4)
  told = caplog.text
  iterator = iterate(MIXED, shuffle=False, worker_count=2, **MASK)
  found = take(iterator, 4)
  iterator.close()
  assert_equal(found, expected)
  for text in (told, capfd.readouterr().err):
    for index, (_, code) in BAD.items():
      assert re.search(rf"masked: {code}: sample '{index}': .", text), text


def test_the_place_of_a_masked_sample_is_logged(tmp_path, caplog):
  write(tmp_path / 'd', {'train': MIXED}, description='for tests')
  take(iterate(open_split(tmp_path / 'd', 'train'), shuffle=False, **MASK), 1)
  place = f'{tmp_path}/d: record 2 of split train'
  assert f"masked: E_IMG_FORMAT: {place}: sample '2': image 0: expected JPEG, PNG" in caplog.text


@pytest.mark.parametrize('bad', [(2,), (9,), (2, 9, 12)])
def test_only_the_segment_of_a_bad_sample_is_lost(bad):
  """Of a packed row: the samples beside it are what they are without it."""
  source = [MIXED[i] if i in bad else record for i, record in enumerate(RECORDS)]
  sizes = record_sizes(source, SIZE_OF, **MASK)
  sizes[(sizes > (WIDE.length, WIDE.visuals)).any(axis=1)] = 0
  order = Packed(source, sizes, WIDE, seed=3)
  groups = Epochs(order, 1)
  batches = take(iterate(source, row=WIDE, order=order, batch_size=1, num_epochs=1, **MASK))
  alone = rows_of(take(iterate(shuffle=False, num_epochs=1, batch_size=1)))
  assert len(batches) == len(groups)
  for group, found in zip(map(groups.__getitem__, range(len(groups))), rows_of(batches), strict=True):
    assert found.pop('bad_samples') == len(set(group) & set(bad))
    assert found['segment_ids'].max() == len(set(group) - set(bad))
    if rest := [alone[i] for i in group if i not in bad]:
      assert_equal([found], [pack_rows(rest, WIDE)])


def test_batches_of_several_shapes_hold_padding_too():
  sizes = np.where(np.isin(np.arange(len(RECORDS)), [9, 12])[:, None], 0, SIZES)
  order = Grouped(MIXED, sizes, 3, ROW, seed=0, lengths=(48, 96), text_visuals=1)
  batches = take(iterate(MIXED, order=order, batch_size=3, num_epochs=1, **MASK))
  assert sum(batch['bad_samples'].sum() for batch in batches) == 3
  for batch in batches:
    masked = batch['bad_samples'] == 1
    assert not batch['loss_mask'][masked].any() and not batch['segment_ids'][masked].any()
    assert not batch['fuse_mask'][masked].any() and batch['loss_mask'][~masked].any(axis=1).all()


def test_what_cannot_be_measured_needs_no_room(tmp_path):
  """And what is kept of it serves a run that raises no more than the other way round."""
  expected = record_sizes([*RECORDS[:9], RECORDS[0], *MIXED[10:]], SIZE_OF)
  expected[9] = 0
  write(tmp_path / 'd', {'train': MIXED}, description='for tests')
  source, file = open_split(tmp_path / 'd', 'train'), tmp_path / SIZES_NAME
  np.testing.assert_array_equal(kept_sizes(file, source, SIZE_OF, **MASK), expected)
  np.testing.assert_array_equal(kept_sizes(file, source, SIZE_OF, **MASK), expected)
  with pytest.raises(DataError, match=r"^E_IMAGE_TAGS: .*/d: record 9 of split train: sample '9': "):
    kept_sizes(file, source, SIZE_OF)


def test_a_damaged_file_of_records_is_masked_by_the_chunk(tmp_path):
  """array_record notices; the place of every record that went with it is kept."""
  write(tmp_path / 'd', {'train': RECORDS}, description='for tests', shard_size=7)
  (file, *_) = sorted((tmp_path / 'd').glob('*array_record*'))
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  source = open_split(tmp_path / 'd', 'train')
  with pytest.raises(DataError, match=f'^E_DATASET_CORRUPT: {re.escape(str(file))}: record 0 of split train: '):
    take(iterate(source, shuffle=False, num_epochs=1, batch_size=1))
  found = rows_of(take(iterate(source, shuffle=False, num_epochs=1, batch_size=1, **MASK)))
  good = rows_of(take(iterate(shuffle=False, num_epochs=1, batch_size=1, **MASK)))
  assert [int(row['bad_samples']) for row in found] == [1] * 7 + [0] * 14
  assert_equal(found, [masked_row(ROW)] * 7 + good[7:])


def test_errors_that_are_not_of_a_sample_are_raised():
  with pytest.raises(IndexError):
    take(iterate(_Short(RECORDS), shuffle=False, batch_size=1, num_epochs=1, **MASK))


@dataclasses.dataclass
class _Short:
  """A source that has a bug."""

  records: list

  def __len__(self):
    return len(self.records) + 1

  def __getitem__(self, index):
    return self.records[index]

"""Batches on the devices: those of the iterator, a few ahead, with the state of what was handed out."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from test_pipeline import RANDOM, RECORDS, assert_equal, iterate, take

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.pipeline import device_batches
from llava_mini_jax.sharding import batch_sharding, make_mesh
from llava_mini_jax.types import Batch


@pytest.fixture
def sharding():
  return batch_sharding(make_mesh())


def to_numpy(batch: Batch) -> dict[str, np.ndarray]:
  fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
  return {name: np.asarray(value) for name, value in fields.items() if value is not None}


def test_device_batches_are_the_batches(sharding):
  expected = take(iterate(batch_size=8, num_epochs=2, **RANDOM))
  batches = list(device_batches(iterate(batch_size=8, num_epochs=2, **RANDOM), sharding))
  assert_equal([to_numpy(batch) for batch in batches], expected)
  assert isinstance(batches[0].tokens, jax.Array)
  assert batches[0].pixels.sharding.is_equivalent_to(sharding, 6)


@pytest.mark.parametrize('ahead', [0, 2, 50])
def test_the_state_is_that_of_the_batch_handed_out(sharding, ahead):
  expected = take(iterate(batch_size=8, num_epochs=2, **RANDOM))
  batches = device_batches(iterate(batch_size=8, num_epochs=2, **RANDOM), sharding, ahead=ahead)
  assert batches.get_state() == {'global_next_index': 0}
  for n, _ in enumerate(batches, start=1):
    assert batches.get_state() == {'global_next_index': 8 * n}
    resumed = device_batches(iterate(batch_size=8, num_epochs=2, **RANDOM), sharding, ahead=ahead)
    next(resumed)
    resumed.set_state(batches.get_state())
    assert_equal([to_numpy(batch) for batch in resumed], expected[n:])
  assert n == len(expected)


def test_an_error_ahead_waits_for_its_turn(sharding):
  bad = [*RECORDS[:20], {**RECORDS[19], 'id': '20', 'media': [b'no image']}]
  batches = device_batches(iterate(bad, batch_size=8, shuffle=False), sharding, ahead=9)
  next(batches), next(batches)
  for _ in range(2):
    with pytest.raises(DataError, match="^E_IMG_FORMAT: sample '20': image 0: "):
      next(batches)
  assert batches.get_state() == {'global_next_index': 16}


def test_closed_batches(sharding):
  batches = device_batches(iterate(batch_size=8), sharding)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(RuntimeError, match='^the batches were closed$'):
    next(batches)

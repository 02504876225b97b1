"""Fingerprints tell every array from every other; records tell when something was changed; what stays on disk."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.errors import DamagedError
from llava_mini_jax.train.fingerprint import fingerprint_on_host, fingerprints
from llava_mini_jax.train.record import Record, record_of
from llava_mini_jax.train.retention import preserved

DTYPES = ('bool', 'int4', 'uint4', 'int8', 'uint16', 'bfloat16', 'float16', 'float8_e4m3fn', 'int32', 'float32')


def of(array) -> str:
  return fingerprints({'it': array})['it']


@pytest.mark.parametrize('dtype', [*DTYPES, 'complex64'])
def test_one_element_or_its_place(dtype):
  array = jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 7)), dtype)
  seen = {of(array)}
  for at in itertools.product(range(5), range(7)):
    changed = array.at[at].set(jnp.logical_not(array[at]).astype(dtype))
    seen |= {of(changed)}
  assert len(seen) == 36
  assert of(array[:, ::-1]) not in seen and of(array.T) not in seen
  assert fingerprint_on_host(np.asarray(array)) == of(array)


def test_64_bits():
  with jax.enable_x64(True):
    values = np.array([1, 2**40 + 1, -1], np.int64)
    low = values.copy()
    low[1] ^= 1
    high = values.copy()
    high[1] ^= 1 << 50
    assert len({of(jnp.asarray(x)) for x in (values, low, high)}) == 3
    assert fingerprint_on_host(values) == of(jnp.asarray(values))
    assert of(jnp.asarray(values)) != of(jnp.asarray(values).astype(jnp.int32))


def test_every_single_bit():
  array = np.random.default_rng(1).normal(size=9).astype(np.float32)
  seen = set()
  for bit in range(9 * 32):
    words = array.view(np.uint32).copy()
    words[bit // 32] ^= np.uint32(1 << bit % 32)
    seen.add(of(words.view(np.float32)))
  assert len(seen) == 9 * 32 and of(array) not in seen


def test_the_mesh_does_not_matter():
  array = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
  expected = fingerprint_on_host(array)
  mesh = make_mesh((2, 2, 2))
  for spec in [(), ('data',), ('fsdp', 'tensor'), (None, ('data', 'fsdp')), (('data', 'fsdp', 'tensor'),)]:
    assert of(jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))) == expected
  assert of(jnp.float32(3)) == fingerprint_on_host(np.float32(3))


def test_a_record_of_another_step_or_with_another_word_in_it():
  meta = dict(data={'global_next_index': 3}, text='naïve', nothing=None, list=[1, 2.5])
  record = record_of({'params': {'a': jnp.arange(3.0)}, 'step': jnp.int32(1)}, meta)
  stored = json.loads(json.dumps(record.stored(7)))
  assert Record.parse(stored, 7) == record
  assert set(record.leaves) == {'params/a', 'step'}
  for step, at in ((8, None), (7, 'data'), (7, 'text'), (7, 'nothing')):
    changed = dict(stored) if at is None else dict(stored) | {at: 'x'}
    with pytest.raises(DamagedError, match='^its metadata are not those that step'):
      Record.parse(changed, step)
  with pytest.raises(DamagedError, match='^it says nothing of its leaves'):
    Record.parse(meta, 7)
  with pytest.raises(DamagedError, match='^other bits than were saved in params/a$'):
    record.compare({'params/a': jnp.arange(3.0).at[1].set(-1), 'step': jnp.int32(1)})
  record.compare({'step': jnp.int32(1)})


@pytest.mark.parametrize('keep', [1, 2, 4])
def test_what_stays(keep):
  """Of seven checkpoints, whichever of them are verified."""
  steps = [2, 3, 5, 8, 9, 11, 20]
  for verified in itertools.chain.from_iterable(itertools.combinations(steps, n) for n in range(8)):
    kept = {step for step, stays in zip(steps, preserved(steps, keep, verified), strict=True) if stays}
    assert kept >= set(steps[-keep:])
    assert len(kept & set(verified)) >= min(2, len(verified))
    assert kept == set(steps[-len(kept) :]), 'one is missing between'
    assert len(kept) == max(keep, len(steps[steps.index(verified[-2]) :]) if len(verified) > 1 else 7)
  assert preserved(steps, keep, None) == [False] * (7 - keep) + [True] * keep
  assert preserved(steps, None, ()) == [True] * 7

"""What was saved comes back to the last bit, on any mesh; what does not fit is named, all of it at once."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from damage import largest
from jax.sharding import NamedSharding, PartitionSpec

from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.errors import CheckpointError
from llava_mini_jax.train.stored import StoredCheckpoints
from llava_mini_jax.train.tree import flatten, unflatten

# data × fsdp × tensor; the last one covers one device of the eight
MESHES = {'fsdp': (1, 8, 1), 'data': (8, 1, 1), 'all': (2, 2, 2), 'one': (1, 1, 1)}
SPECS = {'matrix': ('fsdp', 'tensor'), 'rows': (('data', 'fsdp'), 'tensor')}  # other leaves are replicated


def mesh_of(name: str) -> jax.sharding.Mesh:
  shape = MESHES[name]
  return make_mesh(shape, devices=jax.devices()[: int(np.prod(shape))])


def values() -> dict:
  """Every dtype of a training state, with the bit patterns that a careless conversion changes."""
  rng = np.random.default_rng(0)
  odd = np.array([0.0, -0.0, np.inf, -np.inf, 1e-42, -1e-45, np.pi, 3.4e38], np.float32)
  nan = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)
  return {
    'step': np.int32(-7),
    'params': {
      'decoder': {'layers': {'matrix': rng.normal(size=(16, 24)).astype(np.float32)}, 'odd': odd},
      'half': {'rows': rng.normal(size=(8, 4, 2)).astype(ml_dtypes.bfloat16)},
    },
    'frozen': {'nan': nan, 'all_half': np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)},
    'opt': {
      'count': np.int32(2**31 - 1),
      'key': np.array([2**32 - 1, 1], np.uint32),
      'small': np.arange(-128, 128).astype(np.int8),
      'flags': np.array([True, False]),
    },
  }


def put(tree, mesh: jax.sharding.Mesh):
  return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(leaf, sharding(path, mesh)), tree)


def sharding(path, mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(*SPECS.get(path[-1].key, ())))


def abstract(tree):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same_bits(found, expected):
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
  assert [path for path, _ in jax.tree_util.tree_leaves_with_path(found)] == paths
  for path, a, b in zip(paths, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    name = jax.tree_util.keystr(path)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert a.tobytes() == b.tobytes(), f'{name}: the bytes differ'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Written by a mesh of 8 × 1 × 1."""
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(3, put(values(), mesh_of('data')), {'data': {'global_next_index': 24}})
  return directory


@pytest.mark.parametrize('name', MESHES)
def test_comes_back_bit_for_bit_on_any_mesh(saved, name):
  wanted = abstract(put(values(), mesh_of(name)))
  with Checkpoints(saved) as checkpoints:
    state, meta = checkpoints.restore(wanted)
  assert_same_bits(state, values())
  assert meta == {'data': {'global_next_index': 24}}
  for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
    assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)


def test_what_another_mesh_wrote_comes_back_on_the_first(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, put(values(), mesh_of('all')), dict(data=0))
    checkpoints.wait()
    state, _ = checkpoints.restore(abstract(put(values(), mesh_of('data'))))
  assert_same_bits(state, values())


def test_optimizer_tuples(tmp_path):
  """Named tuples, tuples with empty states in them, and dicts, as optax nests them."""
  params = {'a': jnp.arange(6.0).reshape(2, 3), 'b': {'c': jnp.ones(4)}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
  _, opt = tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)
  state = {'params': params, 'opt': opt}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, dict(data=0))
    checkpoints.wait()
    found, _ = checkpoints.restore(abstract(state))
  assert jax.tree.structure(found) == jax.tree.structure(state)
  assert_same_bits(found, state)


def test_saving_while_the_next_steps_overwrite_the_buffers(tmp_path):
  """The state is donated as soon as `save` returns; what is on disk is what it was then."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else jnp.sin(3 * x) + x, state)

  rng = np.random.default_rng(0)
  start = {'params': {'matrix': rng.normal(size=(512, 512)).astype(np.float32), 'odd': rng.normal(size=7)}}
  state = put(jax.tree.map(np.float32, start) | {'step': np.int32(0)}, mesh_of('all'))
  expected = {}
  with Checkpoints(tmp_path) as checkpoints:
    for n in range(1, 6):
      before = state
      state = step(state)
      assert before['params']['matrix'].is_deleted()
      expected[n] = jax.tree.map(np.array, state)
      checkpoints.save(n, state, {'n': n})
      for _ in range(3):
        state = step(state)
    checkpoints.wait()
    for n, values in expected.items():
      found, meta = checkpoints.restore(abstract(state), n)
      assert meta == {'n': n}
      assert_same_bits(found, values)
  assert len({values['params']['matrix'].tobytes() for values in expected.values()}) == 5


def test_everything_that_does_not_fit_is_listed_at_once(saved):
  wanted = abstract(put(values(), mesh_of('data')))
  params, opt = wanted['params'], wanted['opt']
  params['decoder']['layers']['matrix'] = jax.ShapeDtypeStruct((24, 16), jnp.float32)
  params['decoder']['extra'] = jax.ShapeDtypeStruct((1,), jnp.float32)
  params['half']['rows'] = jax.ShapeDtypeStruct((8, 4, 2), jnp.float32)
  opt['count'] = jax.ShapeDtypeStruct((1,), jnp.uint32)
  del opt['key'], wanted['frozen']
  with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.restore(wanted)
  assert str(error.value).splitlines() == [
    f'{saved}/3 does not fit this run:',
    '  params/decoder/extra: missing',
    '  frozen/all_half: unexpected',
    '  frozen/nan: unexpected',
    '  opt/key: unexpected',
    '  opt/count: expected uint32[1], found int32[]',
    '  params/decoder/layers/matrix: expected float32[24, 16], found float32[16, 24]',
    '  params/half/rows: expected float32[8, 4, 2], found bfloat16[8, 4, 2]',
  ]


@pytest.mark.parametrize(('wanted', 'kept'), [(None, []), (4, []), (4, [2, 3])])
def test_no_such_checkpoint(tmp_path, wanted, kept):
  with Checkpoints(tmp_path) as checkpoints:
    for step in kept:
      checkpoints.save(step, {'a': jnp.ones(1)}, {})
    checkpoints.wait()
    named = '' if wanted is None else ' of step 4'
    there = '[2, 3]' if kept else 'none'
    for ask in (
      lambda: checkpoints.restore({}, wanted),
      lambda: checkpoints.restore_parameters({}, wanted),
      lambda: checkpoints.meta(wanted),
    ):
      with pytest.raises(CheckpointError) as error:
        ask()
      assert str(error.value) == f'no checkpoint{named} in {tmp_path} (steps there: {there})'


def parameter_shardings(mesh: jax.sharding.Mesh) -> dict:
  return {
    'decoder': {'layers': {'matrix': NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))}, 'odd': one(mesh)},
    'half': {'rows': one(mesh)},
    'nan': one(mesh),
    'all_half': one(mesh),
  }


def one(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize('name', ['all', 'one'])
def test_the_parameters_alone(saved, name):
  """Trained and frozen ones together, without the optimizer, sharded as asked for."""
  shardings = parameter_shardings(mesh_of(name))
  with Checkpoints(saved) as checkpoints:
    found = checkpoints.restore_parameters(flatten(shardings))
    stored = checkpoints.stored_parameters()
  original = values()
  assert {path: (leaf.shape, leaf.dtype) for path, leaf in stored.items()} == {
    path: (leaf.shape, leaf.dtype) for path, leaf in flatten(original['params'] | original['frozen']).items()
  }
  found = unflatten(found)
  assert_same_bits(found, original['params'] | original['frozen'])
  matrix = found['decoder']['layers']['matrix']
  assert matrix.sharding.is_equivalent_to(shardings['decoder']['layers']['matrix'], 2)


def test_some_parameters_alone(saved):
  wanted, original = ['half/rows', 'nan'], values()
  with Checkpoints(saved) as checkpoints:
    found = checkpoints.restore_parameters(dict.fromkeys(wanted, one(mesh_of('one'))))
    assert checkpoints.restore_parameters({}) == {}
  assert_same_bits(found, {'half/rows': original['params']['half']['rows'], 'nan': original['frozen']['nan']})


def test_a_parameter_that_is_not_there(saved):
  with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.restore_parameters(dict.fromkeys(['decoder/new', 'nan'], one(mesh_of('one'))))
  assert str(error.value) == f"{saved}/3: missing ['decoder/new']"


def test_meta_round_trip(tmp_path):
  meta = {
    'none': None,
    'bools': [True, False],
    'nested': {'list': [1, [2.5, [None, 'three']], {}], 'empty': [], 'text': 'naïve \n "quoted"'},
    'big': 2**53,
    'float': 0.1 + 0.2,
    'tiny': 5e-324,
  }
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'a': jnp.ones(1)}, meta)
    checkpoints.save(2, {'a': jnp.ones(1)}, dict(data=2))
  with Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.meta(1)
    assert found == meta
    assert [type(item) for item in found['bools']] == [bool, bool]
    assert checkpoints.meta() == dict(data=2)


def kept(directory) -> list[int]:
  return sorted(int(path.name) for path in directory.iterdir())


@pytest.mark.parametrize('verify', [True, False])
def test_the_newest_are_kept(tmp_path, verify):
  with Checkpoints(tmp_path, keep=2, verify=verify) as checkpoints:
    assert checkpoints.latest_step is None
    for step in (1, 2, 5):
      checkpoints.save(step, {'a': jnp.full(1, step)}, {'step': step})
    checkpoints.wait()
    assert kept(tmp_path) == ([1, 2, 5] if verify else [2, 5])  # 1 and 2 were the verified ones when 5 was begun
    checkpoints.save_last(9, {'a': jnp.full(1, 9)}, {'step': 9})
    assert kept(tmp_path) == [5, 9]
    assert checkpoints.latest_step == 9
  with Checkpoints(tmp_path, keep=3, verify=verify) as checkpoints:  # a resumed run counts those of the run before
    state, meta = checkpoints.restore(abstract({'a': jnp.ones(1, jnp.int32)}), 9)
    for step in (10, 11):
      checkpoints.save(step, {'a': jnp.full(1, step)}, {'step': step})
    checkpoints.wait()
    assert kept(tmp_path) == [9, 10, 11]
  assert (int(state['a'][0]), meta) == (9, {'step': 9})


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_never_fewer_than_two_verified(tmp_path, keep):
  """Whatever happens to the saves between: those that are damaged on their way to disk do not push out whole ones."""
  bad, order = {4, 5, 6, 9}, []
  with Damaging(tmp_path, bad, keep=keep, failed_saves=9) as checkpoints:
    for step in range(1, 12):
      checkpoints.save(step, random_state(step), {'step': step})
      checkpoints.wait()
      order.append({int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} - bad)
    assert all(len(steps) >= min(2, n) for n, steps in enumerate(order, 1)), order
    assert {path.name for path in tmp_path.iterdir() if not path.name.isdigit()} == {f'damaged-{n}' for n in bad}
    assert len(order[-1]) <= max(keep, 2) + 1
    assert [note.split(': ')[0] for note in checkpoints.notes] == [
      f'{tmp_path}/{step} was not saved ({count} of 9 in a row)' for step, count in ((4, 1), (5, 2), (6, 3), (9, 1))
    ]
    assert all(
      'is damaged: ' in note and note.endswith(f'aside: damaged-{n}')
      for note, n in zip(checkpoints.notes, (4, 5, 6, 9), strict=True)
    )


def random_state(seed: int) -> dict:
  return {'a': jnp.asarray(np.random.default_rng(seed).normal(size=1000).astype(np.float32))}


class Damaging(Checkpoints):
  """A bit of these steps flips between the writing and the reading."""

  def __init__(self, directory, steps, **options):
    super().__init__(directory, **options)
    self._flipped = steps

  def _read_back(self, save):
    if save.step in self._flipped:
      path = largest(self.directory / str(save.step) / 'state' / 'ocdbt.process_0')
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 4
      path.write_bytes(data)
    super()._read_back(save)


def test_too_many_saves_that_fail(tmp_path):
  with Damaging(tmp_path, {1, 3, 4}, keep=1, failed_saves=2) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, random_state(step), {})
    with pytest.raises(CheckpointError, match=f'^{tmp_path}: 2 saves in a row failed, the last one of step 4: '):
      checkpoints.wait()


def unfinished(directory):
  """What a save in progress looks like, or one that a kill cut short."""
  with Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(1, {'a': jnp.ones(1)}, {})
  shutil.copytree(directory / '1', directory / '2.orbax-checkpoint-tmp')
  return directory / '2.orbax-checkpoint-tmp'


def test_an_unfinished_save_is_no_checkpoint_and_the_run_clears_it_away(tmp_path):
  partial = unfinished(tmp_path)
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.latest_step == 1
    checkpoints.save(3, {'a': jnp.ones(1)}, {})
  assert not partial.exists()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '3']


def test_reading_leaves_a_save_in_progress_alone(tmp_path):
  """Whoever evaluates a run that is still training must not delete what it is writing."""
  partial = unfinished(tmp_path)
  before = sorted(path.name for path in partial.rglob('*'))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step == 1
  assert partial.exists() and sorted(path.name for path in partial.rglob('*')) == before


@pytest.mark.parametrize('file', ['_CHECKPOINT_METADATA', 'state/ocdbt.process_0/d/*'])
@pytest.mark.parametrize('damage', ['missing', 'cut short'])
def test_a_damaged_checkpoint_is_named(saved, tmp_path, file, damage):
  """Not a traceback of Orbax's, and above all not a run that starts with half of its state."""
  directory = shutil.copytree(saved, tmp_path / 'checkpoints')
  (path,) = (directory / '3').glob(file)
  if damage == 'missing':
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.restore(abstract(put(values(), mesh_of('one'))))
  assert str(error.value).startswith(f'{directory}/3 is damaged')


def test_a_checksum_says_whether_weights_are_the_same(saved, tmp_path):
  """Whatever mesh wrote them; a run that went on, or was trained anew, has another."""

  def checksum(tree, step: int) -> str:
    directory = tmp_path / str(len(list(tmp_path.iterdir())))
    with Checkpoints(directory) as checkpoints:
      checkpoints.save(step, put(tree, mesh_of('all')), {'data': {'global_next_index': 24}})
    return StoredCheckpoints(directory).checksum()

  other = values()
  other['params']['half']['rows'][3, 1, 0] += 1
  assert StoredCheckpoints(saved).checksum(3) == checksum(values(), 3)
  assert len({checksum(values(), 3), checksum(values(), 4), checksum(other, 3)}) == 3

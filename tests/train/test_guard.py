"""A step with numbers that are not finite, a spike, or nothing to learn leaves no trace but its count."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config

from llava_mini_jax.config import ConfigError
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.sharding import batch_sharding, make_mesh, use_mesh
from llava_mini_jax.train import step as step_module
from llava_mini_jax.train.accumulation import gradients
from llava_mini_jax.train.errors import TrainingError
from llava_mini_jax.train.guard import Guard, Skips
from llava_mini_jax.train.lora import Lora
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import flatten
from llava_mini_jax.types import Batch

CONFIG = small_config(vision=dict(num_hidden_layers=2), prefusion=dict(num_layers=1), decoder=dict(num_hidden_layers=1))
ROWS = 8
LORA = Lora(2, 4.0, ('decoder/layers/mlp/.*',))
GROUPS = (('vision/.*', 'frozen'), ('.*', 1e-2))
ADAPTERS = (('lora/.*', 1e-2), ('vision/.*|decoder/.*', 'frozen'), ('.*', 1e-3))
SPIKES = Guard(6.0, 8)
KIND = 'one device, adapters'
KINDS = {
  KIND: dict(shape=(1, 1, 1), groups=ADAPTERS, lora=LORA),
  'eight, bfloat16, micro-steps': dict(shape=(2, 2, 2), groups=GROUPS, param_dtype='bfloat16', accumulate=2),
}
# What the program under test is given in place of what it would compute, by a number in the batch.
FAULTS = dict(
  nan_loss=dict(loss=jnp.nan),
  inf_loss=dict(loss=-jnp.inf),
  nan_gradients=dict(all=jnp.nan),
  inf_in_one_element=dict(one=jnp.inf),
  nan_in_one_element=dict(one=jnp.nan),
  spike=dict(scale=100.0),
)
CODES = {name: code for code, name in enumerate(FAULTS, 1)}


def faulty(loss_fn, params, frozen, batch, *rest):
  """`accumulation.gradients`, and then the fault that the batch asks for."""
  code = batch.bad_samples[0]
  (loss, metrics), grads = gradients(loss_fn, params, frozen, dataclasses.replace(batch, bad_samples=None), *rest)
  for name, fault in FAULTS.items():
    here, scale = code == CODES[name], fault.get('scale', 1.0)
    loss = jnp.where(here, fault.get('loss', loss * scale), loss)
    grads = jax.tree.map(lambda g: jnp.where(here, fault.get('all', g * scale), g).astype(g.dtype), grads)  # noqa: B023
    if 'one' in fault:
      leaves, treedef = jax.tree.flatten(grads)
      first = (0,) * leaves[1].ndim
      leaves[1] = leaves[1].at[first].set(jnp.where(here, fault['one'], leaves[1][first]))
      grads = jax.tree.unflatten(treedef, leaves)
  return (loss, metrics), grads


@functools.cache
def batch(number: int, fault: str = '') -> Batch:
  """Eight rows; `fault` is one of FAULTS, or nan_pixels or inf_pixels in one row, or no_targets."""
  samples = [random_sample(CONFIG, ROWS * number + row) for row in range(ROWS)]
  made = lay_out(CONFIG, samples, length=16, visuals=1, fused_text=8)
  if fault.endswith('_pixels'):
    made.pixels[3, 0, 0, 5, 7, 1] = float(fault.removesuffix('_pixels'))
  if fault == 'no_targets':
    made = dataclasses.replace(made, loss_mask=np.zeros_like(made.loss_mask))
  return dataclasses.replace(made, bad_samples=np.full(ROWS, CODES.get(fault, 0), np.int32))


class Run:
  """A trainer with faults built in, and states that outlive the steps that are taken from them."""

  def __init__(self, shape, guard: Guard = SPIKES, **options):
    self.mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    factor = optax.cosine_decay_schedule(1.0, 40)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(step_module, 'gradients', faulty)
      self.trainer = make_trainer(CONFIG, self.mesh, factor=factor, guard=guard, weight_decay=0.1, **options)
      with use_mesh(self.mesh):
        example = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch(0)))
        where = batch_sharding(self.mesh)
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), example)
        lowered = self.trainer.step.lower(self.trainer.abstract, example)
    self.compiled = lowered.compile(dict(xla_backend_optimization_level=0))

  @functools.cached_property
  def start(self) -> dict:
    """Random parameters on the host, and an optimizer that has seen nothing."""
    flat = random_params(CONFIG)

    def value(path, leaf):
      keys = [key.key for key in path if hasattr(key, 'key')]
      name = '/'.join(keys[1:])
      drawn = np.random.default_rng(len(name)).normal(0, 0.1, leaf.shape)
      return (flat.get(name, drawn) if keys[0] in ('params', 'frozen') else np.zeros(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, self.trainer.abstract)

  def take(self, state: dict, *batches: Batch) -> tuple[dict, list[dict[str, float]]]:
    """Steps from a state on the host -> the state after them, on the host, and the metrics of each."""
    found = []
    with use_mesh(self.mesh):
      state = jax.device_put(state, self.trainer.shardings)
      for rows in batches:
        state, metrics = self.compiled(state, jax.device_put(rows, batch_sharding(self.mesh)))
        found.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), found


@functools.cache
def of_kind(name: str) -> Run:
  return Run(**KINDS[name])


@pytest.fixture(scope='module', params=KINDS)
def run(request) -> Run:
  return of_kind(request.param)


@pytest.fixture(scope='module')
def trained(run):
  """After six steps, more than the spike rule needs."""
  state, metrics = run.take(run.start, *map(batch, range(6)))
  assert [row['skipped'] for row in metrics] == [0] * 6
  return state


def assert_same_bits(found, expected):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def learnt(state: dict) -> dict:
  return {name: state[name] for name in ('params', 'frozen', 'opt')}


@pytest.mark.parametrize(
  'fault', [*(name for name in FAULTS if name != 'spike'), 'nan_pixels', 'inf_pixels', 'no_targets']
)
def test_a_step_that_is_skipped_changes_nothing(run, trained, fault):
  """Neither after six steps nor as the very first one: parameters and optimizer bit for bit, whatever the fault."""
  for state in (run.start, trained):
    after, (metrics,) = run.take(state, batch(6, fault))
    assert metrics['skipped'] == 1
    assert_same_bits(learnt(after), learnt(state))
    assert after['step'] == state['step'] + 1
    expected = {**state['guard'], 'skipped': np.int32(1), 'consecutive': np.int32(1)}
    assert_same_bits(after['guard'], expected)


def test_a_step_that_counts_changes_what_trains(run, trained):
  """That the tests above could fail."""
  after, (metrics,) = run.take(trained, batch(6))
  assert metrics['skipped'] == 0 and after['guard']['accepted'] == 7
  for path, leaf in flatten(after['params']).items():
    assert (leaf != flatten(trained['params'])[path]).any(), path


def test_it_is_as_if_the_batch_had_never_been(run, trained):
  """Every number of every step before and after, and the state at the end, for faults in a row and apart."""
  good = [batch(number) for number in range(6, 10)]
  bad = [batch(20, 'nan_loss'), batch(21, 'inf_in_one_element'), batch(22, 'no_targets')]
  expected, without = run.take(trained, *good)
  after, rows = run.take(trained, good[0], bad[0], bad[1], good[1], good[2], bad[2], good[3])
  assert [row['skipped'] for row in rows] == [0, 1, 1, 0, 0, 1, 0]
  assert list(map(repr, (row for row in rows if not row['skipped']))) == list(map(repr, without))
  assert_same_bits(learnt(after), learnt(expected))
  assert after['guard']['skipped'] == 3 and after['guard']['consecutive'] == 0
  assert_same_bits(
    {name: after['guard'][name] for name in ('accepted', 'losses', 'grad_norms')},
    {name: expected['guard'][name] for name in ('accepted', 'losses', 'grad_norms')},
  )


def test_a_spike_is_skipped_once(run, trained):
  """A hundredfold loss and gradient, after a NaN that must not make the window blind; the next step counts."""
  after, rows = run.take(trained, batch(20, 'nan_loss'), batch(6, 'spike'), batch(6))
  assert [row['skipped'] for row in rows] == [1, 1, 0]
  assert rows[1]['loss'] == pytest.approx(100 * rows[2]['loss'], rel=1e-6)
  assert_same_bits(learnt(after), learnt(run.take(trained, batch(6))[0]))


def test_no_spike_before_the_window_is_half_full(run):
  state, rows = run.take(run.start, *map(batch, range(3)), batch(3, 'spike'))
  assert [row['skipped'] for row in rows] == [0] * 4
  assert state['guard']['accepted'] == 4


def test_nothing_to_learn(run, trained):
  """No gradient either: only what the guard does keeps weight decay and momentum away from the parameters."""
  _, (metrics,) = run.take(trained, batch(6, 'no_targets'))
  assert (metrics['loss'], metrics['grad_norm'], metrics['target_tokens']) == (0, 0, 0)


def test_the_rule_against_numpy():
  """The window goes round; a value counts as a spike above mean + 6 sample deviations of what it holds."""
  guard, rng = Guard(6.0, 8), np.random.default_rng(0)
  judge = quick_jit(guard.judge)
  state, kept, found = guard.initial(), [], []
  for step in range(60):
    loss, norm = rng.normal(5, 0.1, 2).astype(np.float32)
    if step % 7 == 6:
      loss, norm = [(np.float32('nan'), norm), (loss * 2, norm), (loss, norm * 2)][step // 7 % 3]
    ok, state = judge(state, loss, norm, 1.0)
    window = np.array(kept[-8:], np.float64).reshape(-1, 2)
    spike = len(kept) >= 4 and bool(((loss, norm) > window.mean(0) + 6 * window.std(0, ddof=1)).any())
    assert bool(ok) == (np.isfinite(loss) and not spike), step
    found.append(bool(ok))
    kept += [(loss, norm)] if ok else []
  assert 50 <= sum(found) < 60
  assert sorted(np.asarray(state['losses']).tolist()) == sorted(float(loss) for loss, _ in kept[-8:])


def test_without_a_spike_rule_there_is_no_window():
  state = Guard().initial()
  assert set(state) == {'skipped', 'consecutive'}
  ok, state = Guard().judge(state, jnp.float32(1e30), jnp.float32(1.0), jnp.float32(1))
  assert ok and state['skipped'] == 0


def test_the_memory_of_a_step():
  """The old state is not kept beside the new one until the decision is known, in XLA's own count."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_module, 'select', lambda ok, new, old: new)
    before = Run(**KINDS[KIND]).compiled.memory_analysis()
  found, state = of_kind(KIND).compiled.memory_analysis(), before.alias_size_in_bytes
  assert found.alias_size_in_bytes == state > 0
  assert found.temp_size_in_bytes - before.temp_size_in_bytes < 0.5 * state


ROW = dict(loss=2.0, grad_norm=1.0, target_tokens=4.0, skipped=0.0)
NAN, SPIKE, NOTHING = ROW | dict(loss=np.nan, skipped=1.0), ROW | dict(skipped=1.0), dict.fromkeys(ROW, 0.0)


def test_too_many_in_a_row_end_the_run():
  skips = Skips(3)
  for step, row in enumerate([NAN, SPIKE, ROW, NAN, SPIKE], 1):
    skips.count(step, row)
  with pytest.raises(TrainingError) as error:
    skips.count(6, NOTHING | dict(skipped=1.0))
  assert str(error.value).splitlines() == [
    'step 6: 3 step(s) skipped in a row (train.max_skipped=3); parameters are those from before the first:',
    '  step 4: expected finite numbers; found loss nan, grad_norm 1',
    '  step 5: expected no spike (train.spike_sigmas); found loss 2, grad_norm 1',
    '  step 6: expected target tokens; found none (loss 0, grad_norm 0)',
  ]


def test_those_before_a_resume_count():
  with pytest.raises(TrainingError, match=r'^step 9: 3 step\(s\) skipped in a row, 2 of them before it was resumed '):
    Skips(3, before=2).count(9, NAN)
  skips = Skips(3, before=2)
  for step, row in enumerate([ROW, NAN, NAN], 9):
    skips.count(step, row)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(max_skipped=0), 'TrainConfig.max_skipped: expected a positive integer; found 0'),
    (dict(spike_sigmas=-1.0), 'TrainConfig.spike_sigmas: expected 0 or more; found -1.0'),
    (dict(spike_window=1), 'TrainConfig.spike_window: expected 2 or more; found 1'),
  ],
)
def test_settings_that_cannot_be(fields, message):
  with pytest.raises(ConfigError, match=f'^{re.escape(message)}$'):
    TrainConfig(**fields)


def test_windows_that_do_not_match_begin_anew():
  """Counters go on; so does the window if it is one like before."""
  stored = {name: leaf + 1 for name, leaf in Guard(6.0, 8).initial().items()}
  same = Guard(5.0, 8).adopt(stored, Guard(5.0, 8).initial())
  assert_same_bits(same, stored)
  for guard in (Guard(6.0, 16), Guard()):
    found = guard.adopt(stored, guard.initial())
    assert (int(found['skipped']), int(found['consecutive'])) == (1, 1)
    assert all(not leaf.any() for name, leaf in found.items() if name not in ('skipped', 'consecutive'))
  assert_same_bits(Guard(6.0, 8).adopt({}, Guard(6.0, 8).initial()), Guard(6.0, 8).initial())
  assert Guard.stored_with(dict(seed=1)) is None
  assert Guard.stored_with(dict(seed=1, spike_sigmas=6.0, spike_window=8)) == Guard(6.0, 8)

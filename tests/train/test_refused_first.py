"""What is wrong with a config is said before anything is compiled for the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import experiment, make_dataset

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.sharding import MeshError
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.optimizer import schedule

NAN = float('nan')
COMPILED: list[str] = []  # names of events


@functools.cache
def listen() -> None:
  """For the rest of the process: JAX has no public way to stop listening."""
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if 'backend_compile' in event else None
  )


def changed(section: str, **fields) -> Callable[[Path], Experiment]:
  def build(dataset: Path) -> Experiment:
    values = experiment(dataset).to_dict()
    values[section] |= fields
    return Experiment.from_dict(values)

  return build


CASES = {
  "train.batchsize: unknown field; did you mean 'batch_size'?": changed('train', batchsize=8),
  "data.bad_samples: unknown field; did you mean 'bad_sample'?": changed('data', bad_samples='mask'),
  "train.batch_size: expected int; found '8'": changed('train', batch_size='8'),
  'data.bad_sample_share: expected float; found nan': changed('data', bad_sample_share=NAN),
  'batch size 12 is not a multiple of data × fsdp = 8': changed('train', batch_size=12),
  'mesh 3 × 1 × 1 does not cover 8 device(s)': changed('train', mesh=(3, 1, 1)),
  'TrainConfig.warmup_ratio: expected 0 <= value < 1; found 1.5': changed('train', warmup_ratio=1.5),
  'train.warmup_ratio: expected float; found nan': changed('train', warmup_ratio=NAN),
  'train.weight_decay: expected float; found nan': changed('train', weight_decay=NAN),
  "groups: '.*': expected a positive learning rate or 'frozen'; found nan": changed('train', groups=[['.*', NAN]]),
  "groups: '.*': expected a positive learning rate or 'frozen'; found -0.1": changed('train', groups=[['.*', -0.1]]),
  '12 row(s) in 1 epochs do not fill one batch of 16': changed('train', batch_size=16, epochs=1),
}


@pytest.mark.parametrize('message', CASES)
def test_before_anything_is_compiled(tmp_path, tmp_path_factory, message):
  dataset = make_dataset(tmp_path_factory.getbasetemp())
  listen()
  COMPILED.clear()
  with pytest.raises((ConfigError, MeshError)) as error:
    train(CASES[message](dataset), tmp_path / 'run')
  assert str(error.value) == message
  assert COMPILED == []
  assert not (tmp_path / 'run').exists()


def test_a_batch_that_does_not_divide_over_processes(tmp_path_factory):
  config = experiment(make_dataset(tmp_path_factory.getbasetemp()))
  listen()
  COMPILED.clear()
  inputs = load_inputs(config.data, config.model)
  with pytest.raises(ConfigError) as error:
    inputs.iterator(None, batch_size=8, seed=0, shard_index=0, shard_count=3)
  assert str(error.value) == 'batch_size=8 does not divide over shard 0 of 3'
  assert COMPILED == []


@pytest.mark.parametrize('ratio', [0.0, 0.5, 0.999])
def test_warm_up_is_never_longer_than_the_run(ratio):
  """It is a share of the steps, below 1; the last step is always after it."""
  for total in (1, 2, 7, 1000):
    factor = schedule(total, ratio)
    peak = max(range(total), key=lambda step: float(factor(step)))
    assert peak <= total - 1 and float(factor(peak)) == pytest.approx(1.0)


def test_the_listener_hears_a_compilation():
  listen()
  COMPILED.clear()
  jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(5)).block_until_ready()
  assert COMPILED

"""Runs over data some of which is bad: masked samples are counted, exactly, and too many end the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import lay_out, quick_jit, random_params, random_sample, small_config, with_params
from tiny_run import experiment, make_dataset

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import open_split, write
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.bad_samples import BadSamples
from llava_mini_jax.train.checkpoint import Checkpoints
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.metrics import LOG_NAME

STEPS, BATCH, RECORDS = 6, 8, 12


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  """One record of twelve has no image in it."""
  good = make_dataset(tmp_path_factory.getbasetemp())
  split = open_split(good, 'train')
  records = [split[i] for i in range(len(split))]
  records[5] = {**records[5], 'media': [b'no image']}
  directory = tmp_path_factory.mktemp('bad') / 'data'
  write(directory, {'train': records}, description='for tests')
  return directory


def run(dataset: Path, good: Path, share: float) -> Experiment:
  base = experiment(dataset, max_steps=STEPS, batch_size=BATCH, save_every=1, log_every=1)
  data = dataclasses.replace(base.data, tokenizer=str(good / 'tokenizer'), bad_sample='mask', bad_sample_share=share)
  return dataclasses.replace(base, data=data)


def curve(workdir: Path) -> list[tuple[float, ...]]:
  rows = [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]
  return [tuple(row[name] for name in ('step', 'loss', 'grad_norm', 'target_tokens', 'bad_samples')) for row in rows]


def counted(workdir: Path) -> int:
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.meta()['bad_samples']


@pytest.mark.slow
def test_a_run_counts_and_goes_on_counting(dataset, tmp_path, tmp_path_factory):
  """Ended for too many and resumed with another limit, it is the run that was never ended, count and all."""
  good = make_dataset(tmp_path_factory.getbasetemp())
  train(run(dataset, good, 0.5), tmp_path / 'whole')
  expected = curve(tmp_path / 'whole')
  found = [int(row[-1]) for row in expected]
  assert sum(found) == STEPS * BATCH // RECORDS == counted(tmp_path / 'whole')
  assert all(np.isfinite(row).all() for row in expected)
  log = (tmp_path / 'whole' / 'logs' / 'process_0.log').read_text()
  assert f'masked: E_IMG_FORMAT: {dataset}: record 5 of split train: sample ' in log

  second = 1 + next(step for step in range(STEPS) if sum(found[: step + 1]) > 1)
  with pytest.raises(DataError) as error:
    train(run(dataset, good, 1.5 / (STEPS * BATCH)), tmp_path / 'ended')
  assert str(error.value) == (
    f'E_BAD_SAMPLES: step {second}: expected at most 0.03125 of the 48 samples of the run to be bad; '
    'found 2 (data.bad_sample_share; the log names each)'
  )
  assert counted(tmp_path / 'ended') == 1
  train(run(dataset, good, 0.5), tmp_path / 'ended')
  assert curve(tmp_path / 'ended') == expected
  assert counted(tmp_path / 'ended') == sum(found)


def test_a_batch_of_bad_samples_alone():
  """Its loss is 0 and so is every gradient: none is NaN."""
  config = small_config()
  batch = lay_out(config, [random_sample(config, 0)] * 2, length=12, visuals=1)
  fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
  nothing = {name: np.zeros_like(fields[name]) for name in ('tokens', 'targets', 'segment_ids', 'positions', 'pixels')}
  for name in ('fuse_index', 'slot_index'):
    nothing[name] = np.full_like(fields[name], 12)
  batch = dataclasses.replace(
    batch, **nothing, loss_mask=np.zeros((2, 12), bool), fuse_mask=np.zeros_like(batch.fuse_mask)
  )

  def loss(params):
    return next_token_loss(with_params(config, params)(batch), batch.targets, batch.loss_mask)[0]

  value, gradients = quick_jit(jax.value_and_grad(loss))(random_params(config))
  assert value == 0
  assert all(bool(jnp.all(gradient == 0)) for gradient in jax.tree.leaves(gradients))


def test_the_limit():
  """At the share is not beyond it; without a limit of its own, one bad sample of 999 is too many."""
  bad = BadSamples(0.25, 8)
  bad.count(1, {'bad_samples': 2.0})
  bad.count(2, {'loss': 1.0})
  with pytest.raises(DataError, match='^E_BAD_SAMPLES: step 3: .*; found 3 '):
    bad.count(3, {'bad_samples': 1.0})
  BadSamples(0.0, 8).count(1, {'bad_samples': 0.0})
  default = experiment('').data.bad_sample_share
  BadSamples(default, 1000).count(1, {'bad_samples': 1.0})
  with pytest.raises(DataError):
    BadSamples(default, 999).count(1, {'bad_samples': 1.0})

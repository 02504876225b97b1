"""The engine on a trained run: it learnt its answers by heart, in every precision, and keeps what it read of a chat."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import one_device
from tiny_run import COLORS, QUESTIONS, STEPS, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.infer.engine import Engine, Request
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.infer.session import Session
from llava_mini_jax.train.tree import flatten

pytestmark = pytest.mark.usefixtures('quick_compilation')

GREEDY = Sampling(max_new_tokens=6, top_logprobs=5)
TURNS = [{'role': 'user', 'content': f'<image>\n{QUESTIONS[0]}'}]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return trained(tmp_path_factory.getbasetemp())


def colored(name: str) -> np.ndarray:
  return np.full((16, 24, 3), COLORS[name], np.uint8)


def ask_all(engine: Engine):
  return engine.generate([Request(Prompt(TURNS, [[colored(name)]]), GREEDY) for name in COLORS])


@pytest.fixture(scope='module')
def in_float32(workdir):
  return ask_all(Engine.from_checkpoint(workdir, slots=8, max_length=64))


def test_a_trained_run_answers(in_float32):
  assert [(answer.text, answer.finish) for answer in in_float32] == [(name, 'stop') for name in COLORS]


@pytest.mark.parametrize(('quantize', 'bits', 'tolerance'), [('int8', 8, 0.1), ('int4', 4, 2.0)])
def test_kernels_in_few_bits(workdir, in_float32, quantize, bits, tolerance):
  """They take the memory that is promised; the first token's logits move by no more than the precision says."""
  engine = Engine.from_checkpoint(workdir, slots=8, max_length=64, quantize=quantize)
  for path, kernel in flatten(engine.run.params).items():
    if path.startswith(('decoder/layers', 'prefusion/layers')) and path.endswith('_proj'):
      assert jnp.iinfo(kernel.qvalue.dtype).bits == bits and kernel.scale.size <= kernel.qvalue.size / 8
  answers = ask_all(engine)
  for answer, exact in zip(answers, in_float32, strict=True):
    assert answer.logprobs[0] == pytest.approx(exact.logprobs[0], abs=tolerance)
    assert answer.text == exact.text or quantize == 'int4'
  assert [a.logprobs for a in answers] != [a.logprobs for a in in_float32]


def test_slim_parameters_change_no_bit(workdir, in_float32):
  """bfloat16 parameters, where they are computed with in that, against float32 ones."""
  changes = ['model.dtype=bfloat16']
  whole = Engine(load_run(workdir, one_device(), changes=changes), slots=8, max_length=64)
  slim = Engine.from_checkpoint(workdir, dtype='bfloat16', slots=8, max_length=64)
  size = [sum(x.nbytes for x in jax.tree.leaves(e.run.params)) for e in (whole, slim)]
  assert size[1] < 0.6 * size[0]
  answers = ask_all(slim)
  assert [a.logprobs for a in answers] == [a.logprobs for a in ask_all(whole)]
  assert [a.text for a in answers] == [a.text for a in in_float32]


def test_an_answer_that_is_not_fused_is_not_read_again(workdir):
  run = load_run(workdir, one_device())
  model = run.experiment.model
  raw = dataclasses.replace(model, prefusion=dataclasses.replace(model.prefusion, fuse_history_answers=False))
  for config, reused in ((raw, True), (model, False)):
    engine = Engine(dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, model=config)), slots=1)
    session = Session(engine)
    session.show_image(colored('green'))
    first = session.ask(QUESTIONS[0], GREEDY)
    assert (first.text, first.finish) == ('green', 'stop')
    second = session.ask(QUESTIONS[1], GREEDY)
    assert session.memory.reused == first.prompt_tokens + reused * len(first.ids)
    turns = [*TURNS, {'role': 'assistant', 'content': 'green'}, {'role': 'user', 'content': QUESTIONS[1]}]
    (afresh,) = engine.generate([Request(Prompt(turns, [[colored('green')]]), GREEDY)])
    assert second.ids == afresh.ids
    np.testing.assert_allclose(second.logprobs, afresh.logprobs, rtol=0, atol=1e-5)


def test_what_cannot_be_loaded(workdir):
  with pytest.raises(ConfigError, match="quantize: expected one of int8, int4, nf4; found 'int3'"):
    Engine.from_checkpoint(workdir, quantize='int3')
  with pytest.raises(ConfigError, match="dtype: expected one of bfloat16, float32; found 'float64'"):
    Engine.from_checkpoint(workdir, dtype='float64')
  assert load_run(workdir, one_device()).step == STEPS

"""One engine and one server for the tests that leave them as they were."""

import pytest
from asking import asked, loaded
from serving import served
from tiny_run import make_dataset

from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.infer.engine import Engine


@pytest.fixture(scope='session')
def engine(tmp_path_factory):
  tokenizer = load_tokenizer(make_dataset(tmp_path_factory.getbasetemp()) / 'tokenizer')
  return Engine(loaded(asked(), tokenizer), slots=4, max_length=128, visual_chunk=4)


@pytest.fixture(scope='module')
def server(engine, quick_compilation):
  with served(engine) as one:
    yield one

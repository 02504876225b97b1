"""What is told of an answer while it comes can never be taken back."""

from __future__ import annotations

import pytest
from tiny_run import make_dataset

from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.infer.sampling import Sampling
from llava_mini_jax.infer.stream import Stream


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(make_dataset(tmp_path_factory.getbasetemp()) / 'tokenizer')


def said(tokenizer, ids: list[int], sampling: Sampling) -> tuple[Stream, list[str]]:
  """A stream that is given these tokens one by one, and its pieces."""
  tokens = iter(ids)

  def advance() -> bool:
    stream.take(next(tokens), 0.0, [])
    return True

  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
  stream = Stream(sampling, 0, end=(tokenizer.eos_token_id,), decode=decode, advance=advance)
  return stream, list(stream)


@pytest.mark.parametrize(('text', 'ends'), [('naïve 日本 red', True), ('日本', False), ('a  b', True)])
def test_a_character_is_never_cut(tokenizer, text, ends):
  """Each byte of these characters is a token; EOS ends it, or there is no more room."""
  ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * ends
  stream, pieces = said(tokenizer, ids, Sampling(max_new_tokens=len(ids)))
  assert ''.join(pieces) == text and len(pieces) > 1 and all(pieces)
  assert not any('\ufffd' in piece for piece in pieces)
  assert stream.finish == ('stop' if ends else 'length')


@pytest.mark.parametrize(
  ('text', 'stop', 'told', 'finish'),
  [
    ('red and blue', ('and',), 'red', 'stop'),
    ('red and blue', ('blue', 'and b'), 'red', 'stop'),
    ('red\n\nblue', ('\n\n',), 'red', 'stop'),
    ('red an', ('and',), 'red an', 'length'),  # what looked like a stop string was none
    ('aab', ('ab',), 'a', 'stop'),
    ('red', ('blue',), 'red', 'length'),
  ],
)
def test_a_stop_string_is_never_told(tokenizer, text, stop, told, finish):
  ids = tokenizer.encode(text)
  stream, pieces = said(tokenizer, ids, Sampling(max_new_tokens=len(ids), stop=stop))
  assert (''.join(pieces), stream.finish) == (told, finish)


def test_only_new_tokens_are_decoded(tokenizer):
  """Whoever reads an answer while it grows pays for what is new; who does not read pays nothing."""
  ids, counts = tokenizer.encode('red and blue and naïve 日本 ' * 8), []

  def decode(some):
    counts.append(len(some))
    return tokenizer.decode(some, skip_special_tokens=True)

  def stream(**sampling) -> Stream:
    return Stream(Sampling(max_new_tokens=len(ids), **sampling), 0, end=(), decode=decode, advance=lambda: True)

  unread = stream()
  for token in ids:
    unread.take(token, 0.0, [])
  assert not counts and unread.text == tokenizer.decode(ids).strip()

  for read in (stream(), stream(stop=('green',))):
    counts.clear()
    for token in ids:
      read.take(token, 0.0, [])
      assert tokenizer.decode(ids).startswith(read.text)
    assert read.text == unread.text and max(counts) <= 12 < len(ids)

"""The trained tokenizer is lossless, small, stable, and a plain Hugging Face one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import transformers

from llava_mini_jax.data.conversation import encode, load_template
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.tokenizer import SPECIAL_TOKENS, fingerprint, load_tokenizer, save_tokenizer, train_tokenizer

TEXTS = ['what shape is in the image?', 'triangle', 'is there a red triangle?', 'yes', 'no'] * 3
TRICKY = [
  ''.join(map(chr, range(128))),
  '  two  spaces, tab\t, newline\n\r\n, no-break\u00a0space ',
  'naïve — 日本語 🙂 \u200b e\u0301',
  '',
  "don't 3.14 <image> [INST]",
]


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(TEXTS)


def test_special_tokens_have_fixed_ids(tokenizer):
  assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
  assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 3)
  assert tokenizer.bos_token_id is None


@pytest.mark.parametrize('text', TRICKY)
def test_any_text_survives(tokenizer, text):
  ids = tokenizer(text)['input_ids']
  assert tokenizer.unk_token_id not in ids
  assert tokenizer.decode(ids) == text


def test_frequent_words_are_one_token(tokenizer):
  assert tokenizer.tokenize('triangle') == ['triangle']
  assert tokenizer.tokenize('what shape') == ['what', 'Ġshape']
  assert [len(tokenizer.tokenize(role)) for role in ('user', 'assistant', 'system')] == [1, 1, 1]
  assert len(tokenizer) <= 512


def test_a_turn_costs_few_tokens(tokenizer):
  turns = [{'role': 'user', 'content': 'is there a red triangle?'}, {'role': 'assistant', 'content': 'yes'}]
  encoded = encode(tokenizer, load_template('chatml'), turns)
  assert tokenizer.decode(encoded.ids[encoded.assistant]) == 'yes<|im_end|>'
  np.testing.assert_array_equal(encoded.ids[encoded.assistant][-1], tokenizer.eos_token_id)
  assert len(encoded.ids) == 3 + 6 + 2 + 3 + 1 + 2  # header, question, end; header, answer, end


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
  save_tokenizer(tokenizer, tmp_path / 'tokenizer')
  for loaded in (
    load_tokenizer(tmp_path / 'tokenizer'),
    transformers.AutoTokenizer.from_pretrained(tmp_path / 'tokenizer'),
  ):
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded(TRICKY)['input_ids'] == tokenizer(TRICKY)['input_ids']


def test_fingerprint_sees_the_vocabulary_and_not_the_last_call(tokenizer):
  before = fingerprint(tokenizer)
  tokenizer(['a', 'longer text'], padding=True, truncation=True, max_length=3)
  assert fingerprint(tokenizer) == before
  assert fingerprint(train_tokenizer([*TEXTS, 'cube', 'cube'])) != before
  other = train_tokenizer(TEXTS)
  other.eos_token = SPECIAL_TOKENS[2]
  assert fingerprint(other) != before


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tokenizer):
  program = (
    'from llava_mini_jax.data.tokenizer import fingerprint, train_tokenizer\n'
    f'print(fingerprint(train_tokenizer({TEXTS!r})))'
  )
  environment = {**os.environ, 'PYTHONHASHSEED': '7', 'RAYON_NUM_THREADS': '1'}
  done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == fingerprint(tokenizer)


def test_too_small_a_vocabulary():
  with pytest.raises(DataError, match='^E_VOCAB_SIZE: tokenizer: expected vocab_size of at least 260; found 259$'):
    train_tokenizer(TEXTS, 259)
  assert len(train_tokenizer(TEXTS, 260)) == 260


def test_no_tokenizer(tmp_path):
  with pytest.raises(DataError) as error:
    load_tokenizer(tmp_path / 'none')
  assert str(error.value) == f'E_NO_TOKENIZER: {tmp_path}/none: no such directory'
  with pytest.raises(DataError) as error:
    load_tokenizer(tmp_path)
  assert str(error.value) == (
    f'E_NO_TOKENIZER: {tmp_path}: expected tokenizer.json or tokenizer.model in it; found neither'
  )


@pytest.mark.parametrize('damage', ['', '{"version": "1.0"', '[]', 'null'])
def test_a_damaged_tokenizer(tokenizer, tmp_path, damage):
  save_tokenizer(tokenizer, tmp_path)
  (tmp_path / 'tokenizer.json').write_text(damage)
  with pytest.raises(DataError, match='^E_NO_TOKENIZER: .*: cannot be loaded'):
    load_tokenizer(tmp_path)

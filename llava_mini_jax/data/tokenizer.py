"""Tokenizers on disk: train a small one, load any, and fingerprint it.

The trained one is byte-level BPE, so every text is encodable and decodes to itself; words that are frequent in the
texts become single tokens. Its special tokens are those of the `chatml` template.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers

from llava_mini_jax.data.errors import DataError

PAD, UNK, TURN_START, TURN_END = SPECIAL_TOKENS = ('<|pad|>', '<|unk|>', '<|im_start|>', '<|im_end|>')
_BYTES = 256
_ROLES = ('system', 'user', 'assistant', '\n', 'USER', ' ASSISTANT')  # what the templates write around the texts


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE from texts; the same texts give the same tokenizer.

  Args:
    vocab_size: the most tokens it may have: 4 special ones, 256 bytes, the rest learnt. Few texts may need fewer;
      `len(tokenizer)` is what the model has to hold.
  Returns:
    A fast tokenizer with ids <|pad|> 0, <|unk|> 1, <|im_start|> 2 and <|im_end|> 3, the last one as EOS, no BOS.
  Raises:
    DataError: E_VOCAB_SIZE.
  """
  least = len(SPECIAL_TOKENS) + _BYTES
  if vocab_size < least:
    raise DataError('E_VOCAB_SIZE', 'tokenizer', f'expected vocab_size of at least {least}; found {vocab_size}')
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNK))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(_with_roles(texts), trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=PAD,
    unk_token=UNK,
    eos_token=TURN_END,
    additional_special_tokens=[TURN_START],
    clean_up_tokenization_spaces=False,
  )


def _with_roles(texts: Iterable[str]) -> Iterable[str]:
  for role in _ROLES:
    yield from (role, role)  # twice: the least frequency that is learnt
  yield from texts


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, directory: str | os.PathLike) -> None:
  """Writes an HF tokenizer directory, which `load_tokenizer` and `transformers.AutoTokenizer` read."""
  tokenizer.save_pretrained(directory)


def load_tokenizer(directory: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
  """Loads an HF tokenizer directory; no network, no remote code.

  Raises:
    DataError: E_NO_TOKENIZER if there is none, it is damaged, it has no fast version, or its package is missing.
  """
  where = os.fspath(directory)
  if not Path(directory).is_dir():
    raise DataError('E_NO_TOKENIZER', where, 'no such directory')
  found = [name for name in ('tokenizer.json', 'tokenizer.model') if (Path(directory) / name).is_file()]
  if not found:
    raise DataError('E_NO_TOKENIZER', where, 'expected tokenizer.json or tokenizer.model in it; found neither')
  if found == ['tokenizer.model'] and importlib.util.find_spec('sentencepiece') is None:
    wanted = 'expected the package sentencepiece to read tokenizer.model; pip install llava_mini_jax[convert]'
    raise DataError('E_NO_TOKENIZER', where, wanted)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # transformers and the Rust parser raise bare Exceptions for damaged files
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise DataError('E_NO_TOKENIZER', where, f'cannot be loaded ({detail})') from error
  if not tokenizer.is_fast:
    raise DataError('E_NO_TOKENIZER', where, f'expected a fast tokenizer; found {type(tokenizer).__name__}')
  return tokenizer


def fingerprint(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
  """sha256 of all that decides which ids a text becomes, and of BOS, EOS and padding."""
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  state = {key: value for key, value in state.items() if key not in ('truncation', 'padding')}  # those vary by call
  special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
  return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()

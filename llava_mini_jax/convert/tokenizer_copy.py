"""A tokenizer from one directory to another, file by file, and loaded from there to see that nothing is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers

from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.tokenizer import load_tokenizer

_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
)


def copy_tokenizer(source: Path, to: Path) -> transformers.PreTrainedTokenizerFast:
  """Copies the files that belong to a tokenizer, without the config.json of a model that may lie beside them.

  With it, transformers would look up the tokenizer by the kind of model, and fail for kinds that it does not know.

  Raises:
    DataError: E_NO_TOKENIZER if there is none, or what is copied cannot be loaded.
  """
  found = [name for name in _FILES if (source / name).is_file()]
  if not {'tokenizer.json', 'tokenizer.model'} & set(found):
    raise DataError('E_NO_TOKENIZER', str(source), 'expected tokenizer.json or tokenizer.model in it; found neither')
  to.mkdir(parents=True, exist_ok=True)
  for name in found:
    shutil.copyfile(source / name, to / name)
  try:
    return load_tokenizer(to)
  except DataError as error:
    raise DataError(error.code, str(source), error.message) from None

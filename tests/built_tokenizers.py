"""Tokenizers whose ids are known without a download, and turns to spell with them."""

from __future__ import annotations

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_mini_jax.data.conversation import (
  Encoded,
)

SPECIAL = {'<unk>': 0, '<s>': 1, '</s>': 2}
MARKERS = ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|im_start|>', '<|im_end|>')
SPECIAL_IDS = SPECIAL | {marker: 1000 + i for i, marker in enumerate(MARKERS)}
IMAGE = -200

VICUNA_SYSTEM = (
  'A chat between a curious user and an artificial intelligence assistant. '
  "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
LLAMA_SYSTEM = (
  'You are a helpful language and vision assistant. You are able to understand the visual content that the user '
  'provides, and assist the user with a variety of tasks using natural language.'
)


def char_tokenizer(bos: str | None = None, adds_bos: bool = False, normalizer=None) -> PreTrainedTokenizerFast:
  """id = 3 + ord(character), as the stub of the golden cases; special tokens as in SPECIAL_IDS."""
  vocab = {chr(i): 3 + i for i in range(256)} | SPECIAL_IDS
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_IDS])
  if normalizer:
    backend.normalizer = normalizer
  if adds_bos:
    backend.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A', special_tokens=[(bos, SPECIAL_IDS[bos])], pair=None
    )
  return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token='</s>', unk_token='<unk>')


def spell(*parts: str | int) -> list[int]:
  """Ids of the parts: a marker or an id stands for itself, other text for its characters."""
  ids = []
  for part in parts:
    if isinstance(part, int):
      ids.append(part)
    elif part in SPECIAL_IDS:
      ids.append(SPECIAL_IDS[part])
    else:
      ids.extend(3 + ord(c) for c in part)
  return ids


def user(text: str) -> dict[str, str]:
  return {'role': 'user', 'content': text}


def assistant(text: str) -> dict[str, str]:
  return {'role': 'assistant', 'content': text}


def system_turn(text: str) -> dict[str, str]:
  return {'role': 'system', 'content': text}


def assert_encoded(got: Encoded, *parts: tuple[list[int], bool]) -> None:
  """Each part: ids, and whether the assistant says them."""
  assert got.ids.dtype == np.int32
  assert got.assistant.dtype == bool
  assert got.ids.tolist() == [i for ids, _ in parts for i in ids]
  assert got.assistant.tolist() == [said for ids, said in parts for _ in ids]


TWO_TURNS = [user('<image>\nWhat?'), assistant('A cat.'), user('And?'), assistant('A dog.')]

LLAMA_3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer(trim_offsets: bool) -> PreTrainedTokenizerFast:
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(SPECIAL_IDS),
    show_progress=False,
  )
  backend.train_from_iterator(['A cat and a dog. A black cat? user assistant\n\n'] * 4, trainer)
  return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>')


def space_tokenizer(trim_offsets: bool, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
  """`Ġ4` is one token only where the 4 is the first digit of a word; `Ġ` alone precedes an x."""
  vocab = {'\u0120': 0, '4': 1, 'x': 2, 'A': 3, ':': 4, '\u01204': 5, 'xx': 6}
  backend = tokenizers.Tokenizer(models.BPE(vocab, [('\u0120', '4'), ('x', 'x')]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  return PreTrainedTokenizerFast(tokenizer_object=backend)

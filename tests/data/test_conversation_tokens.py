"""Masks and ends of turns with tokenizers of every kind, which are built here, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from built_tokenizers import (
  IMAGE,
  TWO_TURNS,
  assert_encoded,
  assistant,
  byte_level_tokenizer,
  char_tokenizer,
  space_tokenizer,
  spell,
  user,
)
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import (
  TEMPLATES,
  encode,
  end_of_turn,
  load_template,
  render,
  tokenize,
)
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.tokenizer import train_tokenizer


@pytest.mark.parametrize('trim_offsets', [True, False])
@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize(
  'answer', ['A black cat.', 'x  y', '\N{GRINNING FACE}\u5b57', '\N{GRINNING FACE}', ' A cat', '']
)
def test_mask_decodes_to_what_the_template_marks(name, trim_offsets, answer):
  """Words, bytes of one character shared by several tokens, lone spaces with empty offsets."""
  tokenizer = byte_level_tokenizer(trim_offsets)
  turns = [user('<image>\nA dog and \N{GRINNING FACE} '), assistant(answer), user('\u5b57?'), assistant('A dog')]
  text, spans = render(load_template(name), turns)
  got = encode(tokenizer, load_template(name), turns)
  assert tokenizer.decode(got.ids[got.assistant]) == ''.join(text[a:b] for a, b in spans)
  rest = got.ids[~got.assistant]
  outside = ''.join(text[b:a] for b, a in zip([0] + [b for _, b in spans], [a for a, _ in spans] + [None], strict=True))
  assert tokenizer.decode(rest[rest != IMAGE]) == outside.replace('<image>', '')
  assert (rest == IMAGE).sum() == 1


def test_sentencepiece_style_words_belong_to_the_assistant():
  """As Llama-2 does: a word carries the space before it; what follows a tag starts a text of its own."""
  vocab = ['<unk>', '<s>', '</s>', '▁', 'USER:', '▁USER:', '▁ASSISTANT:', '▁Yes', '4', '▁Q']
  backend = tokenizers.Tokenizer(models.Unigram([(token, -1.0) for token in vocab], unk_id=0))
  backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement='▁', prepend_scheme='always')
  backend.add_special_tokens(['<unk>', '<s>', '</s>'])
  backend.post_processor = processors.TemplateProcessing(single='<s> $A', pair=None, special_tokens=[('<s>', 1)])
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
  turns = [user('<image> Q'), assistant('Yes'), user('Q'), assistant('4')]
  got = encode(tokenizer, load_template('vicuna_v1'), turns, system='')
  #                                 <s> ▁USER:  ▁   tag  ▁Q ▁ASSISTANT: ▁Yes </s> ▁USER: ▁Q ▁ASSISTANT: ▁ 4 </s>
  assert got.ids[got.assistant].tolist() == [7, 2, 3, 8, 2]
  assert got.ids[~got.assistant].tolist() == [1, 5, 3, IMAGE, 9, 6, 5, 9, 6]
  plain = encode(tokenizer, load_template('plain'), [user('<image>'), assistant('4')])
  assert plain.ids.tolist() == [1, IMAGE, 3, 8, 0]  # the newline is not in this vocabulary
  assert plain.assistant.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize('trim_offsets', [True, False])
def test_a_token_belongs_to_the_span_that_it_reaches_into(trim_offsets):
  """Also where a template puts the space before an answer outside of it."""
  tokenizer = space_tokenizer(trim_offsets)
  assert_encoded(tokenize(tokenizer, 'A: 4:', [(3, 4)]), ([3, 4], False), ([5], True), ([4], False))
  assert_encoded(tokenize(tokenizer, 'A: x:', [(3, 4)]), ([3, 4, 0], False), ([2], True), ([4], False))
  assert_encoded(tokenize(tokenizer, 'A: x:', [(2, 4)]), ([3, 4], False), ([0, 2], True), ([4], False))
  assert_encoded(tokenize(tokenizer, 'Axx:', [(0, 2)]), ([3, 6], True), ([4], False))
  assert_encoded(tokenize(tokenizer, '', [(0, 0)]))


@pytest.mark.parametrize('trim_offsets', [True, False])
def test_a_space_that_the_tokenizer_puts_first_belongs_to_what_follows(trim_offsets):
  tokenizer = space_tokenizer(trim_offsets, add_prefix_space=True)
  assert_encoded(tokenize(tokenizer, '<image>x', [(7, 8)]), ([IMAGE], False), ([0, 2], True))


def test_earlier_calls_of_the_tokenizer_leave_no_trace():
  tokenizer = char_tokenizer(bos='<s>', adds_bos=True)
  template = load_template('chatml')
  before = encode(tokenizer, template, TWO_TURNS)
  tokenizer('abc', truncation=True, max_length=2)
  assert tokenizer.backend_tokenizer.truncation
  assert encode(tokenizer, template, TWO_TURNS).ids.tolist() == before.ids.tolist()
  tokenizer.backend_tokenizer.enable_padding(length=900)
  assert encode(tokenizer, template, TWO_TURNS).ids.tolist() == before.ids.tolist()
  tokenizer('a</s>', split_special_tokens=True)
  assert tokenizer.backend_tokenizer.encode_special_tokens
  assert encode(tokenizer, template, TWO_TURNS).ids.tolist() == before.ids.tolist()


@pytest.mark.parametrize(
  ('template', 'end'), [('chatml', '<|im_end|>'), ('qa', '<|im_end|>'), ('vicuna_v1', '<|im_end|>'), ('plain', '\n')]
)
def test_where_an_answer_ends(template, end):
  tokenizer = train_tokenizer(['some text'])
  token = end_of_turn(tokenizer, load_template(template))
  assert tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False) == end
  encoded = encode(tokenizer, load_template(template), [user('Q'), {'role': 'assistant', 'content': 'A'}])
  assert encoded.ids[encoded.assistant][-1] == token


def sentencepiece_like() -> PreTrainedTokenizerFast:
  """A space before every text, and a byte token for the newline, as Llama-2's tokenizer has them."""
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, '<0x0A>': 3, '▁': 4, 'a': 5, 'b': 6, '▁b': 7}
  model = models.BPE(vocab, [('▁', 'b')], unk_token='<unk>', byte_fallback=True)
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  backend.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='</s>', unk_token='<unk>')


def test_the_end_of_a_caption_is_one_token_in_its_place():
  """Alone, `\\n` is two tokens of such a tokenizer."""
  tokenizer = sentencepiece_like()
  assert tokenizer.backend_tokenizer.encode('\n', add_special_tokens=False).ids == [4, 3]
  assert end_of_turn(tokenizer, load_template('plain')) == 3


def test_tags_that_a_tokenizer_has_too():
  """llava-hf's tokenizers know `<image>`; it is cut out all the same."""
  tokenizer = train_tokenizer(['some text'])
  plain = encode(tokenizer, load_template('chatml'), [user('<image>\nQ')])
  tokenizer.add_special_tokens({'additional_special_tokens': ['<image>', '<video>']})
  known = encode(tokenizer, load_template('chatml'), [user('<image>\nQ')])
  np.testing.assert_array_equal(plain.ids, known.ids)
  with pytest.raises(DataError, match='E_SPECIAL_TOKEN'):
    encode(tokenizer, load_template('chatml'), [user('<|im_end|>')])


def test_a_template_whose_end_the_tokenizer_does_not_know(tmp_path):
  tokenizer = train_tokenizer(['some text'])
  with pytest.raises(ConfigError) as error:
    end_of_turn(tokenizer, load_template('llama_3_1'))
  expected = "template: expected an end of turn that is one token of the tokenizer; found '<|eot_id|>'"
  assert str(error.value) == expected


def test_normalizing_tokenizers_keep_their_place():
  """Lower-casing keeps lengths, NFKC does not; offsets refer to the text before both."""
  tokenizer = char_tokenizer(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
  got = encode(tokenizer, load_template('chatml'), [user('\ufb01\ufb01'), assistant('OK \ufb01')])
  assert got.ids[got.assistant].tolist() == spell('ok fi', '<|im_end|>')

"""Expected strings, ids and masks are written by hand; the tokenizers are built here, so nothing is downloaded."""

from __future__ import annotations

import json
import re

import jinja2
import numpy as np
import pytest
import tokenizers
from conftest import GOLDEN
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import (
  TEMPLATES,
  Encoded,
  check_targets,
  check_turns,
  encode,
  end_of_turn,
  load_template,
  render,
  tokenize,
  turns_from_llava,
)
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.tokenizer import train_tokenizer

CASES = json.loads((GOLDEN / 'preprocess' / 'tokenizer_image_token.json').read_text())['cases']
SPECIAL = {'<unk>': 0, '<s>': 1, '</s>': 2}
MARKERS = ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|im_start|>', '<|im_end|>')
SPECIAL_IDS = SPECIAL | {marker: 1000 + i for i, marker in enumerate(MARKERS)}
IMAGE = -200
LLAMA_3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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
RENDERED = {
  'vicuna_v1': (
    VICUNA_SYSTEM + 'USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: And? ASSISTANT: A dog.</s>',
    [' A cat.</s>', ' A dog.</s>'],
  ),
  'plain': ('<image>A cat.\nA dog.\n', ['A cat.\n', 'A dog.\n']),
  'llama_3_1': (
    (
      f'<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_SYSTEM}<|eot_id|>'
      '<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>'
      '<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>'
    ),
    ['A cat.<|eot_id|>', 'A dog.<|eot_id|>'],
  ),
  'chatml': (
    (
      '<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n'
      '<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n'
    ),
    ['A cat.<|im_end|>', 'A dog.<|im_end|>'],
  ),
  'qa': ('<image>\nWhat? A cat.</s>And? A dog.</s>', [' A cat.</s>', ' A dog.</s>']),
}
# template -> (with a system text, with an empty one), of the single question 'Q'
SYSTEMS = {
  'vicuna_v1': ('Be brief. USER: Q ', 'USER: Q '),
  'plain': ('', ''),
  'llama_3_1': (
    (
      '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>'
      '<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>'
    ),
    '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>',
  ),
  'chatml': (
    '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n',
    '<|im_start|>user\nQ<|im_end|>\n',
  ),
  'qa': ('Be brief.\nQ', 'Q'),
}
GENERATION_PROMPTS = {
  'vicuna_v1': 'ASSISTANT:',
  'plain': '',
  'llama_3_1': '<|start_header_id|>assistant<|end_header_id|>\n\n',
  'chatml': '<|im_start|>assistant\n',
  'qa': '',
}


@pytest.mark.parametrize('case', CASES, ids=lambda c: f'{c["adds_bos"]}-{c["prompt"]!r}')
def test_tokenize_is_the_released_tokenizer_image_token(case):
  got = tokenize(char_tokenizer(bos='<s>', adds_bos=case['adds_bos']), case['prompt'])
  assert got.ids.tolist() == case['ids']
  assert got.ids.dtype == np.int32
  assert not got.assistant.any()


@pytest.mark.parametrize('name', TEMPLATES)
def test_render_two_turns(name):
  text, spans = render(load_template(name), TWO_TURNS)
  assert text == RENDERED[name][0]
  assert [text[a:b] for a, b in spans] == RENDERED[name][1]


@pytest.mark.parametrize('name', TEMPLATES)
def test_system_text_is_replaced_or_left_out(name):
  template = load_template(name)
  told, untold = SYSTEMS[name]
  assert render(template, [user('Q')], system='Be brief.') == (told, [])
  assert render(template, [system_turn('Be brief.'), user('Q')]) == (told, [])
  assert render(template, [system_turn('Be long.'), user('Q')], system='Be brief.') == (told, [])
  assert render(template, [user('Q')], system='') == (untold, [])


@pytest.mark.parametrize('name', TEMPLATES)
def test_generation_prompt_is_what_precedes_the_answer_in_training(name):
  template = load_template(name)
  prompt, spans = render(template, TWO_TURNS[:3], add_generation_prompt=True)
  assert prompt == render(template, TWO_TURNS[:3])[0] + GENERATION_PROMPTS[name]
  text, all_spans = render(template, TWO_TURNS)
  assert text[: all_spans[1][0]] == prompt
  assert spans == all_spans[:1]


def test_white_space_around_contents():
  turns = [user(' Q\n'), assistant('\n A \n')]
  assert render(load_template('vicuna_v1'), turns, system='')[0] == 'USER:  Q\n ASSISTANT: \n A \n</s>'
  assert render(load_template('plain'), turns)[0] == '\n A \n\n'
  assert render(load_template('chatml'), turns)[0] == (
    '<|im_start|>user\n Q\n<|im_end|>\n<|im_start|>assistant\n\n A \n<|im_end|>\n'
  )
  assert render(load_template('llama_3_1'), turns, system='')[0] == (  # trimmed
    '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>'
  )


def test_contents_are_not_templates_and_not_escaped():
  text, _ = render(load_template('chatml'), [user('{{ 1 + 1 }} {% if %} {# c #} <b> & "')])
  assert text == '<|im_start|>user\n{{ 1 + 1 }} {% if %} {# c #} <b> & "<|im_end|>\n'


def test_plain_keeps_only_the_tags_of_the_question():
  assert render(load_template('plain'), [user('Describe <image> and\n<image>.'), assistant('Two.')]) == (
    '<image><image>Two.\n',
    [(14, 19)],
  )


def test_encode_vicuna():
  tokenizer = char_tokenizer(bos='<s>', adds_bos=True)
  assert_encoded(
    encode(tokenizer, load_template('vicuna_v1'), TWO_TURNS, system='S'),
    (spell('<s>', 'S USER: ', IMAGE, '\nWhat? ASSISTANT:'), False),
    (spell(' A cat.', '</s>'), True),
    (spell('USER: And? ASSISTANT:'), False),
    (spell(' A dog.', '</s>'), True),
  )


def test_encode_plain():
  tokenizer = char_tokenizer(bos='<s>', adds_bos=True)
  assert_encoded(
    encode(tokenizer, load_template('plain'), [user('<image>\nSay.'), assistant('A cat.')]),
    (spell('<s>', IMAGE), False),
    (spell('A cat.\n'), True),
  )


@pytest.mark.parametrize('adds_bos', [True, False])
def test_encode_llama_has_one_bos(adds_bos):
  tokenizer = char_tokenizer(bos='<|begin_of_text|>', adds_bos=adds_bos)
  head, tail = '<|start_header_id|>', '<|end_header_id|>'
  assert_encoded(
    encode(tokenizer, load_template('llama_3_1'), TWO_TURNS[:2], system='S'),
    (spell('<|begin_of_text|>', head, 'system', tail, '\n\nS', '<|eot_id|>'), False),
    (spell(head, 'user', tail, '\n\n', IMAGE, '\nWhat?', '<|eot_id|>', head, 'assistant', tail, '\n\n'), False),
    (spell('A cat.', '<|eot_id|>'), True),
  )


@pytest.mark.parametrize('adds_bos', [True, False])
def test_encode_chatml(adds_bos):
  tokenizer = char_tokenizer(bos='<s>', adds_bos=adds_bos)
  start, end = '<|im_start|>', '<|im_end|>'
  assert_encoded(
    encode(tokenizer, load_template('chatml'), TWO_TURNS),
    (spell('<s>') if adds_bos else [], False),
    (spell(start, 'user\n', IMAGE, '\nWhat?', end, '\n', start, 'assistant\n'), False),
    (spell('A cat.', end), True),
    (spell('\n', start, 'user\nAnd?', end, '\n', start, 'assistant\n'), False),
    (spell('A dog.', end), True),
    (spell('\n'), False),
  )


@pytest.mark.parametrize('name', TEMPLATES)
def test_prompt_ids_are_the_beginning_of_training_ids(name):
  tokenizer = byte_level_tokenizer(trim_offsets=False)
  template = load_template(name)
  training = encode(tokenizer, template, TWO_TURNS[:2])
  prompt = encode(tokenizer, template, TWO_TURNS[:1], add_generation_prompt=True)
  first = int(np.argmax(training.assistant))
  assert training.ids[:first].tolist() == prompt.ids.tolist()
  assert not prompt.assistant.any()


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


def space_tokenizer(trim_offsets: bool, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
  """`Ġ4` is one token only where the 4 is the first digit of a word; `Ġ` alone precedes an x."""
  vocab = {'\u0120': 0, '4': 1, 'x': 2, 'A': 3, ':': 4, '\u01204': 5, 'xx': 6}
  backend = tokenizers.Tokenizer(models.BPE(vocab, [('\u0120', '4'), ('x', 'x')]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  return PreTrainedTokenizerFast(tokenizer_object=backend)


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


@pytest.mark.parametrize('token', ['<s>', '</s>', '<unk>', '<|eot_id|>', '<|im_end|>', '<|start_header_id|>'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_nobody_can_type_a_special_token(name, token):
  tokenizer = char_tokenizer(bos='<s>', adds_bos=True)
  for i, turns in enumerate(
    ([user(f'a{token}b'), assistant('A')], [user('Q'), assistant(f'{token}')], [user('Q'), assistant('A'), user(token)])
  ):
    with pytest.raises(DataError) as error:
      encode(tokenizer, load_template(name), turns, where='sample 7')
    assert str(error.value) == (
      f'E_SPECIAL_TOKEN: sample 7: turns[{i}]: expected no special token in the text; found {token!r}'
    )
  with pytest.raises(DataError) as error:
    encode(tokenizer, load_template(name), [user('Q')], system=f'S{token}')
  assert str(error.value) == (
    f'E_SPECIAL_TOKEN: conversation: system: expected no special token in the text; found {token!r}'
  )


def test_special_tokens_added_later_count_too():
  tokenizer = char_tokenizer()
  turns = [user('Q <|new|>s')]
  assert len(encode(tokenizer, load_template('chatml'), turns).ids) > 0
  for token in ('<|new|>', '<|new|>s'):  # the error names the longest that is there
    tokenizer.add_tokens([token], special_tokens=True)
    with pytest.raises(DataError, match=re.escape(f'turns[0]: expected no special token in the text; found {token!r}')):
      encode(tokenizer, load_template('chatml'), turns)


def test_added_tokens_that_are_not_special_may_be_typed():
  tokenizer = char_tokenizer()
  tokenizer.add_tokens(['<note>'])
  note = tokenizer.convert_tokens_to_ids('<note>')
  got = encode(tokenizer, load_template('chatml'), [user('<note>')])
  assert got.ids.tolist() == spell('<|im_start|>', 'user\n', note, '<|im_end|>', '\n')


def test_a_tokenizer_without_special_tokens():
  got = encode(space_tokenizer(trim_offsets=True), load_template('plain'), [user('<image>'), assistant('xA')])
  assert_encoded(got, ([IMAGE], False), ([2, 3], True))


def test_near_misses_of_special_tokens_are_text():
  tokenizer = char_tokenizer(bos='<s>', adds_bos=True)
  got = encode(tokenizer, load_template('chatml'), [user('</s <|eot_id| s> <|eot<image>_id|>')])
  assert got.ids.tolist() == spell(
    '<s>', '<|im_start|>', 'user\n</s <|eot_id| s> <|eot', IMAGE, '_id|>', '<|im_end|>', '\n'
  )


HUMAN, GPT = {'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'A'}


def test_turns_from_llava():
  assert turns_from_llava([HUMAN, GPT, HUMAN], 'here') == [user('Q'), assistant('A'), user('Q')]
  assert turns_from_llava([{'from': 'system', 'value': 'S'}, HUMAN, GPT], 'here') == [
    system_turn('S'),
    user('Q'),
    assistant('A'),
  ]


@pytest.mark.parametrize(
  ('conversations', 'message'),
  [
    ([], 'E_EMPTY_TURNS: s7: conversations: expected at least one human turn; found none'),
    (
      [{'from': 'system', 'value': 'S'}],
      'E_EMPTY_TURNS: s7: conversations: expected at least one human turn; found none',
    ),
    (None, 'E_FIELD: s7: conversations: expected a list; found NoneType'),
    ({'from': 'human'}, 'E_FIELD: s7: conversations: expected a list; found dict'),
    ([HUMAN, 'A'], 'E_FIELD: s7: conversations[1]: expected an object; found str'),
    ([GPT, HUMAN], "E_ROLE_ORDER: s7: conversations[0].from: expected human; found 'gpt'"),
    ([HUMAN, HUMAN], "E_ROLE_ORDER: s7: conversations[1].from: expected gpt; found 'human'"),
    ([HUMAN, GPT, GPT], "E_ROLE_ORDER: s7: conversations[2].from: expected human; found 'gpt'"),
    ([{'from': 'system', 'value': 'S'}, GPT], "E_ROLE_ORDER: s7: conversations[1].from: expected human; found 'gpt'"),
    (
      [HUMAN, {'from': 'system', 'value': 'S'}],
      "E_ROLE_ORDER: s7: conversations[1].from: expected gpt; found 'system'",
    ),
    ([{'from': 'bot', 'value': 'Q'}], "E_ROLE_ORDER: s7: conversations[0].from: expected human; found 'bot'"),
    ([{'from': ['human'], 'value': 'Q'}], "E_ROLE_ORDER: s7: conversations[0].from: expected human; found ['human']"),
    ([{'value': 'Q'}], 'E_ROLE_ORDER: s7: conversations[0].from: expected human; found None'),
    ([{'from': 'human'}], 'E_FIELD: s7: conversations[0].value: expected a string; found NoneType'),
    ([HUMAN, {'from': 'gpt', 'value': 4}], 'E_FIELD: s7: conversations[1].value: expected a string; found int'),
    (
      [{'from': 'human', 'value': 'a\ud800b'}],
      'E_FIELD: s7: conversations[0].value: expected valid Unicode; found a lone surrogate at character 1',
    ),
    (
      [HUMAN, {'from': 'gpt', 'value': 'See <image>.'}],
      'E_IMAGE_TAGS: s7: conversations[1].value: expected <image> in human turns only; found one',
    ),
    (
      [{'from': 'system', 'value': '<image>'}, HUMAN],
      'E_IMAGE_TAGS: s7: conversations[0].value: expected <image> in human turns only; found one',
    ),
  ],
)
def test_turns_from_llava_refuses(conversations, message):
  with pytest.raises(DataError) as error:
    turns_from_llava(conversations, 's7')
  assert str(error.value) == message


@pytest.mark.parametrize(
  ('turns', 'arguments', 'message'),
  [
    ([], {}, 'E_EMPTY_TURNS: conversation: turns: expected at least one user turn; found none'),
    ([], {'system': 'S'}, 'E_EMPTY_TURNS: conversation: turns: expected at least one user turn; found none'),
    ([assistant('A')], {}, "E_ROLE_ORDER: conversation: turns[0].role: expected user; found 'assistant'"),
    (
      [user('Q\udfff')],
      {},
      'E_FIELD: conversation: turns[0].content: expected valid Unicode; found a lone surrogate at character 1',
    ),
    (
      [user('Q')],
      {'system': '\ud800'},
      'E_FIELD: conversation: turns[0].content: expected valid Unicode; found a lone surrogate at character 0',
    ),
    (
      [user('Q')],
      {'system': '<image>'},
      'E_IMAGE_TAGS: conversation: turns[0].content: expected <image> in user turns only; found one',
    ),
    (
      [user('Q'), assistant('A')],
      {'add_generation_prompt': True},
      'E_ROLE_ORDER: conversation: a generation prompt: expected the last turn to be user; found assistant',
    ),
  ],
)
def test_render_refuses(turns, arguments, message):
  with pytest.raises(DataError) as error:
    render(load_template('chatml'), turns, **arguments)
  assert str(error.value) == message


def test_check_turns_accepts_a_conversation():
  check_turns([system_turn(''), user('<image>'), assistant(''), user('')], 'here')


def test_check_targets():
  tokenizer = char_tokenizer()
  check_targets(encode(tokenizer, load_template('chatml'), TWO_TURNS), 'sample 7')
  with pytest.raises(DataError) as error:
    check_targets(encode(tokenizer, load_template('vicuna_v1'), [user('Q')], system=''), 'sample 7')
  assert str(error.value) == 'E_NO_TARGET: sample 7: expected at least one assistant token; found none in 8 tokens'


def test_templates_are_compiled_once():
  assert load_template('chatml') is load_template('chatml')


def test_template_from_a_file(tmp_path):
  path = tmp_path / 'mine.jinja'
  path.write_text(
    '{{ bos_token }}'
    '{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}|{% endfor %}'
  )
  assert render(load_template(path), [user('Q'), assistant('A')]) == ('<s>Q</s>|A</s>|', [(3, 8), (9, 14)])


def test_template_errors(tmp_path):
  with pytest.raises(ConfigError) as error:
    load_template('vicuna')
  assert str(error.value) == (
    'template: expected one of chatml, llama_3_1, plain, qa, vicuna_v1 or a file; '
    "found 'vicuna'; did you mean 'vicuna_v1'?"
  )
  path = tmp_path / 'bad.jinja'
  path.write_text('one\n{% generation %}two')
  with pytest.raises(ConfigError, match=r'^template bad\.jinja:2: Unexpected end of template'):
    load_template(path)


@pytest.mark.parametrize(
  ('source', 'error'),
  [
    ("{{ ''.__class__.__mro__ }}", jinja2.sandbox.SecurityError),
    ('{{ messages.append(1) }}', jinja2.sandbox.SecurityError),
    ('{{ mesages }}', jinja2.UndefinedError),
  ],
)
def test_templates_run_in_a_sandbox(tmp_path, source, error):
  path = tmp_path / 'evil.jinja'
  path.write_text(source)
  with pytest.raises(ConfigError, match='^template: cannot render sample 7: ') as caught:
    render(load_template(path), [user('Q')], where='sample 7')
  assert isinstance(caught.value.__cause__, error)


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

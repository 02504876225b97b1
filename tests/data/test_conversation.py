"""Expected strings, ids and masks are written by hand; the tokenizers are built here, so nothing is downloaded."""

from __future__ import annotations

import json

import numpy as np
import pytest
from built_tokenizers import (
  IMAGE,
  LLAMA_SYSTEM,
  TWO_TURNS,
  VICUNA_SYSTEM,
  assert_encoded,
  assistant,
  byte_level_tokenizer,
  char_tokenizer,
  spell,
  system_turn,
  user,
)
from golden_cases import GOLDEN

from llava_mini_jax.data.conversation import (
  TEMPLATES,
  encode,
  load_template,
  render,
  tokenize,
)

CASES = json.loads((GOLDEN / 'preprocess' / 'tokenizer_image_token.json').read_text())['cases']
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

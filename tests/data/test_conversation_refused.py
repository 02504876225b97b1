"""What a conversation or a template must not be: special tokens typed, turns out of order, code."""

from __future__ import annotations

import re

import jinja2
import pytest
from built_tokenizers import (
  IMAGE,
  TWO_TURNS,
  assert_encoded,
  assistant,
  char_tokenizer,
  space_tokenizer,
  spell,
  system_turn,
  user,
)

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.conversation import (
  TEMPLATES,
  check_targets,
  check_turns,
  encode,
  load_template,
  render,
  turns_from_llava,
)
from llava_mini_jax.data.errors import DataError


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

"""The launch scripts as their user meets them: what a mistake is told, in one line and without a traceback; a chat."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import COLORS, QUESTIONS, REPOSITORY, SAVE_EVERY, STEPS, command, make_dataset, picture, sample, trained

from llava_mini_jax.data import records
from llava_mini_jax.infer.chat import HELP
from llava_mini_jax.recipes import STAGES
from llava_mini_jax.train.lock import LOCK_NAME

SCRIPTS = (
  'train',
  'evaluate',
  'chat',
  'prepare_data',
  'convert',
  'benchmark',
  'compile_tpu',
  'preflight_table',
  'sweep',
  'serve',
)

TRAIN = '--config=tests/tiny_run.py:{data}', '--workdir={tmp}/run'
EVALUATE = '--workdir={run}', '--dataset={data}'
KEPT = [STEPS - 2 * SAVE_EVERY, STEPS - SAVE_EVERY, STEPS]

# name: script, arguments, the last line of stderr; or a tuple of what stderr mentions. {data}, {run} and {tmp} are
# the dataset, the trained run and an empty directory.
MISTAKES = {
  'unknown field': ('train', [*TRAIN, '--config.train.batchsize=3'], ('Did you mean "batch_size" instead of',)),
  'unknown nested field': (
    'train',
    [*TRAIN, '--config.model.decoder.hiden_size=3'],
    ('Did you mean "hidden_size" instead of "hiden_size"',),
  ),
  'unknown section': ('train', [*TRAIN, '--config.modle.dtype=x'], ('Did you mean "model" instead of "modle"',)),
  'unknown flag': ('train', [*TRAIN, '--workdri=x'], ("Unknown command line flag 'workdri'",)),
  'no workdir': ('train', TRAIN[:1], ('--workdir',)),
  'no config file': ('train', ['--config=configs/none.py', TRAIN[1]], 'error: --config: no such file: configs/none.py'),
  'unknown config argument': (
    'train',
    ['--config=configs/llava_mini_vicuna_7b.py:stage3', TRAIN[1]],
    (f"stage: expected one of {', '.join(STAGES)}; found 'stage3'",),
  ),
  'bad config argument': (
    'train',
    ['--config=configs/tiny_easy_vqa.py:epochs=x', TRAIN[1]],
    ("could not convert string to float: 'x'",),
  ),
  'bad value': ('train', [*TRAIN, '--config.train.batch_size=many'], ("'many'", 'batch_size')),
  'value out of range': (
    'train',
    [*TRAIN, '--config.train.batch_size=0'],
    'error: TrainConfig.batch_size: expected a positive integer; found 0',
  ),
  'not a number': ('train', [*TRAIN, '--config.train.epochs=nan'], 'error: train.epochs: expected float; found nan'),
  'unexpected argument': ('train', [*TRAIN, 'more', 'words'], 'error: unexpected argument(s): more words'),
  'no dataset': (
    'train',
    [*TRAIN, '--config.data.dataset={tmp}/none'],
    'error: E_NO_DATASET: {tmp}/none: no such directory; prepare it with launch/prepare_data.py',
  ),
  'no split': (
    'train',
    [*TRAIN, '--config.data.split=val'],
    "error: E_NO_SPLIT: {data}: expected one of train; found 'val'",
  ),
  'no tokenizer': (
    'train',
    [*TRAIN, '--config.data.tokenizer={tmp}/none'],
    'error: E_NO_TOKENIZER: {tmp}/none: no such directory',
  ),
  'no template': (
    'train',
    [*TRAIN, '--config.data.template=vicuna'],
    'error: template: expected one of chatml, llama_3_1, plain, qa, vicuna_v1 or a file; '
    "found 'vicuna'; did you mean 'vicuna_v1'?",
  ),
  'mesh of other devices': (
    'train',
    [*TRAIN, '--config.train.mesh=(3,1,1)'],
    'error: mesh 3 × 1 × 1 does not cover 1 device(s)',
  ),
  'mesh of two axes': (
    'train',
    [*TRAIN, '--config.train.mesh=(1,1)'],
    'error: mesh: expected sizes of data × fsdp × tensor, one of which may be -1; found (1, 1)',
  ),
  'mesh of words': ('train', [*TRAIN, "--config.train.mesh=(1,'all',1)"], ('mesh', "'all'")),
  'vocabulary too small': (
    'train',
    [*TRAIN, '--config.model.decoder.vocab_size=64'],
    ('error: decoder.vocab_size=64 cannot hold the ', ' tokens of the tokenizer'),
  ),
  'parameters of no group': (
    'train',
    [*TRAIN, '--config.train.groups=(("decoder/.*",1.0),)'],
    ('error: groups: parameter compressor/', "is matched by no pattern of ['decoder/.*']"),
  ),
  'group pattern that is none': ('train', [*TRAIN, '--config.train.groups=(("(",1.0),)'], ('error: groups', "'('")),
  'corrupt image in the dataset': (
    'train',
    [*TRAIN, '--config.data.dataset={tmp}/corrupt', '--config.data.tokenizer={data}/tokenizer'],
    (  # all of its records are bad; which comes first is up to the shuffle
      'error: E_IMG_FORMAT: {tmp}/corrupt: record ',
      " of split train: sample 'bad': image 0: expected JPEG, PNG, WEBP, GIF, BMP; found 8 bytes starting b'no image'",
    ),
  ),
  'another model in the workdir': (
    'train',
    [TRAIN[0], '--workdir={tmp}/copy', '--config.model.vision.intermediate_size=48'],
    (
      'error: {tmp}/copy/checkpoints: its run differs from this one; use another --workdir:',
      '  config.model.vision.intermediate_size: was 32, is 48',
    ),
  ),
  'another length in the workdir': (
    'train',
    [TRAIN[0], '--workdir={tmp}/copy', '--config.train.max_steps=127'],
    ('  total_steps: was 128, is 127', '  config.train.max_steps: was 128, is 127'),
  ),
  'workdir that is a file': ('train', [TRAIN[0], '--workdir={data}/summary.json'], ('{data}/summary.json',)),
  'evaluate: no run': (
    'evaluate',
    ['--workdir={tmp}/none', EVALUATE[1]],
    'error: no checkpoint: {tmp}/none/checkpoints is not a directory',
  ),
  'evaluate: no such step': (
    'evaluate',
    [*EVALUATE, '--step=5'],
    f'error: no checkpoint of step 5 in {{run}}/checkpoints (steps there: {KEPT})',
  ),
  'evaluate: no dataset': (
    'evaluate',
    [EVALUATE[0], '--dataset={tmp}'],
    'error: E_NO_DATASET: {tmp}: not a prepared dataset (no dataset_info.json); see launch/prepare_data.py',
  ),
  'evaluate: no split': ('evaluate', EVALUATE, "error: E_NO_SPLIT: {data}: expected one of train; found 'test'"),
  'evaluate: unknown images': ('evaluate', [*EVALUATE, '--images=grey'], ('--images=grey', 'real|blank|swapped')),
  'evaluate: unexpected argument': ('evaluate', [*EVALUATE, 'more'], 'error: unexpected argument(s): more'),
  'chat: no run': (
    'chat',
    ['--checkpoint={tmp}/none', 'color?'],
    'error: no checkpoint: {tmp}/none/checkpoints is not a directory',
  ),
  'chat: no image': (
    'chat',
    ['--checkpoint={run}', '--image={tmp}/none.png', 'color?'],
    ('error: E_IMG_MISSING: {tmp}/none.png: expected a readable file; ',),
  ),
  'chat: corrupt image': (
    'chat',
    ['--checkpoint={run}', '--image={tmp}/corrupt.png', 'color?'],
    ('error: E_IMG_TRUNCATED: {tmp}/corrupt.png: expected a whole image; ',),
  ),
  'chat: directory as image': (
    'chat',
    ['--checkpoint={run}', '--image={tmp}', 'color?'],
    'error: E_IMG_MISSING: {tmp}: expected a file; found a directory, pipe or device',
  ),
  'chat: a tag in the question': (
    'chat',
    ['--checkpoint={run}', 'what <image>?'],
    'error: E_IMAGE_TAGS: question: expected no <image>: the image is shown already; found one',
  ),
  'chat: no answer at all': ('chat', ['--checkpoint={run}', '--max_new_tokens=0', 'color?'], ('--max_new_tokens=0',)),
  'prepare: no source': (
    'prepare_data',
    ['--source={tmp}/none.json', '--out={tmp}/out'],
    'error: E_NO_SOURCE: {tmp}/none.json: cannot be read (No such file or directory)',
  ),
  'prepare: bad images': (
    'prepare_data',
    ['--source={tmp}/bad.json', '--media_root={tmp}', '--out={tmp}/out'],
    (
      'error: E_REFUSED: {tmp}/bad.json: 2 of 2 sample(s) refused, allowed are 0.00% (--max_refused):',
      "  E_IMG_MISSING: {tmp}/bad.json: record 0: sample 'red-0': image 'red.png': ",
      "  E_IMG_TRUNCATED: {tmp}/bad.json: record 1: sample 'red-1': image 'corrupt.png': ",
    ),
  ),
  'prepare: occupied': (
    'prepare_data',
    ['--source={tmp}/bad.json', '--out={data}'],
    'error: E_OUT_EXISTS: {data}: expected a new or empty directory; to replace the dataset in it, use --force',
  ),
}
MISTAKES |= {
  'sweep: no file': ('sweep', ['--workdir={tmp}/sweep'], 'error: sweep: expected one sweep file; found none'),
  'sweep: no such file': ('sweep', ['none.py', '--workdir={tmp}/sweep'], 'error: sweep: no such file: none.py'),
  'sweep: no sweep': (
    'sweep',
    ['configs/tiny_scenes.py', '--workdir={tmp}/sweep'],
    'error: configs/tiny_scenes.py: expected a function get_sweep; found none',
  ),
  'sweep: no dataset': (
    'sweep',
    ['configs/ablations/table6.py', '--workdir={tmp}/sweep', '--dataset={tmp}/none'],
    'error: E_NO_DATASET: {tmp}/none: no such directory; prepare it with launch/prepare_data.py',
  ),
  'sweep: no field': (
    'sweep',
    ['configs/ablations/table6.py', '--workdir={tmp}/sweep', '--set', 'model.dtyp=x'],
    "error: sweep: expected the path of a field; found 'model.dtyp'",
  ),
}
MISTAKES |= {
  'serve: no run': (
    'serve',
    ['--checkpoint={tmp}/none', '--port=0'],
    ('error: ', '{tmp}/none'),
  ),
  'serve: others reach it': (
    'serve',
    ['--checkpoint={tmp}/none', '--host=0.0.0.0', '--port=0'],
    'error: serve: expected a key in --key_file or LLAVA_MINI_KEY where other machines reach the server; '
    'found --host=0.0.0.0 without one',
  ),
  'serve: no key': (
    'serve',
    ['--checkpoint={tmp}/none', '--key_file={tmp}/bad.json/key'],
    ("error: [Errno 20] Not a directory: '{tmp}/bad.json/key'",),
  ),
  'serve: no address': (
    'serve',
    ['--checkpoint={tmp}/none', '--port=70000'],
    ('error: serve: expected an address that is free; found 127.0.0.1:70000: ',),
  ),
  'serve: no slots': ('serve', ['--checkpoint={tmp}/none', '--slots=0'], ('--slots',)),
}
GOOD = {
  'evaluate': (
    'evaluate',
    [*EVALUATE, '--split=train', '--images=real', '--images=swapped', '--batch_size=5', '--out={tmp}/evaluation'],
  ),
  'chat without questions': ('chat', ['--checkpoint={run}']),
}


def commands() -> list[tuple[str, str, tuple[str, ...]]]:
  """(file, script, arguments) of every launch command that a user is told to type."""
  files = [REPOSITORY / 'README.md', *(REPOSITORY / 'configs').rglob('*.py'), *(REPOSITORY / 'launch').iterdir()]
  found = []
  for file in sorted(file for file in files if file.is_file()):
    text = file.read_text().replace('\\\n', ' ')
    for script, rest in re.findall(r'launch/(\w+)\.py ([^`\n]*--[^`\n]*)', text):
      found.append((file.name, script, tuple(shlex.split(rest, comments=True))))
  return found


COMMANDS = {f'{file}: {script} {shlex.join(rest)}': (script, rest) for file, script, rest in commands()}


@pytest.fixture(scope='module')
def places(tmp_path_factory) -> dict[str, str]:
  base, tmp = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp('launch')
  data, run = make_dataset(base), trained(base)
  shutil.copytree(run, tmp / 'copy')
  (tmp / 'corrupt.png').write_bytes(picture('red')[:-40])
  (tmp / 'bad.json').write_text(json.dumps([sample('red', 0), {**sample('red', 1), 'image': 'corrupt.png'}]))
  turns = [{'from': 'human', 'value': '<image>\ncolor?'}, {'from': 'gpt', 'value': 'red'}]
  bad = {'id': 'bad', 'category': '', 'media': [b'no image'], 'conversations': turns}
  records.write(tmp / 'corrupt', {'train': [bad] * 8}, description='for tests')
  return dict(data=str(data), run=str(run), tmp=str(tmp))


@pytest.fixture(scope='module')
def results(places, tmp_path_factory) -> dict[str, dict]:
  """What came of every command, by name."""
  cases = {
    name: dict(script=script, arguments=[argument.format(**places) for argument in arguments], parse=False)
    for name, (script, arguments, *_) in (MISTAKES | GOOD).items()
  }
  cases |= {name: dict(script=script, arguments=rest, parse=True) for name, (script, rest) in COMMANDS.items()}
  file = tmp_path_factory.mktemp('cases') / 'cases.json'
  file.write_text(json.dumps(list(cases.values())))
  found = file.with_name('results.json')
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'tests')]),
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  program = [sys.executable, 'tests/launcher.py', str(file), str(found)]
  done = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return dict(zip(cases, json.loads(found.read_text()), strict=True))


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(results, places, name):
  result, expected = results[name], MISTAKES[name][2]
  output = result['stdout'] + result['stderr']
  assert result['status'] == 1, output
  assert 'Traceback' not in output, output
  if isinstance(expected, str):
    assert result['stderr'].splitlines()[-1] == expected.format(**places)
  else:
    for part in expected:
      assert part.format(**places) in result['stderr']


@pytest.mark.parametrize('name', ['unknown field', 'unknown nested field', 'unknown section', 'no config file'])
def test_one_line_for_a_mistake_in_the_config(results, name):
  """Without the escapes and quotes of an exception within an exception."""
  (line,) = results[name]['stderr'].splitlines()
  assert line.startswith('error: ') and '\\' not in line, line
  assert line.count("'") % 2 == 0 and line.count('"') % 2 == 0, line


def test_mistakes_leave_nothing_behind(results, places):
  """What was refused has made no dataset, and changed neither the run nor its copy."""
  tmp, run = Path(places['tmp']), Path(places['run'])
  assert not (tmp / 'out').exists()
  files = [path.relative_to(run) for path in run.rglob('*') if path.is_file()]
  files.remove(Path(LOCK_NAME))  # which names its last holder
  assert files
  assert all((tmp / 'copy' / path).read_bytes() == (run / path).read_bytes() for path in files)
  assert not (run / 'evaluation').exists()


def test_evaluate(results, places):
  result = results['evaluate']
  assert result['status'] == 0, result['stderr']
  out = Path(places['tmp']) / 'evaluation'
  assert result['stdout'].splitlines() == [
    'real     images   exact match 100.00% of 12 questions',
    '  long                 100.00% of 6',
    '  short                100.00% of 6',
    'swapped  images   exact match   0.00% of 12 questions',
    '  long                   0.00% of 6',
    '  short                  0.00% of 6',
    f'answers and contact sheet: {out}',
  ]
  kinds = ('real', 'swapped')
  expected = [f'answers_{kind}.json' for kind in kinds] + [f'contact_sheet_{kind}.png' for kind in kinds]
  assert sorted(path.name for path in out.iterdir()) == expected


def test_a_chat_ends_with_its_input(results):
  assert results['chat without questions'] == {'status': 0, 'stdout': f'{HELP}\n> \n', 'stderr': ''}


def chat(places, *arguments: str, lines: list[str] | None = None) -> subprocess.Popen:
  process = command('chat', f'--checkpoint={places["run"]}', *arguments, stdin=subprocess.PIPE)
  process.stdin.write(''.join(f'{line}\n' for line in lines or []))
  process.stdin.flush()
  return process


@pytest.fixture(scope='module')
def images(places) -> dict[str, Path]:
  return {color: Path(places['data']).parent / f'{color}.png' for color in COLORS}


@pytest.fixture(scope='module')
def chats(places, images, results):
  """Both at the same time: one question, and a conversation."""
  missing = Path(places['tmp']) / 'none.png'
  lines = {  # what is typed -> what is said
    'color?': 'green\n',
    f'/image {images["blue"]}': '',
    QUESTIONS[1]: 'blue\n',
    f'/image {missing}': f'error: E_IMG_MISSING: {missing}: expected a readable file; '
    f"[Errno 2] No such file or directory: '{missing}'\n",
    '/new': '',
    'color? ': 'blue\n',
    'what <image>?': 'error: E_IMAGE_TAGS: question: expected no <image>: the image is shown already; found one\n',
    '': '',
    'not read': None,
  }
  one = chat(places, f'--image={images["red"]}', *QUESTIONS[1].split())
  loop = chat(places, f'--image={images["green"]}', lines=list(lines))
  said = [reply for reply in lines.values() if reply is not None]
  return [(*process.communicate(), process.returncode) for process in (one, loop)], said


def test_one_question(chats):
  """The answer alone on stdout."""
  assert chats[0][0] == ('red\n', '', 0)


def test_a_conversation(chats):
  """Another image, starting over, mistakes that are named and passed over, and an empty line at the end."""
  (stdout, stderr, status), said = chats[0][1], chats[1]
  assert stdout.removeprefix(f'{HELP}\n').split('> ')[1:] == said
  assert (stdout.startswith(HELP), stderr, status) == (True, '', 0)


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_that_the_user_is_told_to_type(results, name):
  """Their flags exist, have such values, and the config's fields are there."""
  assert results[name] == {'status': 0, 'stdout': '', 'stderr': ''}


def test_every_script_has_its_commands():
  assert {script for script, _ in COMMANDS.values()} == set(SCRIPTS)
  assert {name.split(':')[0] for name in COMMANDS} >= {'README.md', 'quickstart.sh', 'tiny_easy_vqa.py', 'train.py'}


def test_fields_that_are_named_exist():
  """`--config.section.field` in the documents."""
  from llava_mini_jax.config import LlavaMiniConfig
  from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

  values = Experiment(LlavaMiniConfig.preset('tiny'), DataConfig(), TrainConfig()).to_dict()
  files = [*REPOSITORY.glob('*.md'), *REPOSITORY.glob('docs/*.md'), *REPOSITORY.glob('configs/*.py')]
  named = {path for file in files for path in re.findall(r'--config\.([a-z_.]*[a-z])', file.read_text())}
  assert {'train.batch_size'} <= named
  for path in named - {'section.field'}:
    functools.reduce(lambda part, key: part[key], path.split('.'), values)  # KeyError: no such field


@pytest.mark.parametrize('script', sorted((REPOSITORY / 'launch').glob('*.sh')), ids=lambda path: path.name)
def test_shell_scripts(script):
  done = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert os.access(script, os.X_OK)
  assert 'set -euo pipefail' in script.read_text()

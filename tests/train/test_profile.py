"""Traces of the steps that are asked for, logs of each process, compiled programs that are kept: seen from outside."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import experiment, make_dataset

from llava_mini_jax import compile_cache
from llava_mini_jax.config import ConfigError
from llava_mini_jax.train.loop import train
from llava_mini_jax.train.metrics import LOG_NAME
from llava_mini_jax.train.profile import STEP_NAME, StepProfile, parse_steps
from llava_mini_jax.train.run_log import run_log

pytestmark = pytest.mark.usefixtures('quick_compilation')
STEPS = 8
TIMED = {'steps_per_second', 'tokens_per_second', 'images_per_second', 'mfu'}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Path:
  return make_dataset(tmp_path_factory.getbasetemp())


def run(dataset: Path, workdir: Path, **options) -> list[dict]:
  """The metrics of every step that no clock decides."""
  train(experiment(dataset, mesh=(-1, 1, 1), max_steps=STEPS), workdir, **options)
  rows = [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


@pytest.fixture(scope='module')
def profiled(dataset, tmp_path_factory) -> tuple[Path, list[dict]]:
  workdir = tmp_path_factory.mktemp('profiled')
  return workdir, run(dataset, workdir, profile_steps=range(3, 6))


def test_the_steps_that_are_asked_for(profiled):
  """The trace has their names and numbers, and the compiled step; the one before and the one after are not in it."""
  (file,) = (profiled[0] / 'profile').glob('plugins/profile/*/*.xplane.pb')
  planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
  events = [event for plane in planes for line in plane.lines for event in line.events]
  found = [dict(event.stats).get('step_num') for event in events if event.name == STEP_NAME]
  assert found == [3, 4, 5]
  assert any('jit_step' in event.name or 'PjitFunction(step)' in event.name for event in events)


@pytest.mark.slow
def test_a_profile_changes_no_number(profiled, dataset, tmp_path):
  assert run(dataset, tmp_path / 'run') == profiled[1]


@pytest.mark.parametrize('text', ['10', '5:5', '6:5', '0:5', '-1:5', 'a:b', '1:2:3', '1:'])
def test_steps_that_are_none(text):
  with pytest.raises(ConfigError, match=f'profile_steps: expected FIRST:END with 1 <= FIRST < END; found {text!r}'):
    parse_steps(text)


def test_steps(tmp_path):
  assert parse_steps('10:15') == range(10, 15)
  assert parse_steps('') is None
  StepProfile(tmp_path, range(5, 9), start=4, total=8)
  with pytest.raises(ConfigError) as caught:
    StepProfile(tmp_path, range(8, 10), start=4, total=8)
  assert str(caught.value) == 'profile_steps: expected some of steps 1 to 8; found 8:10'


def test_the_same_command_resumes(tmp_path):
  """What was traced before a resume is not traced again, nor missed."""
  profile = StepProfile(tmp_path, range(2, 4), start=4, total=8)
  with profile.step(5):
    profile.done(5, None)
  assert not (tmp_path / 'profile').exists()


def test_the_log_of_a_process(tmp_path, capfd):
  """What the package logs and what others warn of; not on the screen; and the traceback of what ended the run."""
  package, other = logging.getLogger('llava_mini_jax.some'), logging.getLogger('other')
  with pytest.raises(ZeroDivisionError), run_log(tmp_path):
    package.info('an event')
    other.info('not this')
    other.warning('a warning')
    1 / 0  # noqa: B018
  package.warning('afterwards')
  text = (tmp_path / 'logs' / 'process_0.log').read_text()
  assert re.search(r'^\S+ \S+ INFO llava_mini_jax: process 0 of 1 on .*: jax ', text)
  assert 'INFO llava_mini_jax.some: an event\n' in text and 'WARNING other: a warning\n' in text
  assert 'not this' not in text and 'afterwards' not in text
  assert text.rstrip().endswith('ZeroDivisionError: division by zero')
  assert 'an event' not in capfd.readouterr().err


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The cache on, in a directory of its own; as it was, afterwards."""
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()  # what has compiled without one looks for none
  yield compile_cache.use_compilation_cache()
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  jax.clear_caches()


@pytest.mark.slow
def test_programs_that_were_kept_compute_the_same(cache, dataset, tmp_path):
  """To the bit: compiled, compiled and kept, read back."""
  assert cache.parent == tmp_path / 'cache' / 'llava_mini_jax'
  jax.clear_caches()
  kept = run(dataset, tmp_path / 'kept')
  programs = {path.name for path in cache.iterdir() if path.name.endswith('-cache')}
  assert any('jit_step' in name for name in programs)
  jax.clear_caches()
  hits = []
  jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
  assert run(dataset, tmp_path / 'read') == kept
  assert '/jax/compilation_cache/cache_hits' in hits
  assert {path.name for path in cache.iterdir() if path.name.endswith('-cache')} == programs
  shutil.rmtree(cache)
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  jax.clear_caches()
  assert run(dataset, tmp_path / 'plain') == kept
  assert not cache.exists()


def test_where_programs_are_kept(tmp_path, monkeypatch):
  """A kind of CPU has its own; a directory that the user names is taken as it is."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  found = []
  for flags in ('avx avx2', 'avx avx2 avx512f'):
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text(f'processor : 0\nmodel name : some\ncpu MHz : {len(found)}\nflags : {flags}\n\nprocessor : 1\n')
    found.append(compile_cache.default_directory(cpuinfo))
  cpuinfo.write_text(cpuinfo.read_text().replace('cpu MHz : 1', 'cpu MHz : 2'))
  assert compile_cache.default_directory(cpuinfo) == found[1] != found[0]
  assert {path.parent for path in found} == {tmp_path / 'llava_mini_jax'}
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  assert compile_cache.use_compilation_cache() == tmp_path / 'mine'
  jax.config.update('jax_compilation_cache_dir', before)

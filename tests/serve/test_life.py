"""What outlives one request: slots after a client has left, an engine that fails, a server that is told to end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serving import PATH, chat, data_uri, send, served, shows, wait
from tiny_run import COLORS, QUESTIONS, REPOSITORY, command, picture, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.run import KEY_VARIABLE, announce, host_names, listen, read_key

pytestmark = pytest.mark.usefixtures('quick_compilation')


@contextlib.contextmanager
def slow_steps(engine, seconds=0.05):
  before = engine.core.programs.step

  def slow(*arguments):
    time.sleep(seconds)
    return before(*arguments)

  engine.core.programs.step = slow
  try:
    yield
  finally:
    engine.core.programs.step = before


@pytest.mark.parametrize('stream', [False, True], ids=['whole', 'streamed'])
def test_a_client_that_leaves_frees_its_slot(server, engine, stream):
  """Four are answered and one waits; all leave long before the 100 tokens are said."""
  with slow_steps(engine):
    connections = [send(server, max_tokens=100, stream=stream) for _ in range(5)]
    wait(lambda: engine.core.active == 4 and engine.core.waiting == 1)
    connections.pop().close()
    wait(lambda: engine.core.waiting + engine.core.active == 4)
    began = time.monotonic()
    for connection in connections:
      connection.close()
    wait(lambda: engine.core.active == engine.core.waiting == server.service.worker.places.taken == 0)
    assert time.monotonic() - began < 2
  assert server.ask().is_success


def test_a_client_that_leaves_while_its_prompt_is_prepared(server, engine, monkeypatch):
  """Its place is taken until the thread that works for it has ended; what comes of that is nobody's."""
  began, goes_on = threading.Event(), threading.Event()
  look, laid = engine.core.look, []

  def waiting(*arguments):
    began.set()
    goes_on.wait(30)
    return look(*arguments)

  lay = engine.lay
  monkeypatch.setattr(engine.core, 'look', waiting)
  monkeypatch.setattr(engine, 'lay', lambda request: laid.append(lay(request)) or laid[-1])
  connection = send(server, content=shows(data_uri(picture('red', (5, 7)))), max_tokens=100)
  began.wait(30)
  assert server.service.worker.places.taken == 1
  connection.close()
  time.sleep(0.2)
  assert server.service.worker.places.taken == 1
  goes_on.set()
  wait(lambda: server.service.worker.places.taken == 0)
  assert not laid and engine.core.active == 0


def test_an_engine_that_fails(engine, caplog):
  """Who waits is told 500 without a reason, who comes later 503; the log has the reason."""
  with served(engine) as server:
    before = engine.core.programs.step

    def fails(*arguments):
      raise ValueError('secret of the devices')

    with slow_steps(engine), server.http.stream('POST', PATH, json=chat(max_tokens=60, stream=True)) as streamed:
      wait(lambda: engine.core.active == 1)
      engine.core.programs.step = fails
      whole = server.ask()
      events = streamed.read().decode().strip().split('\n\n')
    engine.core.programs.step = before
    message = 'the engine failed; the server must be started again'
    assert (whole.status_code, whole.json()['error']['message']) == (500, message)
    assert json.loads(events[-1].removeprefix('data: '))['error']['message'] == message
    later, health = server.ask(), server.http.get('/health')
    assert (later.status_code, health.status_code, health.json()) == (503, 503, dict(status='failed'))
    assert 'secret' not in whole.text + ''.join(events) + later.text
    assert 'secret of the devices' in caplog.text
    assert not engine.step() and engine.core.active == 0  # whoever was told so has left


def test_a_request_that_fails_alone(server, engine, monkeypatch, caplog):
  """A fault that is not of the client is told as 500, and the next request is served."""

  def fails(*arguments, **options):
    raise RuntimeError('secret of the host')

  with monkeypatch.context() as patch:
    patch.setattr(engine.core, 'look', fails)
    failed = server.ask(content=shows(data_uri(picture('green', (3, 5)))))
  assert failed.status_code == 500 and 'secret' not in failed.text and 'secret of the host' in caplog.text
  assert failed.json()['error']['message'] == 'the server failed; its log says why'
  assert server.ask(content=shows(data_uri(picture('green', (3, 5))))).is_success


@pytest.mark.parametrize('stream', [False, True], ids=['whole', 'streamed'])
def test_a_prompt_that_cannot_be_put_into_a_slot(server, engine, monkeypatch, caplog, stream):
  """It ends alone: an answer that is on its way is finished, and the next request is served."""
  before = engine.core.programs.prefill

  def fails(*arguments):
    raise RuntimeError('secret of the devices')

  with slow_steps(engine), server.http.stream('POST', PATH, json=chat(max_tokens=20, stream=True)) as other:
    wait(lambda: engine.core.active == 1)
    monkeypatch.setattr(engine.core.programs, 'prefill', fails)
    failed = server.ask(stream=stream)
    monkeypatch.setattr(engine.core.programs, 'prefill', before)
    assert other.read().endswith(b'data: [DONE]\n\n')
  error = json.loads(failed.text.strip().split('\n\n')[-1].removeprefix('data: '))['error']
  assert (failed.status_code, error['message']) == (200 if stream else 500, 'the server failed; its log says why')
  assert 'secret of the devices' in caplog.text and 'secret' not in failed.text
  assert server.ask().is_success and server.http.get('/health').is_success


def test_a_prompt_that_fails_at_once(server, engine, monkeypatch, caplog):
  """Before the thread that brought it goes on: others are answered all the same."""
  before, add = engine.core.programs.prefill, engine.core.add

  def slow_return(*arguments):
    add(*arguments)
    time.sleep(0.2)

  def fails(*arguments):
    raise RuntimeError('secret of the devices')

  with monkeypatch.context() as patch:
    patch.setattr(engine.core, 'add', slow_return)
    patch.setattr(engine.core.programs, 'prefill', fails)
    failed = server.ask()
  assert engine.core.programs.prefill is before
  assert (failed.status_code, failed.json()['error']['message']) == (500, 'the server failed; its log says why')
  assert server.ask().is_success and not server.service.worker.failed
  wait(lambda: server.service.worker.places.taken == 0)


def test_neighbours_of_a_prompt_that_fails_are_answered(server, engine, monkeypatch, caplog):
  texts, told = ('aa', 'bb', 'cc'), {}
  prefill = engine.core._prefill

  def fails(group, *arguments):
    if any('aa' in engine.run.tokenizer.decode(work.laid.tokens) for work in group):
      raise RuntimeError('one of them')
    prefill(group, *arguments)

  monkeypatch.setattr(engine.core, '_prefill', fails)

  def ask(text):
    told[text] = server.ask(content=text).status_code

  with slow_steps(engine, 0.3):
    first = send(server, content='other', max_tokens=3)
    wait(lambda: engine.core.active == 1)
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
  first.close()
  assert told == dict(aa=500, bb=200, cc=200) and not server.service.worker.failed


def test_a_server_that_is_told_to_end_does_not_wait_for_threads(engine, monkeypatch):
  """One that cannot be stopped looks at an image, and its client is still there."""
  goes_on, began, look = threading.Event(), threading.Event(), engine.core.look
  monkeypatch.setattr(engine.core, 'look', lambda keep: (began.set(), goes_on.wait(60), look(keep))[2])
  limits = Limits(drain_seconds=1)
  try:
    with served(engine, limits=limits) as server:
      connection = send(server, content=shows(data_uri(picture('blue', (4, 9)))))
      began.wait(30)
      ended = time.monotonic()
    assert time.monotonic() - ended < limits.drain_seconds + 10
    assert server.service.working and connection.recv(12) in (b'', b'HTTP/1.1 500')
  finally:
    goes_on.set()
  wait(lambda: not server.service.working)


ENDS = """
import os, signal, sys, threading, time, types
import uvicorn
from llava_mini_jax.serve import run
from llava_mini_jax.serve.limits import Limits

worker = types.SimpleNamespace(places=types.SimpleNamespace(most=1))
class App:
  state = types.SimpleNamespace(service=types.SimpleNamespace(worker=worker, working=True))
  async def __call__(self, scope, receive, send):
    await receive()
    await send(dict(type='lifespan.startup.complete'))
    await receive()
    await send(dict(type='lifespan.shutdown.complete'))
threading.Thread(target=time.sleep, args=(60,)).start()  # work that Python would wait for
serve = uvicorn.Server.serve
async def told(self, sockets):  # before uvicorn listens for signals
  os.kill(os.getpid(), signal.SIGTERM)
  await serve(self, sockets)
uvicorn.Server.serve = told
bound = run.listen('127.0.0.1', 0)
run.announce(bound, 'x')
print('ends', flush=True)
run.serve(App(), bound, Limits(drain_seconds=1))
"""


def test_a_signal_before_the_server_listens_for_it_ends_it():
  """And so does the process, whatever threads do."""
  process = subprocess.Popen([sys.executable, '-c', ENDS], cwd=REPOSITORY, stdout=subprocess.PIPE)
  assert process.stdout.readline() == b'ends\n'
  assert process.wait(15) == 0


def test_clients_can_connect_once_it_says_so():
  bound = listen('127.0.0.1', 0)
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(bound.getsockname(), timeout=5)
  assert announce(bound, 'x') == f'serving x at http://127.0.0.1:{bound.getsockname()[1]}'
  socket.create_connection(bound.getsockname(), timeout=5).close()
  bound.close()


def test_where_a_key_comes_from(tmp_path, monkeypatch):
  monkeypatch.delenv(KEY_VARIABLE, raising=False)
  assert read_key(None) == ''
  monkeypatch.setenv(KEY_VARIABLE, 'of the environment\n')
  assert read_key(None) == 'of the environment'
  file = tmp_path / 'key'
  file.write_text('of the file\n')
  assert read_key(str(file)) == 'of the file'
  file.write_text('\n')
  with pytest.raises(ConfigError, match='key_file: expected a key in .*; found none'):
    read_key(str(file))
  file.write_text('schl\u00fcssel', encoding='utf-8')
  with pytest.raises(ConfigError, match='key: expected printable ASCII in .*key; found something else'):
    read_key(str(file))


def test_who_may_be_asked_without_a_key():
  for host in ('127.0.0.1', 'localhost', '::1', '127.8.0.2'):
    assert set(host_names(host, '')) == {'127.0.0.1', 'localhost', '::1', host}
  for host in ('0.0.0.0', '::', '10.1.2.3', 'example.org', ''):
    told = (
      f'serve: expected a key in --key_file or LLAVA_MINI_KEY where .* reach the server; found --host={host} without'
    )
    with pytest.raises(ConfigError, match=told):
      host_names(host, '')
    assert host_names(host, 'key') == ()
  assert '0.0.0.0' in host_names('0.0.0.0', 'key', ['my.site'])


@pytest.fixture(scope='module')
def process(tmp_path_factory):
  """launch/serve.py on a trained run: the process, and its address."""
  base = tmp_path_factory.getbasetemp()
  process = command(
    'serve', f'--checkpoint={trained(base)}', '--port=0', '--max_length=128', '--slots=2', '--name=tiny', '--nowarm_up'
  )
  line = process.stdout.readline()
  yield process, line.rpartition(' ')[2].strip(), line
  process.kill()
  process.communicate()


def test_the_trained_model_says_colours(process):
  _, url, line = process
  assert re.fullmatch(r'serving tiny at http://127\.0\.0\.1:\d+\n', line)
  with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
    for color in COLORS:
      content = shows(data_uri(picture(color)), text=QUESTIONS[0])
      answer = client.post(PATH, json=chat(content)).json()
      assert answer['choices'][0]['message']['content'] == color


def test_sigterm_drains(process):
  """An open answer is finished, a new connection is refused, the process ends with 0 and says nothing."""
  process, url, _ = process
  with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
    body = chat(shows(data_uri(picture('blue'))), stream=True, max_tokens=60)
    with client.stream('POST', PATH, json=body) as answer:
      process.send_signal(signal.SIGTERM)
      text = answer.read().decode()
    assert text.endswith('data: [DONE]\n\n') and '"finish_reason": "' in text
  assert process.wait(60) == 0
  with pytest.raises(httpx.ConnectError):
    httpx.get(url + '/health', trust_env=False)
  assert process.stderr.read() == '' == process.stdout.read()

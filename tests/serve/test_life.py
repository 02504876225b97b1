"""What outlives one request: slots after a client has left, an engine that fails, a server that is told to end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time

import httpx
import pytest
from serving import PATH, chat, data_uri, send, served, shows, wait
from tiny_run import COLORS, QUESTIONS, command, picture, trained

from llava_mini_jax.config import ConfigError
from llava_mini_jax.serve.run import KEY_VARIABLE, read_key

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

"""What one client may cost the others: bodies, media, threads, places and connections are all bounded."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
import types

import numpy as np
import pytest
import uvicorn
from asking import images
from serving import NAME, PATH, chat, data_uri, png, send, served, shows, wait
from video_clips import clip

from llava_mini_jax.data.video import Bounds, FrameSampler, read_frames
from llava_mini_jax.serve import app as app_module
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.media import Files, Looker
from llava_mini_jax.serve.refusal import Refused
from llava_mini_jax.serve.replies import Reply
from llava_mini_jax.serve.run import announce, config, listen
from llava_mini_jax.serve.schema import MAX_FIELDS, ChatRequest, parse
from llava_mini_jax.serve.threads import Left
from llava_mini_jax.serve.watch import Watch

pytestmark = pytest.mark.usefixtures('quick_compilation')
MANY = {str(i): i for i in range(10_000)}


def image(number: int) -> str:
  """Of its own, which nobody has looked at."""
  return data_uri(png(np.full((9, 9 + number, 3), number, np.uint8)))


@pytest.mark.parametrize(
  'fields',
  [
    dict(messages=[{}] * 900),
    dict(messages=[dict(role='user', content=[{}] * 200)]),
    dict(messages=[dict(role='user', content='a')] * 2000),
    dict(messages=[dict(role='user', content=[dict(type='text', text='a')] * 1000)]),
    dict(stop=[1] * 10_000),
    dict(metadata=MANY),
    dict(stream_options=MANY),
    dict(messages=[dict(role='user', content='a', **MANY)]),
    MANY,
  ],
)
def test_a_body_of_many_mistakes_is_told_the_first(fields):
  with pytest.raises(Refused) as caught:
    parse(ChatRequest, json.dumps(dict(chat(), **fields)).encode())
  assert caught.value.status == 422 and caught.value.__context__.error_count() <= MAX_FIELDS


def test_a_body_of_too_many_parts_is_not_parsed():
  with pytest.raises(Refused, match='body: expected at most 524288 brackets and commas; found 600003') as caught:
    parse(ChatRequest, b'{"messages": [' + b'{},' * 300_000 + b'{}]}')
  assert caught.value.status == 400
  text = dict(chat(), messages=[dict(role='user', content=',[{' * 40_000)])  # as much text as a request may have
  assert parse(ChatRequest, json.dumps(text).encode()).messages


def test_what_takes_long_is_done_in_threads(server, monkeypatch):
  done = {}

  def told(name, function):
    def run(*arguments):
      done[name] = threading.current_thread().name
      return function(*arguments)

    return run

  monkeypatch.setattr(app_module, 'parse', told('parse', parse))
  for name in ('read', 'add'):
    monkeypatch.setattr(Files, name, told(name, getattr(Files, name)))
  assert server.http.post('/v1/files', files=dict(file=('a', b'x'))).is_success
  assert server.ask(content=shows(image(1))).is_success
  assert done == dict(parse='short', read='prepare', add='short')
  assert server.http.post('/v1/compressor', json=dict(url=image(1))).is_success
  assert done == dict(parse='heat', read='heat', add='short')


@pytest.mark.parametrize(
  ('limits', 'says'),
  [
    (dict(decoded_pixels=64 * 48 * 10), 'expected at most 30720 pixels in all frames; found more'),
    (dict(decode_seconds=0.001), 'expected media that are decoded within 0.001 s; found more'),
    (dict(video_pixels=64 * 48 - 1), 'expected at most 3071 pixels a frame; found 64x48'),
  ],
)
def test_a_video_has_a_budget(engine, limits, says):
  """Of what is decoded: 48 frames here, of which two are seen."""
  content = shows(data_uri(clip('mp4', 48), 'video/mp4'), video=True)
  with served(engine, limits=Limits(**limits)) as server:
    told = server.ask(content=content)
    assert (told.status_code, told.json()['error']['message']) == (422, f'messages.0.content.0.video_url.url: {says}')
  with served(engine, limits=Limits(decoded_pixels=64 * 48 * 48)) as server:
    assert server.ask(content=content).is_success


def test_a_budget_is_for_all_media_of_a_request(engine):
  with served(engine, limits=Limits(decoded_pixels=64 * 48 * 50)) as server:
    sources = [data_uri(clip('mp4', n), 'video/mp4') for n in (30, 31)]
    message = server.ask(content=shows(*sources, video=True)).json()['error']['message']
    assert message.startswith('messages.0.content.1.video_url.url: expected at most')


def test_the_time_is_that_of_decoding():
  """Not of what is done with one medium before the next is read."""
  left = threading.Event()
  watch = Watch(Limits(decode_seconds=0.1), left)
  watch.of('a').spend(1)
  time.sleep(0.2)
  bounds = watch.of('b')
  bounds.spend(1)
  time.sleep(0.2)
  with pytest.raises(Refused, match='b: expected media that are decoded within 0.1 s; found more'):
    bounds.spend(0)
  left.set()
  for check in (watch.check, lambda: bounds.spend(0)):
    with pytest.raises(Left):
      check()


def test_a_moving_picture_is_measured_before_it_is_decoded(server):
  frame = b'\x21\xf9\x04' + struct.pack('<BHBB', 4, 2, 0, 0) + b'\x2c' + struct.pack('<HHHHB', 0, 0, 1, 1, 0)
  data = b'GIF89a' + struct.pack('<HHBBB', 6000, 6000, 0x80, 0, 0) + bytes(6) + frame * 60 + b';'
  told = server.ask(content=shows(data_uri(data, 'video/gif'), video=True))
  assert told.status_code == 422
  assert 'expected at most 8847360 pixels a frame; found more before the first frame' in told.json()['error']['message']


def test_every_frame_is_counted():
  spent = []
  list(read_frames(clip('mp4', 48), FrameSampler(), 'clip', Bounds(spend=spent.append)))
  assert sum(spent) == 48 * 64 * 48 and spent.count(0) >= 48


def test_the_decoding_for_a_client_that_left_ends(server, monkeypatch):
  began = threading.Event()

  def endless(source, sampler, where, bounds):
    while True:
      began.set()
      time.sleep(0.005)
      bounds.spend(1)
    yield

  monkeypatch.setattr('llava_mini_jax.data.media.read_frames', endless)
  connection = send(server, content=shows(data_uri(b'any', 'video/mp4'), video=True))
  began.wait(30)
  connection.close()
  wait(lambda: server.service.worker.places.taken == 0, 5)


def test_who_waits_for_another_who_leaves_looks_itself(engine, monkeypatch):
  """And who waits for one that cannot be read is told its own field."""
  began, goes_on, left = threading.Event(), threading.Event(), threading.Event()
  looker, data, found = Looker(engine, cached=9, frames=64), png(images(60)[0]), []
  look = engine.core.look

  def slow(keep):
    began.set()
    goes_on.wait(30)
    if left.is_set():
      left.clear()
      raise RuntimeError('given up')
    return look(keep)

  monkeypatch.setattr(engine.core, 'look', slow)
  left.set()
  threads = [threading.Thread(target=lambda: found.append(looker.look(data, '<image>', 'a'))) for _ in range(2)]
  monkeypatch.setattr(threading, 'excepthook', lambda args: found.append(args.exc_type))
  threads[0].start()
  began.wait(30)
  threads[1].start()
  goes_on.set()
  for thread in threads:
    thread.join(30)
  assert found[0] is RuntimeError and len(found[1][0]) == 1 and not found[1][1]


def test_a_shared_upload_names_the_field_of_who_asked(engine, monkeypatch):
  looker, began, goes_on, told = Looker(engine, cached=9, frames=64), threading.Event(), threading.Event(), []
  stream = type(engine.encoder.media).stream

  def slow(self, *arguments):
    began.set()
    goes_on.wait(30)
    return stream(self, *arguments)

  def ask(where):
    with pytest.raises(ValueError) as caught:
      looker.look(b'no image', '<image>', where)
    told.append(caught.value.where)

  monkeypatch.setattr(type(engine.encoder.media), 'stream', slow)
  threads = [threading.Thread(target=ask, args=(where,)) for where in ('messages.0', 'messages.7')]
  threads[0].start()
  began.wait(30)
  threads[1].start()
  time.sleep(0.1)
  goes_on.set()
  for thread in threads:
    thread.join(30)
  assert sorted(told) == ['messages.0', 'messages.7']


def test_heat_maps_take_places_and_a_thread_of_their_own(engine, monkeypatch):
  """Who leaves while it waits for the thread leaves nothing; who has it keeps its place until the thread has ended."""
  goes_on = threading.Event()
  with served(engine, limits=Limits(queue=2)) as server:
    over = server.service.heat.over
    monkeypatch.setattr(server.service.heat, 'over', lambda *arguments: (goes_on.wait(30), over(*arguments))[1])
    places, body = server.service.worker.places, dict(url=image(2))
    connections = [send(server, '/v1/compressor', body) for _ in range(5)]
    wait(lambda: places.taken == 5)
    assert server.ask().is_success  # its threads are others
    connections.append(send(server, '/v1/compressor', body))
    wait(lambda: places.taken == 6)
    assert server.http.post('/v1/compressor', json=body).status_code == server.ask().status_code == 429
    for connection in connections:
      connection.close()
    wait(lambda: places.taken == 1)
    assert server.ask().is_success
    goes_on.set()
    wait(lambda: places.taken == 0)


def test_prompts_that_were_given_up_do_not_pile_up(engine, monkeypatch):
  """Two are in the two threads and keep their places; those that waited for a thread are gone."""
  goes_on, look = threading.Event(), engine.core.look
  monkeypatch.setattr(engine.core, 'look', lambda keep: (goes_on.wait(30), look(keep))[1])
  with served(engine, limits=Limits(queue=1)) as server:
    places = server.service.worker.places
    connections = [send(server, content=shows(image(i))) for i in range(3, 8)]
    wait(lambda: places.taken == 5)
    for connection in connections:
      connection.close()
    wait(lambda: places.taken == 2)
    connections = [send(server, content=shows(image(i))) for i in range(10, 13)]
    wait(lambda: places.taken == 5)
    assert server.ask().status_code == 429
    goes_on.set()
    assert all(connection.recv(12) == b'HTTP/1.1 200' for connection in connections)


def test_uploads_at_a_time(engine):
  with served(engine, limits=Limits(uploads=2)) as server:
    head = 'Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100'
    opened = [send(server, '/v1/files', b'--x', head) for _ in range(2)]
    wait(lambda: server.service.uploads.taken == 2)
    refused = server.http.post('/v1/files', files=dict(file=('a', b'x')))
    assert (refused.status_code, refused.headers['retry-after']) == (429, '1')
    assert refused.json()['error']['message'] == 'all 2 places for uploads are taken; try again in 1 s'
    for connection in opened:
      connection.close()
    wait(lambda: server.service.uploads.taken == 0)
    assert server.http.post('/v1/files', files=dict(file=('a', b'x'))).is_success


def test_bodies_at_a_time(engine):
  """Of requests that are not answered yet, however they come."""
  with served(engine, limits=Limits(body_bytes=200_000, open_bytes=400_000)) as server:
    head = 'Content-Type: application/json\r\nContent-Length: 150000'
    opened = [send(server, PATH, b'x' * 149_000, head) for _ in range(2)]
    time.sleep(0.3)
    body = json.dumps(chat(user='x' * 110_000))
    refused = server.http.post(PATH, content=body, headers={'content-type': 'application/json'})
    assert (refused.status_code, refused.headers['retry-after']) == (429, '1')
    assert refused.json()['error']['message'] == 'too many bodies at a time; try again in 1 s'
    for connection in opened:
      connection.close()
    wait(lambda: server.ask(user='x' * 110_000).is_success)


def test_connections_at_a_time(engine):
  with served(engine, limits=Limits(queue=1, connections=1)) as server:
    host, port = server.url.removeprefix('http://').split(':')
    opened = [socket.create_connection((host, int(port))) for _ in range(6)]
    wait(lambda: len(server.server.server_state.connections) == 6)
    assert server.http.get('/health').status_code == 503
    for connection in opened:
      connection.close()
    wait(lambda: len(server.server.server_state.connections) <= 1)
    assert server.http.get('/health').is_success


def test_a_place_is_free_when_the_engine_has_said_all(server, engine, monkeypatch):
  """However long the client takes to read it."""
  read = threading.Event()

  async def unread(self, answering):
    await answering.finished()
    yield ': '
    while not read.is_set():
      await app_module.asyncio.sleep(0.01)

  monkeypatch.setattr(Reply, 'events', unread)
  with server.http.stream('POST', PATH, json=chat(stream=True)) as stream:
    wait(lambda: server.service.worker.places.taken == 0, 5)
    assert stream.status_code == 200 and not stream.is_closed
    read.set()


class Endless:
  """An app that answers with more than any buffer holds."""

  def __init__(self):
    places = types.SimpleNamespace(most=4)
    self.state = types.SimpleNamespace(service=types.SimpleNamespace(worker=types.SimpleNamespace(places=places)))
    self.sent = 0

  async def __call__(self, scope, receive, send):
    await send(dict(type='http.response.start', status=200, headers=[]))
    for i in range(64):
      await send(dict(type='http.response.body', body=bytes(2**20), more_body=i < 63))
      self.sent += 1


@pytest.mark.parametrize('reads', [False, True])
def test_who_does_not_read_is_cut_off(reads):
  app, bound = Endless(), listen('127.0.0.1', 0)
  announce(bound, NAME)
  server = uvicorn.Server(config(app, Limits(send_seconds=0.3), lifespan='off'))
  thread = threading.Thread(target=server.run, kwargs=dict(sockets=[bound]))
  thread.start()
  try:
    with socket.create_connection(bound.getsockname(), timeout=10) as connection:
      connection.sendall(b'GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n')
      wait(lambda: app.sent)
      wait(lambda: reads or not (server.server_state.connections or server.server_state.tasks), 10)
      count = 0
      while part := connection.recv(2**20):
        count += len(part)
      assert (count >= 64 * 2**20) == reads
      wait(lambda: not (server.server_state.connections or server.server_state.tasks), 10)
  finally:
    server.should_exit = True
    thread.join(30)

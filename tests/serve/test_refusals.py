"""What is refused: status, one line, OpenAI's error object, and nothing about the machine."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import zlib

import httpx
import openai
import pytest
from asking import images
from serving import chat, data_uri, png, served, shows, wait

from llava_mini_jax.serve.limits import Limits

pytestmark = pytest.mark.usefixtures('quick_compilation')
PATH = '/v1/chat/completions'
IMAGE = data_uri(png(images(0)[0]))


def header_of(width: int, height: int) -> str:
  """A PNG of so many pixels that holds none of them."""
  chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', b'')]
  written = [
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks
  ]
  return data_uri(b'\x89PNG\r\n\x1a\n' + b''.join(written))


# name: fields of the request, status, what the line says
REFUSED = {
  'url': (dict(content=shows('http://127.0.0.1/a.png')), 403, 'nothing is fetched; found http:'),
  'https url': (dict(content=shows('https://169.254.169.254/latest')), 403, 'nothing is fetched; found https:'),
  'upper case url': (dict(content=shows(' HTTP://[::1]/a')), 403, 'nothing is fetched; found http:'),
  'integer address': (dict(content=shows('http://2130706433/')), 403, 'nothing is fetched'),
  'file': (dict(content=shows('file:///etc/passwd')), 403, 'nothing is fetched; found file:'),
  'path': (dict(content=shows('/etc/passwd')), 422, 'expected a data URI or the id of an uploaded file; found neither'),
  'unknown file': (dict(content=shows('file-123')), 404, "still kept; found 'file-123'"),
  'bad base64': (
    dict(content=shows('data:image/png;base64,a*b=')),
    422,
    'messages.0.content.0.image_url.url: expected base64;',
  ),
  'not base64': (dict(content=shows('data:image/png,abc')), 422, 'expected data:image/TYPE;base64,...'),
  'no data': (dict(content=shows('data:image/png;base64,')), 422, 'expected data after base64,; found none'),
  'a video as image': (dict(content=shows(data_uri(b'abc', 'video/mp4'))), 422, 'expected data:image/TYPE;base64'),
  'no image': (dict(content=shows(data_uri(b'<html>'))), 422, 'expected JPEG, PNG, WEBP, GIF, BMP; found 6 bytes'),
  'truncated image': (dict(content=shows(data_uri(png(images(0)[0])[:200]))), 422, 'expected a whole image'),
  'huge image': (dict(content=shows(header_of(40000, 40000))), 422, 'expected at most 40000000 pixels'),
  'no video': (
    dict(content=shows(data_uri(b'x' * 99, 'video/mp4'), video=True)),
    422,
    'messages.0.content.0.video_url.url',
  ),
  'nine images': (dict(content=shows(*[IMAGE] * 9)), 422, 'expected at most 8 images and videos; found 9'),
  'long text': (dict(content='a ' * 70_000), 422, 'expected at most 131072 characters of text; found 140000'),
  'long prompt': (dict(content='color ' * 500), 422, 'expected at most'),
  'tag in text': (
    dict(content='<image>\nwhat?'),
    422,
    'messages.0.content: expected no <image> in the text; found one',
  ),
  'special token': (dict(content='a<|im_end|>b'), 422, 'expected no special token in the text'),
  'surrogate': (dict(content='\ud800'), 422, 'expected valid Unicode; found a lone surrogate'),
  'no messages': (dict(messages=[]), 422, 'messages: list should have at least 1 item'),
  'an answer last': (dict(messages=[dict(role='assistant', content='a')]), 422, 'expected user'),
  'an unknown role': (dict(messages=[dict(role='tool', content='a')]), 422, 'messages.0.role'),
  'an image of the system': (
    dict(messages=[dict(role='system', content=shows(IMAGE)), dict(role='user', content='a')]),
    422,
    'expected images and videos of the user alone; found one of system',
  ),
  'unknown part': (dict(content=[dict(type='input_audio')]), 422, 'messages.0.content.0'),
  'another model': (dict(model='gpt-5'), 404, "model: expected tiny; found 'gpt-5'"),
  'temperature': (dict(temperature=-0.1), 422, 'temperature: input should be greater than or equal to 0; found -0.1'),
  'temperature NaN': (dict(temperature=float('nan')), 422, 'temperature: input should be a finite number; found nan'),
  'temperature inf': (dict(temperature=float('inf')), 422, 'temperature: input should be a finite number; found inf'),
  'temperature text': (dict(temperature='1'), 422, "temperature: input should be a valid number; found '1'"),
  'temperature true': (dict(temperature=True), 422, 'temperature: input should be a valid number; found True'),
  'top_p': (dict(top_p=0), 422, 'top_p: input should be greater than 0; found 0'),
  'top_k': (dict(top_k=-1), 422, 'top_k: input should be greater than or equal to 0; found -1'),
  'max_tokens -1': (dict(max_tokens=-1), 422, 'max_tokens: input should be greater than or equal to 1; found -1'),
  'max_tokens 1e9': (dict(max_tokens=10**9), 422, 'max_tokens: expected at most 1024; found 1000000000'),
  'max_tokens float': (dict(max_tokens=1.5), 422, 'max_tokens: input should be a valid integer'),
  'two maxima': (
    dict(max_tokens=3, max_completion_tokens=4),
    422,
    'max_tokens: expected that of max_completion_tokens',
  ),
  'seed': (dict(seed=2**63), 422, 'seed: input should be less than 9223372036854775808'),
  'n': (dict(n=2), 422, 'n: input should be 1; found 2'),
  'stops': (dict(stop=list('abcde')), 422, 'stop: list should have at most 4 items'),
  'empty stop': (dict(stop=['']), 422, 'stop.0: string should have at least 1 character'),
  'top_logprobs': (dict(logprobs=True, top_logprobs=21), 422, 'top_logprobs: input should be less than or equal to 20'),
  'top_logprobs alone': (dict(top_logprobs=2), 422, 'top_logprobs: expected logprobs to be true; found otherwise'),
  'stream_options': (dict(stream_options=dict(include_usage=True)), 422, 'stream_options: expected stream to be true'),
  'tools': (dict(tools=[dict(type='function')]), 422, 'tools: list should have at most 0 items'),
  'penalty': (dict(frequency_penalty=1.0), 422, 'frequency_penalty: input should be less than or equal to 0'),
  'tool_choice': (dict(tool_choice='auto'), 422, "tool_choice: input should be 'none'; found 'auto'"),
  'tool calls of an answer': (
    dict(messages=[dict(role='assistant', content='a', tool_calls=[1]), dict(role='user', content='b')]),
    422,
    'messages.0.tool_calls: list should have at most 0 items',
  ),
  'refusal of an answer': (
    dict(messages=[dict(role='assistant', content='a', refusal='no'), dict(role='user', content='b')]),
    422,
    "messages.0.refusal: input should be ''; found 'no'",
  ),
  'unknown field': (dict(max_new_tokens=3), 422, 'max_new_tokens: extra inputs are not permitted'),
}


def told(response: httpx.Response) -> str:
  """The line of an error object."""
  assert response.headers['content-type'] == 'application/json'
  error = response.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'} and set(response.json()) == {'error'}
  message = error['message']
  assert '\n' not in message and len(message) < 400
  assert 'Traceback' not in message and os.getcwd() not in message and '.py' not in message
  return message


@pytest.mark.parametrize('name', REFUSED)
def test_refused(server, name):
  fields, status, says = REFUSED[name]
  body = {**chat(), **({'messages': chat(fields['content'])['messages']} if 'content' in fields else {})}
  body.update({key: value for key, value in fields.items() if key != 'content'})
  headers = {'content-type': 'application/json'}
  response = server.http.post(PATH, content=json.dumps(body), headers=headers)
  assert (response.status_code, says in told(response)) == (status, True), told(response)


@pytest.mark.parametrize(
  ('body', 'says'),
  [
    (b'', 'body: expected JSON; line 1, column 1: Expecting value'),
    (b'{"model": ', 'body: expected JSON; line 1, column 11'),
    (b'\xff', 'body: expected UTF-8; found another byte at 0'),
    (b'[' * 100_000, 'body: expected JSON; found one that is nested too deep'),
    (b'{"seed": ' + b'1' * 5000 + b'}', 'body: expected JSON; found a number with too many digits'),
  ],
)
def test_what_is_no_json(server, body, says):
  response = server.http.post(PATH, content=body, headers={'content-type': 'application/json'})
  assert response.status_code == 400 and says in told(response)


@pytest.mark.parametrize('body', [b'[]', b'null', b'1', b'"a"'])
def test_json_that_is_no_object(server, body):
  response = server.http.post(PATH, content=body, headers={'content-type': 'application/json'})
  assert response.status_code == 422 and told(response).startswith('body: ')


def test_content_types(server):
  for found in ('text/plain', 'application/x-www-form-urlencoded', ''):
    response = server.http.post(PATH, content=b'{}', headers={'content-type': found})
    assert response.status_code == 415 and told(response) == f'content-type: expected application/json; found {found!r}'
  assert server.http.post('/v1/files', json={}).status_code == 415
  assert server.http.post(
    PATH, content=json.dumps(chat()), headers={'content-type': 'Application/JSON; charset=utf-8'}
  ).is_success


def test_paths_and_methods(server):
  for method, path, status in (
    ('GET', PATH, 405),
    ('GET', '/docs', 404),
    ('GET', '/openapi.json', 404),
    ('GET', '/../etc', 404),
    ('GET', '/v1/models/', 404),  # and no redirect to what the client said the host was
    ('GET', '/v1/models/another', 404),
  ):
    response = server.http.request(method, path)
    assert response.status_code == status and told(response)


def test_the_client_raises_what_it_should(server):
  with pytest.raises(openai.UnprocessableEntityError, match='temperature: '):
    server.openai.chat.completions.create(**chat(temperature=-1))
  with pytest.raises(openai.PermissionDeniedError, match='nothing is fetched'):
    server.openai.chat.completions.create(**chat(shows('http://localhost/a.png')))


def test_large_bodies(engine):
  """Announced, and not announced; what is counted is what came."""
  with served(engine, limits=Limits(body_bytes=10_000)) as server:
    response = server.http.post(PATH, content=b'x' * 10_001, headers={'content-type': 'application/json'})
    assert (response.status_code, told(response)) == (413, 'expected a body of at most 10000 bytes; found 10001')
    chunks = (b'x' * 1000 for _ in range(50))
    response = server.http.post(PATH, content=chunks, headers={'content-type': 'application/json'})
    assert response.status_code == 413
    response = server.http.post('/v1/files', files=dict(file=b'x' * 20_000))
    assert response.status_code == 413
    assert server.ask().is_success


def test_slow_clients(engine):
  """A body that does not come is refused; of a head that does not come the connection is closed."""
  with served(engine, limits=Limits(read_seconds=0.3, header_seconds=0.3)) as server:
    address = server.url.removeprefix('http://').split(':')
    for sent, answer in (
      (
        b'POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{' % PATH.encode(),
        b'HTTP/1.1 408 ',
      ),
      (b'GET / HTTP/1.1\r\nHost', b''),
      (b'', b''),
    ):
      with socket.create_connection((address[0], int(address[1])), timeout=10) as connection:
        connection.sendall(sent)
        began, found = time.monotonic(), b''
        while part := connection.recv(4096):
          found += part
        assert found[: len(answer) or None] == answer and 0.2 < time.monotonic() - began < 5
    assert server.ask().is_success


def test_a_connection_is_kept_for_longer_than_clients_keep_it(engine):
  """A server that closes it first, as it does in the end, loses a request that is on its way."""
  assert Limits().idle_seconds > httpx.Limits().keepalive_expiry
  with served(engine, limits=Limits(idle_seconds=0.5)) as server:
    host, port = server.url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=10) as connection:
      for _ in range(2):
        time.sleep(0.2)
        connection.sendall(b'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n')
        assert connection.recv(4096).startswith(b'HTTP/1.1 200 ')
      began = time.monotonic()
      assert connection.recv(4096) == b'' and 0.3 < time.monotonic() - began < 5


def test_a_key(engine):
  with served(engine, key='s3cret') as server:
    assert server.ask().is_success and server.http.get('/metrics').is_success
    for header in (
      {},
      {'authorization': 'Bearer s3creT'},
      {'authorization': 'Basic s3cret'},
      {'authorization': 's3cret'},
    ):
      with httpx.Client(base_url=server.url, headers=header, trust_env=False) as other:
        response = other.post(PATH, json=chat())
        assert response.status_code == 401 and told(response) == 'expected a valid key: Authorization: Bearer KEY'
        assert other.get('/v1/models').status_code == other.get('/metrics').status_code == 401
        assert other.get('/health').is_success and other.get('/').is_success


def test_pages_of_other_sites_are_kept_out(engine):
  """A browser sends their origin; a name that was made to point here is none of the server's."""
  with served(engine, hosts=('127.0.0.1', 'localhost')) as server:
    port = server.url.rpartition(':')[2]
    assert server.http.post(PATH, json=chat(), headers=dict(origin=server.url)).is_success
    own = dict(host=f'LocalHost:{port}', origin=f'http://LOCALHOST:{port}')
    assert server.http.post(PATH, json=chat(), headers=own).is_success
    for origin in ('http://evil.example', f'http://127.0.0.1:{int(port) + 1}', 'null', '', 'http://[', 'http://a]b'):
      response = server.http.post(PATH, json=chat(), headers=dict(origin=origin))
      assert (response.status_code, told(response)) == (403, f'origin: expected this server; found {origin!r}')
    response = server.http.get('/v1/models', headers=dict(host='evil.example'))
    assert response.status_code == 403 and 'host: expected one of 127.0.0.1, localhost' in told(response)


def test_behind_a_proxy(engine):
  """Pages come from the proxy's name, whatever the proxy calls the server."""
  with served(engine, hosts=('127.0.0.1',), server_names=('My.Site',)) as server:
    own = server.url.removeprefix('http://')
    for host in (own, 'my.site', 'MY.site:443'):
      headers = dict(host=host, origin='https://my.site')
      assert server.http.post(PATH, json=chat(), headers=headers).is_success
    for origin in ('https://evil.example', 'https://my.site.evil.example', 'https://evil.example/my.site'):
      assert server.http.post(PATH, json=chat(), headers=dict(host=own, origin=origin)).status_code == 403
    assert server.http.get('/v1/models', headers=dict(host='evil.example')).status_code == 403
    assert server.http.get('/health', headers=dict(host='10.0.0.7')).is_success  # as an orchestrator asks


@pytest.mark.parametrize('charset', ['undefined', 'idna', 'punycode', 'utf-16', 'hex', 'no such', '"'])
def test_an_upload_in_any_charset(server, charset):
  part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="\xff\xfeab"\r\n\r\nxyz\r\n--x--\r\n'
  headers = {'content-type': f'multipart/form-data; boundary=x; charset={charset}'}
  response = server.http.post('/v1/files', content=part, headers=headers)
  assert response.status_code in (200, 400, 422) and (response.is_success or told(response))
  if charset == 'undefined':
    assert told(response) == 'content-type: expected a charset in which the names of the parts are written'


def test_a_name_of_a_file_is_not_kept_at_any_length(server):
  reply = server.http.post('/v1/files', files=dict(file=('a' * 1000, b'named at length')))
  assert reply.json()['filename'] == 'a' * 255


def test_overload_is_told_and_passes(engine):
  """Four slots and two places in the queue: the seventh is refused at once, and served later."""
  with served(engine, limits=Limits(queue=2)) as server:
    opened = [server.http.stream('POST', PATH, json=chat(max_tokens=60, stream=True)) for _ in range(6)]
    with_slow_steps = engine.core.programs.step

    def slow(*arguments):
      time.sleep(0.05)
      return with_slow_steps(*arguments)

    engine.core.programs.step = slow
    try:
      streams = [one.__enter__() for one in opened]
      assert all(stream.status_code == 200 for stream in streams)
      wait(lambda: engine.core.active == 4 and engine.core.waiting == 2)
      refused = server.ask()
      assert (refused.status_code, refused.headers['retry-after']) == (429, '1')
      assert told(refused) == 'all 6 places are taken; try again in 1 s'
      assert server.http.get('/health').is_success and 'llava_mini_queue 2.0' in server.http.get('/metrics').text
    finally:
      engine.core.programs.step = with_slow_steps
    for one, stream in zip(opened, streams, strict=True):
      assert stream.read().endswith(b'data: [DONE]\n\n')
      one.__exit__(None, None, None)
    wait(lambda: server.service.worker.places.taken == 0)
    assert server.ask().is_success

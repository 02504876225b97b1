"""The HTTP interface: OpenAI's chat completions, models and files; health, metrics, the compressor's heat map, a page.

Enters: an engine and `Limits`. Leaves: an ASGI app. The event loop reads requests and writes answers; threads prepare
prompts (`prepare`); one thread steps the engine (`worker`). Whatever takes long in proportion to what was sent is done
in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.gate import Gate
from llava_mini_jax.serve.heat import Heat
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.media import Files, Looker
from llava_mini_jax.serve.metrics import Metrics
from llava_mini_jax.serve.page import page
from llava_mini_jax.serve.places import Place, Places
from llava_mini_jax.serve.prepare import Prepared, prepare, refused, vision_tokens
from llava_mini_jax.serve.refusal import Refused, json_response, refusal
from llava_mini_jax.serve.replies import Reply
from llava_mini_jax.serve.schema import ChatRequest, HeatRequest, parse
from llava_mini_jax.serve.threads import Threads
from llava_mini_jax.serve.watch import Watch
from llava_mini_jax.serve.worker import Answering, Worker

_Result = TypeVar('_Result')
_END_SECONDS = 3.0  # for threads to notice that the server ends
_NAME = 255  # characters of a file's name that are kept


class Service:
  """What the routes share.

  Attributes:
    name: of the model, as clients call it.
  """

  def __init__(self, engine: Engine, name: str, limits: Limits):
    self.engine, self.name, self.limits = engine, name, limits
    self.created = int(time.time())
    self.worker = Worker(engine, queue=limits.queue, retry_seconds=limits.retry_seconds)
    self.files = Files(limits.file_bytes)
    self.looker = Looker(engine, cached=limits.cached_visuals, frames=limits.frames)
    self.metrics = Metrics(engine, self.worker)
    self.heat = Heat(engine)
    self.uploads = Places(limits.uploads, 'places for uploads', limits.retry_seconds)
    self._short, self._heating = Threads(2, 'short'), Threads(1, 'heat')
    self._preparing = Threads(limits.prepare_threads, 'prepare')

  @contextlib.asynccontextmanager
  async def running(self, _: FastAPI) -> AsyncIterator[None]:
    self.worker.start()
    try:
      yield
    finally:
      until = time.monotonic() + _END_SECONDS
      for threads in (self._short, self._heating, self._preparing):
        threads.stop()
      await asyncio.to_thread(self.worker.stop, _END_SECONDS)
      while self.working and time.monotonic() < until:
        await asyncio.sleep(0.01)

  @property
  def working(self) -> bool:
    """Whether any thread has work that it could not be kept from."""
    return self.worker.working or any(one.working for one in (self._short, self._heating, self._preparing))

  async def chat(self, request: Request) -> Response:
    """One answer, whole or streamed. Its place is free again once the engine has no more work with it."""
    began = time.monotonic()
    self.worker.check_room()
    body = await json_body(request)
    chat = await self._short.run(lambda _: parse(ChatRequest, body))
    self.check_model(chat.model)
    with self.worker.places.take() as place:
      prepared, answering = await while_connected(request, self._begin(chat, place))
    with contextlib.ExitStack() as stack:
      stack.callback(self.worker.leave, answering)
      stack.callback(self._count, prepared, answering, began)
      reply = Reply(chat, prepared, vision_tokens(self.engine, prepared.reused), self.engine.run.tokenizer)
      if chat.stream:
        headers = {'cache-control': 'no-store', 'x-accel-buffering': 'no'}
        events = reply.events(answering)
        return _Streaming(events, stack.pop_all(), headers=headers, media_type='text/event-stream')
      await while_connected(request, answering.finished())
      return json_response(reply.whole(answering.stream))

  async def _begin(self, chat: ChatRequest, place: Place) -> tuple[Prepared, Answering]:
    loop = asyncio.get_running_loop()

    def begin(left: threading.Event) -> tuple[Prepared, Answering]:
      prepared = prepare(chat, self.engine, self.files, self.looker, self.limits, Watch(self.limits, left))
      return prepared, self.worker.submit(prepared.request, loop, place)

    try:
      return await self._preparing.run(begin, place, unwanted=lambda begun: self.worker.leave(begun[1]))
    except DataError as error:
      raise refused(error) from None

  def _count(self, prepared: Prepared, answering: Answering, began: float) -> None:
    stream = answering.stream
    self.metrics.tokens.labels('prompt').inc(stream.prompt_tokens)
    self.metrics.tokens.labels('cached').inc(vision_tokens(self.engine, prepared.reused))
    self.metrics.tokens.labels('answer').inc(len(stream.ids))
    if answering.first:
      self.metrics.first.observe(answering.first - began)
    if stream.finish in ('stop', 'length'):
      self.metrics.whole.observe(time.monotonic() - began)

  async def upload(self, request: Request) -> Response:
    """OpenAI's `POST /v1/files`: the field `file`; `purpose` is of no interest."""
    check_content_type(request, 'multipart/form-data')
    with self.uploads.take() as place:
      try:
        async with request.form(max_files=1, max_fields=8) as form:
          file = form.get('file')
          if file is None or isinstance(file, str):
            raise Refused(422, 'file: expected a file; found none', param='file')
          name, data = (file.filename or 'file')[:_NAME], await file.read()
      except UnicodeError:
        raise Refused(400, 'content-type: expected a charset in which the names of the parts are written') from None
      if not data:
        raise Refused(422, 'file: expected an image or a video; found no bytes', param='file')
      return json_response(self.file_object(await self._short.run(lambda _: self.files.add(name, data), place)))

  def file_object(self, file_id: str) -> dict[str, Any]:
    name, data = self.files.get(file_id)
    head = dict(id=file_id, object='file', bytes=len(data), created_at=self.created, filename=name)
    return dict(head, purpose='vision', status='processed')

  async def compressor(self, request: Request) -> Response:
    """Where the compressor looked: see `heat.Heat`."""
    self.worker.check_room()
    body = await json_body(request)

    def look(_: threading.Event) -> Response:
      asked = parse(HeatRequest, body)
      return json_response(self.heat.over(self.files.read(asked.url, IMAGE_TAG, 'url'), 'url'))

    with self.worker.places.take() as place:
      try:
        return await while_connected(request, self._heating.run(look, place))
      except DataError as error:
        raise refused(error) from None

  def model_object(self) -> dict[str, Any]:
    head = dict(id=self.name, object='model', created=self.created, owned_by='llava_mini_jax')
    return dict(head, compressor=self.engine.run.experiment.model.compressor.kind)

  def check_model(self, name: str) -> None:
    """Raises Refused 404."""
    if name != self.name:
      message = f'model: expected {self.name}; found {name[:80]!a}'
      raise Refused(404, message, param='model', code='model_not_found')


class _Streaming(StreamingResponse):
  """Lets go of what an answer holds, however its stream ends: even if not a byte of it was sent."""

  def __init__(self, events: AsyncIterator[str], held: contextlib.ExitStack, **options: Any):
    super().__init__(events, **options)
    self._held = held

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    with self._held:
      await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
  """The result of `work`, which is cancelled if the client leaves. Raises ClientDisconnect then."""
  task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
  try:
    await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      return task.result()
    raise ClientDisconnect
  finally:
    for one in (task, left):
      one.cancel()


async def _left(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass


async def json_body(request: Request) -> bytes:
  check_content_type(request, 'application/json')
  return await request.body()


def check_content_type(request: Request, expected: str) -> None:
  """Raises Refused 415."""
  found = request.headers.get('content-type', '').partition(';')[0].strip().lower()
  if found != expected:
    raise Refused(415, f'content-type: expected {expected}; found {found[:80]!a}')


def make_app(
  engine: Engine,
  *,
  name: str,
  limits: Limits | None = None,
  key: str = '',
  hosts: Iterable[str] = (),
  server_names: Iterable[str] = (),
) -> FastAPI:
  """Serves an engine.

  Args:
    name: of the model. key: that clients must have; '' = none. hosts, server_names: names it goes by, as `gate.Gate`.
  """
  limits = limits or Limits()
  service = Service(engine, name, limits)
  plain = dict(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
  app = FastAPI(**plain, lifespan=service.running)
  routes = _add_routes(app, service)

  def ended(path: str, status: int, seconds: float) -> None:
    above = path.rpartition('/')[0]
    known = path if path in routes else above if above in ('/v1/files', '/v1/models') else 'other'
    service.metrics.requests.labels(known, str(status)).inc()

  app.add_middleware(Gate, limits=limits, key=key, hosts=hosts, server_names=server_names, ended=ended)
  app.add_exception_handler(Refused, _refuse)
  app.add_exception_handler(HTTPException, _refuse_http)
  app.state.service = service
  return app


def _add_routes(app: FastAPI, service: Service) -> set[str]:
  """-> their paths, without those of a single file or model."""
  html, headers = page()

  async def health() -> Response:
    failed = service.worker.failed
    return json_response(dict(status='failed' if failed else 'ok'), 503 if failed else 200)

  async def models() -> Response:
    return json_response(dict(object='list', data=[service.model_object()]))

  async def model(model_id: str) -> Response:
    service.check_model(model_id)
    return json_response(service.model_object())

  async def metrics() -> Response:
    return Response(service.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  async def index() -> Response:
    return Response(html, media_type='text/html; charset=utf-8', headers=headers)

  async def get_file(file_id: str) -> Response:
    return json_response(service.file_object(file_id))

  async def delete_file(file_id: str) -> Response:
    service.files.delete(file_id)
    return json_response(dict(id=file_id, object='file', deleted=True))

  plain = [
    ('/', 'GET', index),
    ('/health', 'GET', health),
    ('/metrics', 'GET', metrics),
    ('/v1/models', 'GET', models),
    ('/v1/chat/completions', 'POST', service.chat),
    ('/v1/files', 'POST', service.upload),
    ('/v1/compressor', 'POST', service.compressor),
  ]
  single = [
    ('/v1/models/{model_id}', 'GET', model),
    ('/v1/files/{file_id}', 'GET', get_file),
    ('/v1/files/{file_id}', 'DELETE', delete_file),
  ]
  for path, method, function in plain + single:
    app.add_api_route(path, function, methods=[method], response_model=None)
  return {path for path, *_ in plain}


async def _refuse(_: Request, error: Refused) -> Response:
  return refusal(error)


async def _refuse_http(_: Request, error: HTTPException) -> Response:
  """No such path or method, a multipart body that is none."""
  message = ' '.join(str(error.detail).split())
  return refusal(Refused(error.status_code, message, headers=error.headers or {}))

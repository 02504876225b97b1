"""The HTTP interface: OpenAI's chat completions, models and files; health, metrics, the compressor's heat map, a page.

Enters: an engine and `Limits`. Leaves: an ASGI app. The event loop reads requests and writes answers; threads prepare
prompts (`prepare`); one thread steps the engine (`worker`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
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
from llava_mini_jax.serve.prepare import Prepared, prepare, refused, vision_tokens
from llava_mini_jax.serve.refusal import Refused, json_response, refusal
from llava_mini_jax.serve.replies import Reply
from llava_mini_jax.serve.schema import ChatRequest, HeatRequest, parse
from llava_mini_jax.serve.worker import Answering, Worker

_Result = TypeVar('_Result')


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
    self._threads = concurrent.futures.ThreadPoolExecutor(limits.prepare_threads, 'prepare')

  @contextlib.asynccontextmanager
  async def running(self, _: FastAPI) -> AsyncIterator[None]:
    self.worker.start()
    try:
      yield
    finally:
      await asyncio.to_thread(self.worker.stop)
      self._threads.shutdown(cancel_futures=True)

  async def chat(self, request: Request) -> Response:
    """One answer, whole or streamed. Its place is free again once it has ended, or the client has left."""
    began = time.monotonic()
    self.worker.check_room()
    chat = parse(ChatRequest, await json_body(request))
    if chat.model != self.name:
      raise Refused(
        404, f'model: expected {self.name}; found {chat.model[:80]!a}', param='model', code='model_not_found'
      )
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.worker.place())
      prepared, answering = await while_connected(request, self._begin(chat))
      stack.callback(self.worker.leave, answering)
      stack.callback(self._count, prepared, answering, began)
      reply = Reply(chat, prepared, vision_tokens(self.engine, prepared.reused), self.engine.run.tokenizer)
      if chat.stream:
        headers = {'cache-control': 'no-store', 'x-accel-buffering': 'no'}
        events = reply.events(answering)
        return _Streaming(events, stack.pop_all(), headers=headers, media_type='text/event-stream')
      await while_connected(request, answering.finished())
      return json_response(reply.whole(answering.stream))

  async def _begin(self, chat: ChatRequest) -> tuple[Prepared, Answering]:
    loop = asyncio.get_running_loop()

    def begin() -> tuple[Prepared, Answering]:
      prepared = prepare(chat, self.engine, self.files, self.looker, self.limits)
      return prepared, self.worker.submit(prepared.request, loop)

    beginning = self._threads.submit(begin)
    try:
      return await asyncio.wrap_future(beginning)
    except asyncio.CancelledError:  # a thread that has begun goes on: what it submits is nobody's
      beginning.add_done_callback(self._abandon)
      raise
    except DataError as error:
      raise refused(error) from None

  def _abandon(self, beginning: concurrent.futures.Future[tuple[Prepared, Answering]]) -> None:
    if not (beginning.cancelled() or beginning.exception()):
      self.worker.leave(beginning.result()[1])

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
    form = await request.form(max_files=1, max_fields=8)
    file = form.get('file')
    if file is None or isinstance(file, str):
      raise Refused(422, 'file: expected a file; found none', param='file')
    name, data = file.filename or 'file', await file.read()
    await form.close()
    if not data:
      raise Refused(422, 'file: expected an image or a video; found no bytes', param='file')
    return json_response(self.file_object(self.files.add(name, data)))

  def file_object(self, file_id: str) -> dict[str, Any]:
    name, data = self.files.get(file_id)
    head = dict(id=file_id, object='file', bytes=len(data), created_at=self.created, filename=name)
    return dict(head, purpose='vision', status='processed')

  async def compressor(self, request: Request) -> Response:
    """Where the compressor looked: see `heat.Heat`."""
    asked = parse(HeatRequest, await json_body(request))
    data = self.files.read(asked.url, IMAGE_TAG, 'url')
    try:
      over = await asyncio.get_running_loop().run_in_executor(self._threads, self.heat.over, data, 'url')
    except DataError as error:
      raise refused(error) from None
    return json_response(over)

  def model_object(self) -> dict[str, Any]:
    head = dict(id=self.name, object='model', created=self.created, owned_by='llava_mini_jax')
    return dict(head, compressor=self.engine.run.experiment.model.compressor.kind)


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
  engine: Engine, *, name: str, limits: Limits | None = None, key: str = '', hosts: Iterable[str] = ()
) -> FastAPI:
  """Serves an engine.

  Args:
    name: of the model. key: that clients must have; '' = none. hosts: names it goes by, as `gate.Gate`.
  """
  limits = limits or Limits()
  service = Service(engine, name, limits)
  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.running)
  routes = _add_routes(app, service)

  def ended(path: str, status: int, seconds: float) -> None:
    known = path if path in routes else '/v1/files' if path.startswith('/v1/files/') else 'other'
    service.metrics.requests.labels(known, str(status)).inc()

  app.add_middleware(Gate, limits=limits, key=key, hosts=hosts, ended=ended)
  app.add_exception_handler(Refused, _refuse)
  app.add_exception_handler(HTTPException, _refuse_http)
  app.state.service = service
  return app


def _add_routes(app: FastAPI, service: Service) -> set[str]:
  """-> their paths, without those of single files."""
  html, headers = page()

  async def health() -> Response:
    failed = service.worker.failed
    return json_response(dict(status='failed' if failed else 'ok'), 503 if failed else 200)

  async def models() -> Response:
    return json_response(dict(object='list', data=[service.model_object()]))

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
  single = [('/v1/files/{file_id}', 'GET', get_file), ('/v1/files/{file_id}', 'DELETE', delete_file)]
  for path, method, function in plain + single:
    app.add_api_route(path, function, methods=[method], response_model=None)
  return {path for path, *_ in plain}


async def _refuse(_: Request, error: Refused) -> Response:
  return refusal(error)


async def _refuse_http(_: Request, error: HTTPException) -> Response:
  """No such path or method, a multipart body that is none."""
  message = ' '.join(str(error.detail).split())
  return refusal(Refused(error.status_code, message, headers=error.headers or {}))

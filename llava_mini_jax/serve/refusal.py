"""What a client is told when it cannot be served: a status, one line, and OpenAI's error object around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

TYPES = {401: 'authentication_error', 403: 'permission_error', 404: 'not_found_error', 429: 'rate_limit_error'}


class Refused(Exception):
  """A request that is not answered.

  Attributes:
    status: of HTTP. message: one line for the client. param: the field at fault, if it is one. headers: further ones.
  """

  def __init__(
    self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping = ()
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
  """ASCII, so that a lone surrogate that a client sent can be told back to it."""
  return Response(json.dumps(content), status, dict(headers or {}), 'application/json')


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
  """`{"error": {"message", "type", "param", "code"}}`."""
  kind = TYPES.get(status, 'server_error' if status >= 500 else 'invalid_request_error')
  return dict(error=dict(message=message, type=kind, param=param, code=code))


def refusal(refused: Refused) -> Response:
  """The connection is closed where the rest of the request is not read."""
  closing = {'connection': 'close'} if refused.status in (408, 413) else {}
  body = error_object(refused.status, refused.message, refused.param, refused.code)
  return json_response(body, refused.status, {**closing, **refused.headers})

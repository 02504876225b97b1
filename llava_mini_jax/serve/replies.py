"""Answers as OpenAI's API writes them: whole, or as server-sent events. Source: its reference, "Chat Completions".

`usage.prompt_tokens_details.cached_tokens` are the vision tokens of images and frames that the engine had seen before;
`usage.vision` is an extension: how many visuals there were, and how many of them were not looked at again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import transformers

from llava_mini_jax.infer.stream import Stream
from llava_mini_jax.serve.prepare import Prepared
from llava_mini_jax.serve.refusal import Refused, error_object
from llava_mini_jax.serve.schema import ChatRequest
from llava_mini_jax.serve.worker import Answering


class Reply:
  """How one answer is told."""

  def __init__(
    self, chat: ChatRequest, prepared: Prepared, cached_tokens: int, tokenizer: transformers.PreTrainedTokenizerFast
  ):
    self._chat, self._prepared, self._cached, self._tokenizer = chat, prepared, cached_tokens, tokenizer
    self._tells_usage = bool(chat.stream_options and chat.stream_options.include_usage)
    self._head = dict(id=f'chatcmpl-{secrets.token_hex(12)}', created=int(time.time()), model=chat.model)

  def whole(self, stream: Stream) -> dict[str, Any]:
    """`chat.completion`, once the stream has finished."""
    message = dict(role='assistant', content=stream.text, refusal=None)
    choice = dict(
      index=0, message=message, logprobs=self._logprobs(stream, 0, len(stream.ids)), finish_reason=stream.finish
    )
    return dict(self._head, object='chat.completion', choices=[choice], usage=self._usage(stream))

  async def events(self, answering: Answering) -> AsyncIterator[str]:
    """`chat.completion.chunk`s, each as soon as there is text."""
    stream, told, tokens = answering.stream, 0, 0
    yield self._chunk(dict(role='assistant', content=''))
    try:
      while True:
        finish, count, text = stream.finish, len(stream.top_logprobs), stream.text  # in this order: see `Stream.take`
        if len(text) > told or (finish and self._chat.logprobs and count > tokens):
          yield self._chunk(dict(content=text[told:]), self._logprobs(stream, tokens, count))
          told, tokens = len(text), count
        if finish not in ('', 'failed'):
          break
        await answering.change()
    except Refused as refused:
      yield _event(error_object(refused.status, refused.message))
      return
    yield self._chunk({}, finish=finish)
    if self._tells_usage:
      yield _event(dict(self._head, object='chat.completion.chunk', choices=[], usage=self._usage(stream)))
    yield 'data: [DONE]\n\n'

  def _chunk(self, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> str:
    choice = dict(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)
    usage = dict(usage=None) if self._tells_usage else {}
    return _event(dict(self._head, object='chat.completion.chunk', choices=[choice], **usage))

  def _usage(self, stream: Stream) -> dict[str, Any]:
    prompt, answer = stream.prompt_tokens, len(stream.ids)
    return dict(
      prompt_tokens=prompt,
      completion_tokens=answer,
      total_tokens=prompt + answer,
      prompt_tokens_details=dict(cached_tokens=self._cached),
      vision=dict(visuals=self._prepared.visuals, reused=self._prepared.reused),
    )

  def _logprobs(self, stream: Stream, start: int, stop: int) -> dict[str, Any] | None:
    """Of each token, with the one that ended the answer."""
    if not self._chat.logprobs:
      return None
    return dict(
      content=[
        dict(
          self._token(stream.ids[i], stream.logprobs[i]),
          top_logprobs=[self._token(*one) for one in stream.top_logprobs[i]],
        )
        for i in range(start, stop)
      ],
      refusal=None,
    )

  def _token(self, token: int, logprob: float) -> dict[str, Any]:
    """JSON knows no infinity: a token that cannot be said has -9999, as in OpenAI's reference. A piece of a character
    has no bytes of its own here.
    """
    text = self._tokenizer.decode([token], skip_special_tokens=False)
    data = None if '\ufffd' in text else list(text.encode())
    return dict(token=text, logprob=max(logprob, -9999.0), bytes=data)


def _event(content: dict) -> str:
  return f'data: {json.dumps(content)}\n\n'

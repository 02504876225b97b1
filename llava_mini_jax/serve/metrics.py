"""What Prometheus is told at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
  """Attributes: the time series, which the app counts in."""

  def __init__(self, engine: Engine, worker: Worker):
    self._registry = CollectorRegistry()
    of = dict(registry=self._registry, namespace='llava_mini')
    self.requests = Counter('requests', 'Requests by path and status; 499 = the client left.', ['path', 'status'], **of)
    self.tokens = Counter(
      'tokens', 'Tokens of prompts and of answers, and of prompts those that were cached.', ['kind'], **of
    )
    self.first = Histogram('time_to_first_token_seconds', 'From request to first token.', buckets=SECONDS, **of)
    self.whole = Histogram('answer_seconds', 'From request to the end of the answer.', buckets=SECONDS, **of)
    gauges = dict(
      slots=('Answers that are decoded together.', lambda: engine.core.slots),
      active_slots=('Slots in use.', lambda: engine.core.active),
      queue=('Requests without a slot.', lambda: engine.core.waiting),
      places=('Requests that are prepared, wait or are answered.', lambda: worker.places.taken),
      most_places=('What `places` cannot exceed.', lambda: worker.places.most),
      healthy=('0 after the engine failed.', lambda: float(not worker.failed)),
    )
    for name, (help_text, value) in gauges.items():
      Gauge(name, help_text, **of).set_function(value)

  def text(self) -> bytes:
    return generate_latest(self._registry)

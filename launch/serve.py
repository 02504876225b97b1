"""Serves a trained or imported run over HTTP, as OpenAI's API does, with a page to ask at.

python launch/serve.py --checkpoint=runs/quickstart
python launch/serve.py --checkpoint=runs/released --dtype=bfloat16 --quantize=int8 --slots=16 --max_length=4096
LLAVA_MINI_KEY=... python launch/serve.py --checkpoint=runs/mine --host=0.0.0.0 --port=8080
python launch/serve.py --checkpoint=runs/mine --server_name=my.site
curl, the openai client, limits and metrics: docs/serving.md
"""

from pathlib import Path

from absl import flags

from llava_mini_jax.cli import launch
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.app import make_app
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.run import announce, host_names, listen, read_key, serve, warm_up

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the run.')
_NAME = flags.DEFINE_string('name', None, 'What clients call the model; default the name of the directory.')
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port; 0 = any that is free.')
_KEY_FILE = flags.DEFINE_string('key_file', None, 'File with the key that clients must have; else LLAVA_MINI_KEY.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint step; default the newest.')
_DTYPE = flags.DEFINE_string('dtype', '', 'bfloat16 or float32; default as trained.')
_QUANTIZE = flags.DEFINE_string('quantize', '', 'int8, int4 or nf4 kernels.')
_SLOTS = flags.DEFINE_integer('slots', 8, 'Answers that are decoded together.', lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer('max_length', 0, 'Most tokens of a prompt and its answer; 0 = 2048, or what fits.')
_MAX_NEW = flags.DEFINE_integer('max_new_tokens', Limits.new_tokens, 'Most tokens of an answer.', lower_bound=1)
_QUEUE = flags.DEFINE_integer('queue', Limits.queue, 'Requests that may wait for a slot.', lower_bound=0)
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value: ask with other input settings; may be repeated.')
_WARM_UP = flags.DEFINE_bool('warm_up', True, 'Compile what short questions need before the first one comes.')
_SERVER_NAME = flags.DEFINE_multi_string('server_name', [], 'Host name of a proxy before it; may be repeated.')
flags.mark_flags_as_required(['checkpoint'])


def main(_) -> None:
  limits = Limits(queue=_QUEUE.value, new_tokens=_MAX_NEW.value)
  key, names = read_key(_KEY_FILE.value), _SERVER_NAME.value
  hosts, bound = host_names(_HOST.value, key, names), listen(_HOST.value, _PORT.value)
  engine = Engine.from_checkpoint(
    _CHECKPOINT.value,
    dtype=_DTYPE.value,
    quantize=_QUANTIZE.value,
    step=_STEP.value,
    changes=_SET.value,
    slots=_SLOTS.value,
    max_length=_MAX_LENGTH.value,
  )
  if _WARM_UP.value:
    warm_up(engine)
  name = _NAME.value or Path(_CHECKPOINT.value).resolve().name
  app = make_app(engine, name=name, limits=limits, key=key, hosts=hosts, server_names=names)
  print(announce(bound, name), flush=True)
  serve(app, bound, limits)


if __name__ == '__main__':
  launch(main)

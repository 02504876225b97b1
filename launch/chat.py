"""Asks a trained run about an image, in the terminal.

python launch/chat.py --checkpoint=runs/tiny --image=photo.png "what color is the shape?"
Without a question it opens a prompt loop; /image FILE shows another image, an empty line ends it.
"""

from pathlib import Path

import jax
from absl import flags

from llava_mini_jax.cli import launch
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.chat import answer_once, prompt_loop
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the training run.')
_IMAGE = flags.DEFINE_string('image', None, 'Image file; none asks without an image.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint step; default the newest.')
_MAX_NEW = flags.DEFINE_integer('max_new_tokens', 64, 'Longest answer.', lower_bound=1)
flags.mark_flags_as_required(['checkpoint'])


def main(argv) -> None:
  mesh = make_mesh((1, 1, 1), devices=jax.devices()[:1])
  answerer = Answerer(load_run(Path(_CHECKPOINT.value), mesh, _STEP.value), max_new_tokens=_MAX_NEW.value)
  image = Path(_IMAGE.value) if _IMAGE.value else None
  if len(argv) > 1:
    answer_once(answerer, image, ' '.join(argv[1:]))
  else:
    prompt_loop(answerer, image)


if __name__ == '__main__':
  launch(main, arguments=True)

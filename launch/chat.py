"""Asks a trained run about an image, in the terminal.

python launch/chat.py --checkpoint=runs/tiny --image=photo.png "what color is the shape?"
python launch/chat.py --checkpoint=runs/mine --video=clip.mp4 "what happens?"
python launch/chat.py --checkpoint=runs/mine --video=clip.mp4 --set data.video_fps=2 --set model.visual_chunk=16
Without a question it opens a prompt loop; /image FILE or /video FILE shows another, an empty line ends it.
"""

from pathlib import Path

import jax
from absl import flags

from llava_mini_jax.cli import launch
from llava_mini_jax.data.conversation import IMAGE_TAG, VIDEO_TAG
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.chat import answer_once, prompt_loop
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.sharding import make_mesh

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the training run.')
_IMAGE = flags.DEFINE_string('image', None, 'Image file; without it and --video it asks about nothing shown.')
_VIDEO = flags.DEFINE_string('video', None, 'Video file.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint step; default the newest.')
_MAX_NEW = flags.DEFINE_integer('max_new_tokens', 64, 'Longest answer.', lower_bound=1)
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value: ask with other input settings; may be repeated.')
flags.mark_flags_as_required(['checkpoint'])
flags.mark_flags_as_mutual_exclusive(['image', 'video'])


def main(argv) -> None:
  mesh = make_mesh((1, 1, 1), devices=jax.devices()[:1])
  run = load_run(Path(_CHECKPOINT.value), mesh, _STEP.value, _SET.value)
  answerer = Answerer(run, max_new_tokens=_MAX_NEW.value)
  files = ((IMAGE_TAG, _IMAGE.value), (VIDEO_TAG, _VIDEO.value))
  shown = next(((tag, Path(file)) for tag, file in files if file), None)
  if len(argv) > 1:
    answer_once(answerer, shown, ' '.join(argv[1:]))
  else:
    prompt_loop(answerer, shown)


if __name__ == '__main__':
  launch(main, arguments=True)

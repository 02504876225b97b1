"""Asks a trained run about an image, in the terminal.

python launch/chat.py --checkpoint=runs/tiny --image=photo.png "what color is the shape?"
python launch/chat.py --checkpoint=runs/mine --image=one.png --image=two.png "what is the difference?"
python launch/chat.py --checkpoint=runs/mine --video=clip.mp4 "what happens?"
python launch/chat.py --checkpoint=runs/mine --video=clip.mp4 --set data.video_fps=2 --set model.visual_chunk=16
Without a question it opens a prompt loop; /image FILE or /video FILE shows another, an empty line ends it.
"""

from pathlib import Path

from absl import flags

from llava_mini_jax.cli import launch
from llava_mini_jax.config import QUANTIZED
from llava_mini_jax.data.conversation import IMAGE_TAG, VIDEO_TAG
from llava_mini_jax.infer.chat import Conversation, prompt_loop
from llava_mini_jax.infer.engine import Engine

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Directory of the training run.')
_IMAGE = flags.DEFINE_multi_string(
  'image', None, 'Image file; may be repeated. Without any and --video nothing is shown.'
)
_VIDEO = flags.DEFINE_string('video', None, 'Video file.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint step; default the newest.')
_MAX_NEW = flags.DEFINE_integer('max_new_tokens', 64, 'Longest answer.', lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer('max_length', 0, 'Most tokens of a conversation; 0 = 2048 at most.', lower_bound=0)
_QUANTIZE = flags.DEFINE_enum('quantize', '', ['', *QUANTIZED], 'What kernels are kept in.')
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value: ask with other input settings; may be repeated.')
flags.mark_flags_as_required(['checkpoint'])
flags.mark_flags_as_mutual_exclusive(['image', 'video'])


def main(argv) -> None:
  engine = Engine.from_checkpoint(
    _CHECKPOINT.value,
    quantize=_QUANTIZE.value,
    step=_STEP.value,
    changes=_SET.value,
    slots=1,
    max_length=_MAX_LENGTH.value,
  )
  files = [(IMAGE_TAG, file) for file in _IMAGE.value or ()] + ([(VIDEO_TAG, _VIDEO.value)] if _VIDEO.value else [])
  conversation = Conversation(engine, [(tag, Path(file)) for tag, file in files], _MAX_NEW.value)
  if len(argv) > 1:
    conversation.ask(' '.join(argv[1:]))
  else:
    prompt_loop(conversation)


if __name__ == '__main__':
  launch(main, arguments=True)

"""The easy-VQA data set (MIT licence, in the PyPI package `easy-vqa`): one coloured shape per 64×64 image.

Leaves: records for `train` (4,000 images, each with all its questions as one conversation; it ends, for 3,542 images,
with the caption that those questions and answers imply) and `test` (1,000 images, 9,673 records of one question each,
with the question's category). Nothing is downloaded.

The captions are to a model trained from scratch what LLaVA's first stage is to a pretrained one: they ask for shape and
color of every image at once, where most of the questions ask for neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llava_mini_jax.data.conversation import IMAGE_TAG
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image
from llava_mini_jax.data.records import Record

SHAPES = ('circle', 'rectangle', 'triangle')
COLORS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
CAPTION_QUESTION = 'describe the image.'
DESCRIPTION = (
  'easy-VQA (V. Zhou, https://github.com/vzhou842/easy-VQA): questions about one coloured shape on a 64x64 image'
)


def category(question: str, answer: str) -> str:
  """What a question asks for: `shape`, `color`, or `yes/no` about one of the two."""
  if answer in ('yes', 'no'):
    return 'yes/no shape' if any(shape in question for shape in SHAPES) else 'yes/no color'
  return 'shape' if answer in SHAPES else 'color'


def caption(pairs: list[tuple[str, str]]) -> str | None:
  """What the questions and answers about one image imply, e.g. `blue circle`; None if they leave color or shape open.

  A question without `not` or `no` that is answered `yes`, and one with it that is answered `no`, states what it names;
  so does one that names a shape to ask for its color, or the reverse.
  """
  stated: set[str] = set()
  for question, answer in pairs:
    words = set(question.rstrip('?').split())
    negated = bool(words & {'not', 'no'})
    if answer not in ('yes', 'no'):
      stated |= words | {answer}
    elif (answer == 'yes') != negated:
      stated |= words
  color = next((word for word in COLORS if word in stated), None)
  shape = next((word for word in SHAPES if word in stated), None)
  return f'{color} {shape}' if color and shape else None


def splits() -> dict[str, Iterator[Record]]:
  """`train` and `test`, in the order of the package. Raises DataError E_NO_SOURCE if `easy-vqa` is not installed."""
  try:
    import easy_vqa
  except ImportError:
    raise DataError('E_NO_SOURCE', 'easy_vqa', 'the data comes with a package: pip install easy-vqa') from None
  train = _by_image(*easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
  test = _by_image(*easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
  return {'train': _conversations(train), 'test': _questions(test)}


_Image = tuple[int, bytes, list[tuple[str, str]]]  # number, file, (question, answer) pairs


def _by_image(questions: list[str], answers: list[str], images: list[int], paths: dict[int, str]) -> Iterator[_Image]:
  pairs: dict[int, list[tuple[str, str]]] = {}
  for question, answer, image in zip(questions, answers, images, strict=True):
    pairs.setdefault(image, []).append((question, answer))
  for image, asked in pairs.items():
    data = Path(paths[image]).read_bytes()
    load_image(data, f'easy_vqa: {paths[image]}')
    yield image, data, asked


def _conversations(images: Iterator[_Image]) -> Iterator[Record]:
  for image, data, pairs in images:
    text = caption(pairs)
    turns = [turn for pair in [*pairs, *([(CAPTION_QUESTION, text)] if text else [])] for turn in _turns(*pair)]
    turns[0]['value'] = f'{IMAGE_TAG}\n{turns[0]["value"]}'
    yield {'id': str(image), 'category': '', 'media': [data], 'conversations': turns}


def _questions(images: Iterator[_Image]) -> Iterator[Record]:
  for image, data, pairs in images:
    for number, (question, answer) in enumerate(pairs):
      turns = _turns(f'{IMAGE_TAG}\n{question}', answer)
      yield {
        'id': f'{image}-{number}',
        'category': category(question, answer),
        'media': [data],
        'conversations': turns,
      }


def _turns(question: str, answer: str) -> list[dict[str, str]]:
  return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]

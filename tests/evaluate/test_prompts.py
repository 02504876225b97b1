"""What a prompt is to the model: sizes that do not grow with a video, fused answers, and clips frame by frame."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import loaded
from small_model import quick_jit, random_params, with_params
from tiny_run import COLORS, experiment, make_dataset, picture

from llava_mini_jax.data import records
from llava_mini_jax.data.conversation import Encoded
from llava_mini_jax.data.images import PAD_COLOR
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.evaluate.run import evaluate
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.chat import Conversation
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.infer.generate import prefill
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Prompt, PromptEncoder, prompt_shape
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.tree import abstract_model
from llava_mini_jax.types import Batch

QUESTION = [{'role': 'user', 'content': '<video>\nco?'}]  # 11 tokens in `chatml`


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(make_dataset(tmp_path_factory.getbasetemp()) / 'tokenizer')


def asked(data: dict | None = None, prefusion: dict | None = None, **model) -> Experiment:
  """The tiny run's experiment with such fields."""
  base = experiment('')
  fused = dataclasses.replace(base.model.prefusion, **prefusion or {})
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, prefusion=fused, **model),
    data=dataclasses.replace(base.data, **data or {}),
  )


def gray(frames: int) -> list[np.ndarray]:
  return [np.full((16, 16, 3), 3 * i % 251, np.uint8) for i in range(frames)]


def laid_out(encoder: PromptEncoder, *prompts: Prompt, **sizes) -> tuple[Batch, list[Encoded]]:
  """`sizes` replace those of the shape."""
  encoded = [encoder.encode(prompt) for prompt in prompts]
  shape = dataclasses.replace(encoder.shape(encoder.sizes(prompts, encoded)), **sizes)
  return encoder.batch(prompts, encoded, shape, rows=len(prompts)), encoded


# --- sizes ---


@pytest.mark.parametrize(
  ('chunk', 'visuals', 'places'),
  [(0, 0, 1), (0, 1, 1), (0, 5, 8), (0, 256, 256), (0, 257, 512)]
  + [(16, 0, 1), (16, 3, 4), (16, 16, 16), (16, 17, 32), (16, 257, 272), (24, 20, 24), (24, 25, 48), (1, 3, 3)],
)
def test_places_for_visuals(chunk, visuals, places):
  """A power of two, so that few are compiled; a video of several chunks is padded by less than one."""
  shape = prompt_shape(asked(visual_chunk=chunk).model, length=40, text=7, visuals=visuals)
  assert (shape.length, shape.visuals, shape.fused_text) == (48, places, 16)


@pytest.mark.parametrize(('chunk', 'places'), [(0, 256), (24, 264)])
def test_pre_fusion_does_not_grow_with_a_video(tokenizer, chunk, places):
  """T is the question, not the row with the video's own slots in it."""
  encoder = PromptEncoder(asked(visual_chunk=chunk), tokenizer)
  batch, (encoded,) = laid_out(encoder, Prompt(QUESTION, [gray(256)]))
  assert len(encoded.ids) == 12
  assert batch.tokens.shape == (1, 272)
  assert batch.fuse_index.shape == batch.fuse_mask.shape == (1, places, 16)
  assert batch.fuse_mask.sum(-1).tolist() == [[11] * 256 + [0] * (places - 256)]
  assert batch.pixels.shape == (1, places, 1, 16, 16, 3)


def test_the_longest_text_and_the_longest_row_may_be_of_different_prompts(tokenizer):
  encoder = PromptEncoder(asked(), tokenizer)
  text = Prompt([{'role': 'user', 'content': 'color? ' * 10}])
  batch, encoded = laid_out(encoder, Prompt(QUESTION, [gray(200)]), text)
  most = len(encoded[1].ids)
  assert 16 < most < 200
  assert batch.tokens.shape == (2, 224)
  assert batch.fuse_index.shape == (2, 256, -(-most // 16) * 16)


def test_answers_do_not_depend_on_the_sizes(tokenizer):
  """T, M and L as they are rounded, and T = L, where the text of a frame is padded with as much as the video takes."""
  config = asked(visual_chunk=4)
  encoder = PromptEncoder(config, tokenizer)
  model = with_params(config.model, random_params(config.model))
  prompt = Prompt(QUESTION, [gray(21)])

  @quick_jit
  def logits(batch):
    hidden = model.hidden(batch)
    first = prefill(model, batch, batch.tokens.shape[1])[0]
    return model.decoder.logits(hidden)[0, :32], first[0]

  few, _ = laid_out(encoder, prompt)
  assert (few.tokens.shape, few.fuse_index.shape) == ((1, 32), (1, 24, 16))
  found = logits(few)
  assert np.ptp(found[1]) > 1
  for sizes in (dict(fused_text=32), dict(visuals=64), dict(length=48, fused_text=48)):
    for one, other in zip(found, logits(laid_out(encoder, prompt, **sizes)[0]), strict=True):
      np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=str(sizes))


# --- earlier answers ---


@pytest.mark.parametrize('fused', [True, False])
def test_earlier_answers_are_fused_if_the_experiment_says_so(tokenizer, fused):
  encoder = PromptEncoder(asked(prefusion=dict(fuse_history_answers=fused)), tokenizer)
  turns = [*QUESTION, {'role': 'assistant', 'content': 'dark red'}, {'role': 'user', 'content': 'why?'}]
  turns += [{'role': 'assistant', 'content': 'paint'}, {'role': 'user', 'content': 'sure?'}]
  batch, _ = laid_out(encoder, Prompt(turns, [gray(3)]))
  row, slots = batch.tokens[0], batch.slot_index[0, :3, 0]
  text = np.setdiff1d(np.flatnonzero(batch.segment_ids[0]), slots)
  for visual in range(3):
    listed = batch.fuse_index[0, visual][batch.fuse_mask[0, visual]]
    left_out = np.setdiff1d(text, listed)
    said = tokenizer.decode(row[left_out])
    assert said == ('' if fused else 'dark red<|im_end|>paint<|im_end|>')
    assert len(listed) + len(left_out) == len(text)


# --- clips ---

SHOWN = ('red', 'blue', 'green')  # a second of each


def clip(*colors: str) -> bytes:
  """An MP4 of 32×32 pixels: a second of each colour at 4 frames per second."""
  out = io.BytesIO()
  with av.open(out, 'w', format='mp4') as file:
    stream = file.add_stream('mpeg4', rate=4)
    stream.height, stream.width, stream.pix_fmt = 32, 32, 'yuv420p'
    for color in colors:
      for _ in range(4):
        pixels = np.broadcast_to(np.array(COLORS[color], np.uint8), (32, 32, 3)).copy()
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24')))
    file.mux(stream.encode())
  return out.getvalue()


def colors(batch: Batch, count: int) -> list[str]:
  """What the frames of a row show; those after the first `count` are empty."""
  pixels = batch.pixels[0, :, 0].astype(int)
  assert not pixels[count:].any()
  return nearest(pixels[:count])


def nearest(pixels: np.ndarray) -> list[str]:
  """The colour of each frame, int[frames h w 3]."""
  off = {name: np.abs(pixels - np.array(color)).max(axis=(1, 2, 3)) for name, color in COLORS.items()}
  names = [min(off, key=lambda name, i=i: off[name][i]) for i in range(len(pixels))]
  assert all(off[name][i] < 16 for i, name in enumerate(names))  # what the codec loses
  return names


@pytest.fixture
def listener(tokenizer):
  """(answerer, batches): its model is not run; what it would be shown is noted, and it says nothing."""
  config = asked(dict(video_fps=2), visual_chunk=4)
  mesh = make_mesh((1, 1, 1), devices=jax.devices()[:1])
  answerer = Answerer(Loaded(config, tokenizer, abstract_model(config.model)[0], {}, mesh, 0), max_new_tokens=1)
  heard = []
  stub = copy.copy(answerer)
  stub._generate = lambda params, batch: heard.append(batch) or jnp.full((len(batch.tokens), 1), -1)
  return stub, heard


def check_row(batch: Batch, seen: list[str]) -> None:
  """A row with such frames: each has its slot, in time order, and is fused with all of the text."""
  frames = len(seen)
  assert colors(batch, frames) == seen
  assert batch.tokens.shape[1] % 16 == 0 and batch.fuse_index.shape[2] == 16
  slots = batch.slot_index[0, :frames, 0]
  np.testing.assert_array_equal(slots, slots[0] + np.arange(frames))
  text = np.setdiff1d(np.flatnonzero(batch.segment_ids[0]), slots)
  for frame in range(frames):
    np.testing.assert_array_equal(batch.fuse_index[0, frame][batch.fuse_mask[0, frame]], text)
  assert not batch.fuse_mask[0, frames:].any()


def twice(*names: str) -> list[str]:
  """At two frames per second."""
  return [name for name in names for _ in range(2)]


@pytest.mark.usefixtures('quick_compilation')
def test_a_chat_about_a_video(tokenizer, tmp_path, capsys, monkeypatch):
  """What is shown is what was named last, each frame with its slot, and all of the text is fused with each."""
  engine = Engine(loaded(asked(dict(video_fps=2)), tokenizer), slots=1, max_length=64, visual_chunk=4)
  shown, laid = [], []
  add, look = engine.core.add, engine.views
  monkeypatch.setattr(engine, 'views', lambda media, grid: (shown.append(view) or view for view in look(media, grid)))
  monkeypatch.setattr(engine.core, 'add', lambda one, *rest: laid.append(one) or add(one, *rest))
  (tmp_path / 'clip.mp4').write_bytes(clip(*SHOWN))
  (tmp_path / 'other.mp4').write_bytes(clip('white'))
  (tmp_path / 'image.png').write_bytes(picture('yellow', (32, 32)))
  conversation = Conversation(engine, [('<video>', tmp_path / 'clip.mp4')], 3)
  for file, seen in (('', twice(*SHOWN)), ('other.mp4', twice('white')), ('image.png', ['yellow'])):
    if file:
      shown.clear()
      conversation.show(('<video>' if 'mp4' in file else '<image>', tmp_path / file))
    conversation.ask('col?')
    assert nearest(np.stack(shown)[:, 0].astype(int)) == seen
    slots = laid[-1].slots[:, 0]
    np.testing.assert_array_equal(slots, slots[0] + np.arange(len(seen)))
    np.testing.assert_array_equal(laid[-1].fused, np.setdiff1d(np.arange(len(laid[-1].tokens)), slots))
  assert len(laid) == 3 and capsys.readouterr().out.count('\n') >= 3


@pytest.mark.parametrize('images', ['real', 'blank', 'swapped'])
def test_videos_are_evaluated(listener, tmp_path, images):
  answerer, heard = listener
  clips = {'a': SHOWN, 'b': ('black', 'white')}
  turns = [{'from': 'human', 'value': '<video>\ncol?'}, {'from': 'gpt', 'value': ''}]
  data = [dict(id=name, category='', media=[clip(*shown)], conversations=turns) for name, shown in clips.items()]
  records.write(tmp_path / 'data', {'test': data}, description='for tests')
  summary = evaluate(answerer, Path(tmp_path / 'data'), 'test', tmp_path / 'out', images=images, batch_size=1)
  assert (summary['count'], len(heard)) == (2, 2)
  assert (tmp_path / 'out' / f'contact_sheet_{images}.png').is_file()
  for batch, own, other in zip(heard, 'ab', 'ba', strict=True):
    if images == 'blank':
      assert (batch.pixels[0, : 2 * len(clips[own])] == np.array(PAD_COLOR)).all()
    else:
      check_row(batch, twice(*clips[own if images == 'real' else other]))

"""Uploads, what is looked at once, the heat map, the page."""

from __future__ import annotations

import concurrent.futures
import hashlib
import re

import numpy as np
import pytest
from asking import asked, images, loaded
from PIL import Image
from serving import chat, data_uri, png, served, shows
from small_model import quick_jit
from video_clips import clip

from llava_mini_jax.data.images import ImageProcessor
from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.heat import POINTS, over_image
from llava_mini_jax.serve.limits import Limits
from llava_mini_jax.serve.media import Files, Looker
from llava_mini_jax.serve.refusal import Refused
from llava_mini_jax.train.tree import merge

pytestmark = pytest.mark.usefixtures('quick_compilation')
PATH = '/v1/chat/completions'


def test_an_uploaded_image_is_asked_about_by_its_id(server):
  data = png(images(20)[0])
  kept = server.openai.files.create(file=('photo.png', data), purpose='vision')
  assert kept.id == f'file-{hashlib.sha256(data).hexdigest()[:32]}' and (kept.bytes, kept.filename) == (
    len(data),
    'photo.png',
  )
  assert server.openai.files.retrieve(kept.id).id == kept.id
  by_id, inline = (server.ask(content=shows(source)).json() for source in (kept.id, data_uri(data)))
  assert by_id['choices'] == inline['choices']
  assert (by_id['usage']['vision'], inline['usage']['vision']) == (dict(visuals=1, reused=0), dict(visuals=1, reused=1))
  assert server.openai.files.delete(kept.id).deleted
  assert server.ask(content=shows(kept.id)).status_code == server.http.get(f'/v1/files/{kept.id}').status_code == 404


def test_an_uploaded_video(server):
  kept = server.openai.files.create(file=('clip.mp4', clip('mp4', 72)), purpose='vision')
  assert server.ask(content=shows(kept.id, video=True)).json()['usage']['vision'] == dict(visuals=3, reused=0)
  refused = server.ask(content=shows(kept.id))
  assert refused.status_code == 422 and 'expected JPEG, PNG, WEBP, GIF, BMP' in refused.json()['error']['message']


@pytest.mark.parametrize(
  ('fields', 'status'),
  [
    (dict(files=dict(file=('a', b''))), 422),
    (dict(files=dict(other=('a', b'x'))), 422),
    (dict(files=dict(other=(None, 'x'), file=(None, 'x'))), 422),
    (dict(content=b'no parts', headers={'content-type': 'multipart/form-data; boundary=x'}), 400),
    (dict(content=b'--x\r\nbad', headers={'content-type': 'multipart/form-data; boundary=x'}), 422),
    (dict(content=b'x', headers={'content-type': 'multipart/form-data'}), 400),
    (dict(files=[('file', ('a', b'x')), ('file', ('b', b'x'))]), 400),
  ],
)
def test_uploads_that_are_none(server, fields, status):
  response = server.http.post('/v1/files', **fields)
  assert response.status_code == status and '\n' not in response.json()['error']['message']


def test_files_are_bounded():
  files = Files(10)
  first, second = files.add('a', b'12345'), files.add('b', b'67890')
  assert files.get(first) == ('a', b'12345')  # used last, so it stays
  third = files.add('c', b'x')
  assert files.get(first) and files.get(third)
  with pytest.raises(Refused, match='file: expected one that was uploaded and is still kept'):
    files.get(second)
  files.add('a', b'12345')
  assert files.get(third)  # the same content takes no more room


def test_too_many_frames(engine):
  with served(engine, limits=Limits(frames=3)) as server:
    long = server.ask(content=shows(data_uri(clip('mp4', 96), 'video/mp4'), video=True))
    assert long.status_code == 422
    assert (
      long.json()['error']['message'] == 'messages.0.content.0.video_url.url: expected at most 3 frames; found more'
    )
    several = server.ask(content=shows(*(data_uri(png(image)) for image in images(1, 2, 3, 4))))
    assert several.json()['error']['message'] == 'messages: expected at most 3 images and frames; found 4'


def test_what_is_kept_is_bounded(engine):
  """By the number of images, the least recently used go first; none kept is none reused."""
  data = [png(image) for image in images(30, 31, 32)]
  looker = Looker(engine, cached=2, frames=64)

  def known(i):
    return looker.look(data[i], '<image>', 'image')[1]

  assert [known(i) for i in (0, 1, 0, 2, 0, 1)] == [False, False, True, False, True, False]
  looker = Looker(engine, cached=0, frames=64)
  assert [known(0), known(0)] == [False, False]


def test_two_that_ask_at_once_look_once(engine, monkeypatch):
  looked = []
  look = engine.core.look
  monkeypatch.setattr(engine.core, 'look', lambda keep: looked.append(1) or look(keep))
  looker, data = Looker(engine, cached=9, frames=64), png(images(40)[0])
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: looker.look(data, '<image>', 'image'), range(8)))
  assert len(looked) == 1 and len({id(visuals) for visuals, _ in found}) == 1
  assert sum(not known for _, known in found) == 1
  with pytest.raises(ValueError, match='E_IMG_FORMAT'):
    looker.look(b'x', '<image>', 'image')
  with pytest.raises(ValueError, match='E_IMG_FORMAT'):  # a failure is not kept
    looker.look(b'x', '<image>', 'image')


def test_the_heat_map_is_the_compressors_attention(server, engine):
  """Of a square image, which nothing is padded or cut off of: each patch's weight where the patch lies."""
  image = images(50, size=(32, 32))[0]
  told = server.http.post('/v1/compressor', json=dict(url=data_uri(png(image)))).json()

  @quick_jit
  def attention(params, views):
    model = merge(engine.run.graphdef, params)
    return model.compress(model.encode_views(views), return_attention=True)[2]

  weights = np.asarray(attention(engine.run.params, engine.encoder.media.views(image)[None]))[0]
  grid = round(weights.shape[1] ** 0.5)
  assert told['rows'] == told['columns'] == POINTS and len(told['weights']) == len(weights)
  found = np.array(told['weights'][0]).reshape(grid, POINTS // grid, grid, POINTS // grid)
  expected = (weights[0] / weights[0].max()).reshape(grid, 1, grid, 1)
  np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-4)


@pytest.mark.parametrize('grid', [1, 2])
@pytest.mark.parametrize('aspect', ['pad', 'crop'])
@pytest.mark.parametrize('order', ['split_then_pad', 'pad_then_split', 'resize'])
@pytest.mark.parametrize('size', [(64, 32), (32, 64), (48, 48)])
def test_the_map_lies_where_the_tower_saw(grid, aspect, order, size):
  """One bright spot in an image: the patch of the views that it brightens most maps back onto it."""
  images = ImageProcessor(32, aspect, grid, order)
  for at in ((0.3, 0.3), (0.7, 0.4), (0.55, 0.8)):
    x, y = (int(part * side) for part, side in zip(at, size, strict=True))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 255
    bright, dark = (images(Image.fromarray(some)).astype(float) for some in (pixels, np.zeros_like(pixels)))
    views = (bright - dark)[: grid * grid].sum(-1)
    raster = views.reshape(grid, grid, 32, 32).transpose(0, 2, 1, 3).reshape(grid * 32, grid * 32)
    patches = raster.reshape(grid * 4, 8, grid * 4, 8).sum((1, 3))
    if patches.max() < 255:
      continue  # cut off
    weights = np.zeros(patches.size)
    weights[patches.argmax()] = 1.0
    rows, columns = np.nonzero(over_image(weights, size, images))
    side = max(size) / (4 * grid) * (1 / grid if order == 'split_then_pad' and grid > 1 else 1) + 2
    assert abs((columns.mean() + 0.5) / POINTS * size[0] - x) <= side
    assert abs((rows.mean() + 0.5) / POINTS * size[1] - y) <= side


def test_a_model_without_queries_has_no_map(engine):
  other = Engine(loaded(asked(compressor=dict(kind='none')), engine.run.tokenizer), slots=1, max_length=64)
  with served(other) as server:
    refused = server.http.post('/v1/compressor', json=dict(url=data_uri(png(images(0)[0]))))
    assert refused.status_code == 422
    assert refused.json()['error']['message'].startswith('model: expected one that compresses by queries')
    assert server.openai.models.list().data[0].compressor == 'none'


def test_the_page_loads_nothing_from_elsewhere(server):
  reply = server.http.get('/')
  policy = reply.headers['content-security-policy']
  assert "default-src 'none'" in policy and "'unsafe" not in policy and 'http' not in policy
  assert reply.headers['content-type'] == 'text/html; charset=utf-8'
  assert not re.findall(
    r'(?:src|href)\s*=|https?:|//[a-z]+\.|@import|style="| on[a-z]+="', reply.text.split('<script>')[0]
  )
  assert policy.count("'sha256-") == 2


def test_a_prompt_of_images_alone(server):
  """No text at all is still a question."""
  assert server.http.post(PATH, json=chat(shows(data_uri(png(images(0)[0])))[:1])).is_success

"""The page in a real Chromium, headless: drop an image, see where the compressor looked, ask, ask again.

And what happens in another order: a question while the image is on its way, another image before the first is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from asking import images
from serving import png, served
from tiny_run import QUESTIONS, picture, trained

from llava_mini_jax.infer.engine import Engine
from llava_mini_jax.serve.limits import Limits

playwright = pytest.importorskip('playwright.sync_api')
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('quick_compilation')]

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def browser():
  if not CHROMIUM:
    pytest.skip('no chromium on this machine')
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  engine = Engine.from_checkpoint(trained(tmp_path_factory.getbasetemp()), slots=2, max_length=128)
  with served(engine, hosts=('127.0.0.1',)) as one:
    yield one


@pytest.fixture
def page(browser, server):
  with opened(browser, server) as page:
    yield page


@contextlib.contextmanager
def opened(browser, server):
  """Whatever it complains of fails the test."""
  page, complaints = browser.new_page(viewport=dict(width=1000, height=560)), []

  def heard(kind: str, text: str) -> None:
    if kind == 'error' and not re.search('status of (422|429)', text):  # Chromium tells every refusal
      complaints.append(text)

  page.on('console', lambda message: heard(message.type, message.text))
  page.on('pageerror', lambda error: complaints.append(str(error)))
  page.goto(server.url)
  yield page
  page.close()
  assert complaints == []


def ask(page, question: str) -> str:
  page.fill('#question', question)
  page.click('#send')
  page.wait_for_selector('#send:not([disabled])')
  return page.locator('#turns .answer').last.inner_text()


def test_drop_ask_and_ask_again(page, tmp_path):
  """The answers are the model's, the second question reuses the image, another image starts over."""
  photo = tmp_path / 'red.png'
  photo.write_bytes(picture('red'))
  page.set_input_files('#file', photo)
  page.wait_for_selector('#heat', state='visible')
  colored = page.evaluate(
    "() => Math.max(...document.getElementById('heat').getContext('2d').getImageData(0, 0, 48, 48).data"
    '.filter((value, i) => i % 4 === 3))'
  )
  assert colored > 200  # the largest weight is opaque
  assert ask(page, QUESTIONS[0]) == 'red'
  assert 'image looked at' in page.locator('#turns .note').last.inner_text()
  ask(page, QUESTIONS[1])
  assert 'image reused' in page.locator('#turns .note').last.inner_text()
  page.uncheck('#showheat')
  assert page.locator('#heat').is_hidden()
  page.check('#showheat')
  if directory := os.environ.get('LLAVA_MINI_SCREENSHOTS'):
    page.screenshot(path=Path(directory) / 'page.png')
  (tmp_path / 'blue.png').write_bytes(picture('blue'))
  page.set_input_files('#file', tmp_path / 'blue.png')
  page.wait_for_function("document.querySelectorAll('#turns p').length === 0")
  assert ask(page, QUESTIONS[0]) == 'blue'


def test_a_dropped_file_and_a_refusal(page):
  """Dropped as a user drops it; what is no image is told in words."""
  page.evaluate(
    """() => {
      const data = new DataTransfer();
      data.items.add(new File(['no image'], 'a.png', {type: 'image/png'}));
      document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
    }"""
  )
  page.wait_for_selector('#turns .error')
  assert 'expected JPEG, PNG, WEBP, GIF, BMP' in page.locator('#turns .error').inner_text()


class Uploads:
  """Holds back uploads of a page, and notes what it asks about: images by the name of their file, in order."""

  def __init__(self, page):
    self.page, self.held, self.names, self.asked = page, [], {}, []
    page.route('**/v1/files', self._upload)
    page.on('response', self._kept)
    page.on('request', self._question)

  def _upload(self, route) -> None:
    self.held.append(route)

  def go_on(self) -> None:
    """The oldest one."""
    wait_in(self.page, lambda: self.held)
    with contextlib.suppress(playwright.Error):  # the page has given it up
      self.held.pop(0).continue_()

  def _kept(self, response) -> None:
    if response.url.endswith('/v1/files') and response.ok:
      kept = response.json()
      self.names[kept['id']] = kept['filename']

  def _question(self, request) -> None:
    if request.url.endswith('/completions'):
      messages = json.loads(request.post_data)['messages']
      parts = [part for message in messages if message['role'] == 'user' for part in message['content']]
      self.asked.append([part['image_url']['url'] for part in parts if part['type'] == 'image_url'])

  def shown(self) -> list[list[str]]:
    return [[self.names[url] for url in urls] for urls in self.asked]


def wait_in(page, holds) -> None:
  for _ in range(500):
    if holds():
      return
    page.wait_for_timeout(20)
  raise AssertionError('nothing came of it')


@pytest.fixture
def uploads(browser, engine):
  limits = Limits(new_tokens=8)  # so that a second question fits
  with served(engine, hosts=('127.0.0.1',), limits=limits) as server, opened(browser, server) as page:
    yield Uploads(page)


@pytest.fixture
def photos(tmp_path):
  paths = [tmp_path / f'{name}.png' for name in 'ab']
  for path, pixels in zip(paths, images(70, 71, size=(32, 32)), strict=True):
    path.write_bytes(png(pixels))
  return paths


def start(page, question: str) -> None:
  page.fill('#question', question)
  page.click('#send')


def ended(page) -> None:
  page.wait_for_selector('#send:not([disabled])')


def test_a_question_waits_for_the_image(uploads, photos):
  """And a later one of the same chat does not send it again."""
  page = uploads.page
  page.set_input_files('#file', photos[0])
  start(page, 'first?')
  page.wait_for_timeout(300)
  assert not uploads.asked
  uploads.go_on()
  ended(page)
  start(page, 'second?')
  ended(page)
  assert uploads.shown() == [['a.png'], ['a.png']] and page.locator('#turns .error').count() == 0


def test_another_image_before_the_first_is_there(uploads, photos):
  """Questions are about the one that is shown."""
  page = uploads.page
  page.set_input_files('#file', photos[0])
  start(page, 'about the first?')
  wait_in(page, lambda: uploads.held)
  page.set_input_files('#file', photos[1])
  wait_in(page, lambda: len(uploads.held) == 2)
  first = uploads.held.pop(0)
  uploads.go_on()
  page.wait_for_selector('#heat', state='visible')
  with contextlib.suppress(playwright.Error):
    first.continue_()
  page.wait_for_timeout(500)
  start(page, 'which?')
  ended(page)
  assert uploads.shown() == [['b.png']] and page.locator('#turns .error').count() == 0


def test_an_image_after_a_question_without_one(uploads, photos):
  """It starts another chat; and one whose upload failed is sent again by the question."""
  page = uploads.page
  start(page, 'hello?')
  ended(page)
  page.set_input_files('#file', photos[0])
  wait_in(page, lambda: uploads.held)
  uploads.held.pop(0).fulfill(status=429, json=dict(error=dict(message='all places are taken')))
  page.wait_for_selector('#turns .error')
  start(page, 'and this?')
  uploads.go_on()
  ended(page)
  assert uploads.shown() == [[], ['a.png']]


def test_a_new_chat_about_the_same_image(uploads, photos):
  page = uploads.page
  page.set_input_files('#file', photos[0])
  uploads.go_on()
  start(page, 'first?')
  ended(page)
  page.click('#again')
  start(page, 'again?')
  ended(page)
  assert uploads.shown() == [['a.png'], ['a.png']] and page.locator('#turns .user').count() == 1

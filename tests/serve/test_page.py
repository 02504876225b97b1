"""The page in a real Chromium, headless: drop an image, see where the compressor looked, ask, ask again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from serving import served
from tiny_run import QUESTIONS, picture, trained

from llava_mini_jax.infer.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('quick_compilation')]

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def browser():
  driver = pytest.importorskip('playwright.sync_api')
  if not CHROMIUM:
    pytest.skip('no chromium on this machine')
  with driver.sync_playwright() as started:
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
  """Opened; whatever it complains of fails the test."""
  page, complaints = browser.new_page(viewport=dict(width=1000, height=560)), []

  def heard(kind: str, text: str) -> None:
    if kind == 'error' and 'status of 422' not in text:  # Chromium tells every refusal
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

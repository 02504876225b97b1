"""Small files that would decode to gigabytes: what refusing each costs, in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from test_image_files import png_of_size
from test_images import file_of

SECONDS, MEBIBYTES = 1.0, 256
MEASURE = """
import json, resource, sys, time
from pathlib import Path
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.images import load_image
load_image(Path(sys.argv[1]), 'good')
unit = 1 if sys.platform == 'darwin' else 1024
for path in sys.argv[2:]:
  before, start, code = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ''
  try:
    load_image(Path(path), 'here')
  except DataError as error:
    code = error.code
  seconds = time.process_time() - start
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  print(json.dumps([Path(path).name, code, seconds, grown * unit / 2**20]))
"""


def chunk(kind: bytes, body: bytes) -> bytes:
  return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes) -> bytes:
  """A whole gray PNG, all black."""
  packer = zlib.compressobj(9)
  row = bytes(1 + width)
  body = b''.join([*(packer.compress(row) for _ in range(height)), packer.flush()])
  header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  parts = [chunk(b'IHDR', header), *extra, chunk(b'IDAT', body), chunk(b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def squeezed(size: int) -> bytes:
  packer = zlib.compressobj(9)
  return b''.join([*(packer.compress(bytes(2**20)) for _ in range(size // 2**20)), packer.flush()])


BOMBS = {
  '9000 x 9000, 81 MB decoded': ('E_IMG_TOO_LARGE', lambda: png(9000, 9000)),
  '12000 x 12000': ('E_IMG_TOO_LARGE', lambda: png_of_size(12000, 12000)),
  '40000 x 40000': ('E_IMG_TOO_LARGE', lambda: png_of_size(40000, 40000)),
  '2147483647 x 2147483647': ('E_IMG_TOO_LARGE', lambda: png_of_size(2**31 - 1, 2**31 - 1)),
  '1 x 20000': ('E_IMG_ASPECT', lambda: png(1, 20000)),
  'GIF of 65535 x 65535': (
    'E_IMG_TOO_LARGE',
    lambda: b'GIF89a' + struct.pack('<HH', 65535, 65535) + file_of(Image.new('L', (1, 1)), 'GIF')[10:],
  ),
  'text of 200 MiB': (
    'E_IMG_TRUNCATED',
    lambda: png(4, 4, chunk(b'zTXt', b'a\0\0' + squeezed(200 * 2**20))),
  ),
}


@pytest.fixture(scope='module')
def measured(tmp_path_factory) -> dict[str, tuple[str, float, float]]:
  """Name -> code, seconds of CPU, MiB that the process's peak rose."""
  root = tmp_path_factory.mktemp('bombs')
  (root / 'good').write_bytes(file_of(Image.new('RGB', (8, 8))))
  for name, (_, make) in BOMBS.items():
    (root / name).write_bytes(make())
    assert (root / name).stat().st_size < 2**20
  command = [sys.executable, '-W', 'ignore', '-c', MEASURE, str(root / 'good'), *(str(root / name) for name in BOMBS)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
  assert done.returncode == 0, done.stderr
  print(done.stdout)
  return {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize('name', BOMBS)
def test_a_bomb_is_refused_at_little_cost(measured, name):
  code, seconds, grown = measured[name]
  assert code == BOMBS[name][0]
  assert seconds < SECONDS and grown < MEBIBYTES, measured[name]

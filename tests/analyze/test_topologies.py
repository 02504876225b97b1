"""Names of topologies, what they stand for, and what is said about a bad one."""

from __future__ import annotations

import os

import jax
import pytest

from llava_mini_jax.analyze import topologies
from llava_mini_jax.analyze.topologies import CHIPS, SHAPES, Topology, parse_options, topology
from llava_mini_jax.config import ConfigError
from llava_mini_jax.sharding import MeshError

NAMES = {
  'v5e-64': ('v5e', (8, 8), 1, (False, False, False)),
  'v5e-256': ('v5e', (16, 16), 1, (True, True, False)),
  'v6e:4x16': ('v6e', (4, 16), 1, (False, True, False)),
  'v5p-64': ('v5p', (4, 4, 4), 1, (True, True, True)),
  'v5p-8': ('v5p', (2, 2, 2), 1, (False, False, False)),
  'v5p:2x4x4': ('v5p', (2, 4, 4), 1, (False, False, False)),
  'tpu7x-128': ('tpu7x', (4, 4, 8), 1, (True, True, True)),
  '2xv5e-256': ('v5e', (16, 16), 2, (True, True, False)),
  '4xtpu7x-64': ('tpu7x', (4, 4, 4), 4, (True, True, True)),
}


@pytest.mark.parametrize('name', NAMES)
def test_names(name):
  found = topology(name)
  assert (found.kind, found.shape, found.slices, found.wrap) == NAMES[name]
  assert found.chip is CHIPS[found.kind]


def test_every_size_multiplies_out():
  for kind, sizes in SHAPES.items():
    for chips, shape in sizes.items():
      found = topology(f'{kind}-{chips}')
      assert 'x'.join(map(str, found.shape)) == shape
      product = 1
      for size in found.shape:
        product *= size
      assert product == chips


@pytest.mark.parametrize(
  'name', ['v5e-63', 'v5e', 'h100-8', 'v5e:8', 'v5p:8x8', 'v5e:8xx8', 'xv5e-64', 'cpu-0', 'cpu:8x', '']
)
def test_bad_names(name):
  with pytest.raises(ConfigError, match=r'^topology: expected one of v4-1\|4\|8\|') as error:
    topology(name)
  assert str(error.value).endswith(f'cpu-N, or a shape as v5e:4x8; found {name!r}')


def test_cpu_devices():
  assert topology('cpu-4').devices() == jax.devices()[:4] and topology('cpu-4').chip is None
  with pytest.raises(MeshError, match='^cpu-99: expected 99 CPU devices; found 8$'):
    topology('cpu-99').devices()


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'^v5e-4: compiling for TPUs needs libtpu; pip install "jax\[tpu\]"$'):
    topology('v5e-4').devices()


def test_the_environment_is_as_before(monkeypatch):
  """What keeps libtpu from looking for a TPU holds while it loads, and not for what is started later."""
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'mine')
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
  seen = {}

  class Described:
    devices = ()

  def describe(**arguments):
    seen.update(os.environ)
    seen.update(arguments)
    return Described

  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(topologies.topologies, 'get_topology_desc', describe)
  assert Topology('x', 'v5p', (4, 4, 4), 2).devices() == ()
  assert seen['TPU_SKIP_MDS_QUERY'] == '1' and seen['TPU_WORKER_HOSTNAMES'] == 'localhost'
  assert os.environ['TPU_WORKER_HOSTNAMES'] == 'mine' and 'TPU_SKIP_MDS_QUERY' not in os.environ
  assert (seen['topology_name'], seen['chip_config_name'], seen['num_slices']) == ('v5p:4x4x4', 'megacore', 2)


def test_compiler_options():
  assert parse_options(['a=true', 'b=False', 'c=x=1']) == {'a': True, 'b': False, 'c': 'x=1'}
  with pytest.raises(ConfigError, match="^compiler_options: expected NAME=VALUE; found 'a'$"):
    parse_options(['a'])

"""A Hugging Face checkpoint, recognised: its family, what its config says, and parameters read from it one by one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.hf_config import HfParts, parts_from_hf
from llava_mini_jax.convert.names import FAMILIES, PROJECTOR, Names, from_torch, wanted_tensors
from llava_mini_jax.convert.tensor_files import FLOATS, TensorFiles, read_json
from llava_mini_jax.data.errors import DataError

CONFIG, VISION_CONFIG = 'config.json', 'vision_config.json'


@dataclasses.dataclass(frozen=True)
class HfCheckpoint:
  """Parts are what config.json says, `modules` are those whose tensors are there."""

  files: TensorFiles
  names: Names
  parts: HfParts
  modules: tuple[str, ...]

  def __str__(self) -> str:
    return f'{self.files.path} ({self.names.family})'

  @property
  def keeps_unused_layers(self) -> bool:
    """Whether the vision tower is there to its end, or only as far as it is ever run."""
    return f'{self.names.vision}post_layernorm.weight' in self.files.tensors

  def faults(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Everything that keeps these parameters from being read: one line per tensor, sorted by name.

    Args:
      shapes: of the parameters wanted, by path. Of modules that none is wanted of, any tensor is allowed.
    """
    rules, stored = self.names.rules(), self.files.tensors
    wanted = wanted_tensors(rules, shapes)
    unused = {path: rule for path, rule in rules.items() if path.split('/')[0] not in {p.split('/')[0] for p in shapes}}
    allowed = [re.escape(rule.name).replace(re.escape('{i}'), r'\d+') for rule in unused.values()]
    allowed = re.compile('|'.join([*allowed, self.names.ignored]))
    faults = {}
    for name, shape in wanted.items():
      if name not in stored:
        faults[name] = f'missing, expected {list(shape)}'
      elif stored[name].shape != shape:
        faults[name] = f'expected {list(shape)}, found {stored[name]}'
      elif stored[name].dtype not in FLOATS:
        faults[name] = f'expected {", ".join(FLOATS)}, found {stored[name]}'
    for name in stored.keys() - wanted.keys():
      if name == self.names.head and 'decoder/embed_tokens' in shapes:
        if not self._same_bits(name, rules['decoder/embed_tokens'].name):
          faults[name] = f'config.json ties it to the embeddings, found another {stored[name]}'
      elif not allowed.fullmatch(name):
        faults[name] = f'unexpected, found {stored[name]}'
    return [f'{name}: {fault}' for name, fault in sorted(faults.items())]

  def layers(self, path: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A parameter in float16, bfloat16 or float32, as the checkpoint has it: layer by layer if it is stacked."""
    rule = self.names.rules()[path]
    if not rule.stacked:
      yield from_torch(self.files.read(rule.name), rule, shape)
      return
    for i in range(shape[0]):
      yield from_torch(self.files.read(rule.name.format(i=i)), rule, shape[1:])

  def _same_bits(self, a: str, b: str) -> bool:
    left, right = self.files.tensors[a], self.files.tensors.get(b)
    if right is None or (left.dtype, left.shape) != (right.dtype, right.shape) or left.dtype not in FLOATS:
      return False
    bits = f'u{FLOATS[left.dtype].itemsize}'
    return np.array_equal(self.files.read(a).view(bits), self.files.read(b).view(bits))


def open_checkpoint(path: str | os.PathLike) -> HfCheckpoint:
  """Opens a directory with config.json and weights, or a file that holds a LLaVA projector.

  Raises:
    DataError: E_FAMILY if it is none of the families known; what TensorFiles raises. ConfigError: a config of another
      architecture.
  """
  path = Path(path)
  if path.is_file():
    files = TensorFiles(path)
    for names in PROJECTOR:
      if names.anchors()['projector'] in files.tensors:
        return HfCheckpoint(files, names, HfParts(), ('projector',))
    raise DataError('E_FAMILY', str(path), f'expected a LLaVA projector; found {_some(files)}')
  if not path.is_dir():
    raise DataError('E_NO_WEIGHTS', str(path), 'no such file or directory')
  config = read_json(path / CONFIG)
  kind = config.get('model_type')
  if not any(kind in names.model_types for names in FAMILIES):
    known = sorted({known for names in FAMILIES for known in names.model_types})
    raise DataError('E_FAMILY', str(path / CONFIG), f'expected model_type {", ".join(known)}; found {kind!r}')
  files = TensorFiles(path)
  vision = read_json(path / VISION_CONFIG) if (path / VISION_CONFIG).is_file() else None
  without = {'prefusion'} if config.get('prefusion_layer_num') == 0 else set()
  for names in FAMILIES:
    anchors = names.anchors()
    modules = tuple(module for module, anchor in anchors.items() if anchor in files.tensors)
    if kind in names.model_types and anchors.keys() - set(names.optional) - without <= set(modules):
      try:
        parts = parts_from_hf(config, vision)
      except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from None
      return HfCheckpoint(files, names, parts, modules)
  families = sorted({names.family for names in FAMILIES if kind in names.model_types})
  raise DataError(
    'E_FAMILY', str(path), f'model_type {kind} means {" or ".join(families)}, whose names are not there: {_some(files)}'
  )


def _some(files: TensorFiles) -> str:
  names = sorted(files.tensors)
  return f'{len(names)} tensors, such as {", ".join(names[:3])}' if names else 'no tensors'

"""Tensors on disk by name, read one at a time: what enters is a file or a directory of shards, what leaves are arrays.

safetensors files are mapped, so a tensor costs memory only while it is looked at. `.bin` files are loaded with
PyTorch's `weights_only`, which builds tensors and runs no code. Nothing else is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from llava_mini_jax.data.errors import DataError

FLOATS = {'F32': np.dtype('float32'), 'F16': np.dtype('float16'), 'BF16': np.dtype(jnp.bfloat16)}
INDEX, SINGLE, CHECKSUMS = 'model.safetensors.index.json', 'model.safetensors', 'SHA256SUMS'
_SETS = ((INDEX, SINGLE), ('pytorch_model.bin.index.json', 'pytorch_model.bin'))
_TORCH_NAMES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies. dtype: a key of FLOATS, or the name of one that cannot be read. start: byte in the file."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  start: int = 0

  def __str__(self) -> str:
    return f'{self.dtype}{list(self.shape)}'


class TensorFiles:
  """The tensors of a checkpoint.

  Args:
    path: a `.safetensors` or `.bin` file, or a directory that holds `model.safetensors` or `pytorch_model.bin`, or
      shards of either with their index.
  Raises:
    DataError: E_NO_WEIGHTS, E_WEIGHTS (damaged, or not what its name says), E_INDEX, E_NO_TORCH.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path)
    self.files, index = _locate(self.path)
    self.tensors: dict[str, Stored] = {}
    self._torch: tuple[Path, dict[str, Any]] | None = None
    for file in self.files:
      for name, stored in self._contents(file).items():
        if name in self.tensors:
          raise DataError('E_INDEX', str(file), f'{name} is also in {self.tensors[name].file.name}')
        self.tensors[name] = stored
    if index is not None:
      _check_index(self.path, index, self.tensors)

  def read(self, name: str) -> np.ndarray:
    """The tensor, read-only, of dtype float32, float16 or bfloat16; indexing it reads what is indexed.

    Raises KeyError if there is none, DataError E_DTYPE if it holds anything but floats of 16 or 32 bits.
    """
    stored = self.tensors[name]
    if stored.dtype not in FLOATS:
      raise DataError('E_DTYPE', str(stored.file), f'{name}: expected {", ".join(FLOATS)}; found {stored.dtype}')
    dtype = FLOATS[stored.dtype]
    if stored.file.suffix == '.bin':
      return _to_numpy(self._load_torch(stored.file)[name], dtype)
    if 0 in stored.shape:
      return np.empty(stored.shape, dtype)
    return np.memmap(stored.file, dtype, 'r', stored.start, stored.shape)

  def verify(self) -> None:
    """Compares the files with SHA256SUMS beside them, where there is one; reads every byte.

    Raises:
      DataError: E_CHECKSUM, naming the file.
    """
    sums = (self.path if self.path.is_dir() else self.path.parent) / CHECKSUMS
    if not sums.is_file():
      return
    lines = sums.read_text(encoding='utf-8', errors='replace').splitlines()  # damage shows as another sum
    expected = dict(reversed(line.split('  ', 1)) for line in lines if '  ' in line)
    for file in self.files:
      with file.open('rb') as stream:
        found = hashlib.file_digest(stream, 'sha256').hexdigest()
      if expected.get(file.name) != found:
        wanted = expected.get(file.name, 'no such line')
        raise DataError('E_CHECKSUM', str(file), f'expected sha256 {wanted} ({CHECKSUMS}); found {found}')

  def _contents(self, file: Path) -> dict[str, Stored]:
    if file.suffix == '.bin':
      return {
        name: Stored(file, _torch_dtype(tensor), tuple(tensor.shape)) for name, tensor in self._load_torch(file).items()
      }
    return _safetensors_header(file)

  def _load_torch(self, file: Path) -> dict[str, Any]:
    """At most one `.bin` file is open."""
    if self._torch is None or self._torch[0] != file:
      self._torch = None
      self._torch = file, _torch_tensors(file)
    return self._torch[1]


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object from a file. Raises DataError E_JSON, also for a key that occurs twice."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
      keys = [key for key, _ in pairs]
      raise ValueError(f'duplicate key {next(key for key in keys if keys.count(key) > 1)!r}')
    return result

  try:
    value = json.loads(file.read_text(encoding='utf-8'), object_pairs_hook=unique)
  except OSError as error:
    raise DataError('E_JSON', str(file), f'cannot be read ({error.strerror})') from None
  except (ValueError, RecursionError) as error:
    raise DataError('E_JSON', str(file), f'cannot be parsed: {error}') from None
  if not isinstance(value, dict):
    raise DataError('E_JSON', str(file), f'expected an object; found {type(value).__name__}')
  return value


def _locate(path: Path) -> tuple[list[Path], dict[str, str] | None]:
  """The files, and the index (tensor name -> file name) if there is one."""
  if path.is_file():
    if path.suffix not in ('.safetensors', '.bin'):
      raise DataError('E_NO_WEIGHTS', str(path), 'expected a .safetensors or .bin file')
    return [path], None
  if not path.is_dir():
    raise DataError('E_NO_WEIGHTS', str(path), 'no such file or directory')
  for index_name, single in _SETS:
    if (path / index_name).exists():
      index = _read_index(path / index_name, Path(single).suffix)
      return [path / name for name in sorted(set(index.values()))], index
    if (path / single).is_file():
      return [path / single], None
  expected = ', '.join(name for names in _SETS for name in names)
  raise DataError('E_NO_WEIGHTS', str(path), f'expected one of {expected} in it; found none')


def _read_index(file: Path, suffix: str) -> dict[str, str]:
  index = read_json(file).get('weight_map')
  if not isinstance(index, Mapping) or not index or not all(isinstance(name, str) for name in index.values()):
    raise DataError('E_INDEX', str(file), 'expected weight_map to name a file for every tensor')
  for name in sorted(set(index.values())):
    # A shard lies beside its index: anything that is more than a file name could lead elsewhere.
    if Path(name).name != name or '\\' in name or '\0' in name or Path(name).suffix != suffix:
      raise DataError('E_INDEX', str(file), f'expected names of {suffix} files beside it; found {name!r}')
    if not (file.parent / name).is_file():
      raise DataError('E_INDEX', str(file), f'shard {name} is missing')
  return dict(index)


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
  """The index and the shards must name the same tensors in the same places."""
  faults = [f'{name}: not in {index[name]} nor another shard' for name in sorted(index.keys() - tensors.keys())]
  faults += [
    f'{name}: in {tensors[name].file.name}, not in the index' for name in sorted(tensors.keys() - index.keys())
  ]
  faults += [
    f'{name}: expected in {index[name]}, found in {tensors[name].file.name}'
    for name in sorted(index.keys() & tensors.keys())
    if index[name] != tensors[name].file.name
  ]
  if faults:
    raise DataError('E_INDEX', str(path), 'the index does not describe its shards: ' + '; '.join(faults))


def _safetensors_header(file: Path) -> dict[str, Stored]:
  try:
    # Refuses what does not add up: lengths, overlaps, holes, unknown dtypes, headers of more than 100 MB.
    with safetensors.safe_open(file, 'np'):
      pass
  except (safetensors.SafetensorError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise DataError('E_WEIGHTS', str(file), f'is damaged or no safetensors file ({reason})') from None
  with file.open('rb') as stream:
    size = int.from_bytes(stream.read(8), 'little')
    pairs: list[tuple[str, Any]] = json.loads(stream.read(size), object_pairs_hook=list)
  names = [name for name, _ in pairs]
  if len(set(names)) < len(names):  # the library keeps the last one and says nothing
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError('E_WEIGHTS', str(file), f'is damaged: its header names {twice} twice')
  entries = {name: dict(entry) for name, entry in pairs if name != '__metadata__'}
  return {
    name: Stored(file, entry['dtype'], tuple(entry['shape']), 8 + size + entry['data_offsets'][0])
    for name, entry in entries.items()
  }


def _torch_tensors(file: Path) -> dict[str, Any]:
  try:
    import torch
  except ImportError:
    raise DataError(
      'E_NO_TORCH', str(file), "needs PyTorch to be read: pip install 'llava_mini_jax[convert]'"
    ) from None
  if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
    raise DataError('E_NO_TORCH', str(file), f'PyTorch {torch.__version__} reads it unsafely; expected 2.6 or newer')
  try:
    tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
  except Exception as error:  # every layer of the format raises its own kind
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise DataError('E_WEIGHTS', str(file), f'is damaged, or holds more than tensors ({reason})') from None
  if not isinstance(tensors, Mapping) or not all(
    isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
  ):
    raise DataError('E_WEIGHTS', str(file), 'expected a dictionary of tensors by name')
  return dict(tensors)


def _torch_dtype(tensor: Any) -> str:
  name = str(tensor.dtype).removeprefix('torch.')
  return _TORCH_NAMES.get(name, name)


def _to_numpy(tensor: Any, dtype: np.dtype) -> np.ndarray:
  """NumPy has no bfloat16 of its own, so the bits cross as integers."""
  import torch

  return tensor.detach().reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)

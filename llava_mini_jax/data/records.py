"""The prepared dataset: a TFDS dataset in array_record format, written and read without TensorFlow.

Enters: records, plain dicts

  {'id': str, 'category': str ('' if unknown), 'media': [bytes, ...] (the original encoded files, in the order of the
   `<image>` and `<video>` tags that stand for them), 'conversations': [{'from': str, 'value': str}, ...]}

Leaves: the same records by random access. array_record checksums every chunk,
so a damaged file raises; it never yields other data.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2  # TFDS's own copy of the protocol: no TensorFlow

from llava_mini_jax.data import video
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.staging import is_vacant, staged_directory

Record = dict[str, Any]

NAME = 'llava_mini_jax'  # of the TFDS dataset
_SPLIT_NAME = re.compile(r'[A-Za-z0-9_]+')
_KEYS = ('id', 'category', 'media', 'conversations/from', 'conversations/value')  # of a serialized record
_CHUNK, _CHUNK_BYTES = 256, 64 * 2**20  # handed to the writer at once: it rewrites its metadata on each call
MAX_MEDIA_BYTES = video.MAX_BYTES  # of a record


def features() -> tfds.features.FeaturesDict:
  """What TFDS stores of a record."""
  text = tfds.features.Text
  return tfds.features.FeaturesDict(
    {
      'id': text(),
      'category': text(),
      'media': tfds.features.Sequence(text()),  # Text is TFDS's feature for one byte string
      'conversations': tfds.features.Sequence({'from': text(), 'value': text()}),
    }
  )


@contextlib.contextmanager
def staged(directory: str | os.PathLike, *, force: bool = False) -> Iterator[Path]:
  """Yields a fresh directory beside `directory` that takes its place when the block ends well, and vanishes if not.

  Args:
    force: replace a prepared dataset. Anything else that is not empty is never replaced.
  Raises:
    DataError: E_OUT_EXISTS, before the block runs.
  """
  directory = Path(directory).absolute()
  occupied = not is_vacant(directory)
  if occupied and not (force and (directory / 'dataset_info.json').is_file()):
    reason = (
      'it is not a prepared dataset, so it is never replaced' if force else 'to replace the dataset in it, use --force'
    )
    raise DataError('E_OUT_EXISTS', str(directory), f'expected a new or empty directory; {reason}')
  with staged_directory(directory, replace=occupied) as temporary:
    yield temporary


def write(
  directory: str | os.PathLike,
  splits: Mapping[str, Iterable[Record]],
  *,
  description: str,
  force: bool = False,
  shard_size: int = 2048,
) -> dict[str, int]:
  """Writes a dataset that appears under `directory` complete or not at all.

  Args:
    splits: name -> records, consumed once, in order.
    description: what the dataset is and where it comes from; stored with it.
    force: replace an existing prepared dataset.
    shard_size: records per file.
  Returns:
    Records per split.
  Raises:
    DataError: E_OUT_EXISTS, E_SPLIT_NAME, E_EMPTY (a split without records), E_TOO_LARGE (a record whose media have
      more than 2 GiB), and what the iterables raise.
  """
  with staged(directory, force=force) as temporary:
    return write_splits(temporary, splits, description=description, shard_size=shard_size)


def write_splits(
  directory: Path, splits: Mapping[str, Iterable[Record]], *, description: str, shard_size: int = 2048
) -> dict[str, int]:
  """`write`, straight into an existing directory: for a caller that stages more than the dataset."""
  check_split_names(splits)
  identity = tfds.core.DatasetIdentity(
    name=NAME, version=tfds.core.Version('1.0.0'), data_dir=os.fspath(directory), module_name=NAME
  )
  metadata = tfds.core.MetadataDict({'sha256': {}})
  info = tfds.core.DatasetInfo(builder=identity, features=features(), description=description, metadata=metadata)
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=shard_size, file_format='array_record')
  writer.initialize_splits(list(splits))
  counts = {}
  for name, records in splits.items():
    digest, count, records = hashlib.sha256(), 0, iter(records)
    while chunk := _chunk(records):
      for record in chunk:
        _update(digest, record)
      writer.add_examples({name: chunk})
      count += len(chunk)
    if not count:
      raise empty_split(name)
    counts[name] = count
    metadata['sha256'][name] = digest.hexdigest()
  writer.close_all()
  return counts


def check_split_names(names: Iterable[str]) -> None:
  """Raises DataError E_SPLIT_NAME."""
  for name in names:
    if not _SPLIT_NAME.fullmatch(name) or name == 'all':
      raise DataError('E_SPLIT_NAME', name, 'expected letters, digits and _, and not "all"')


def empty_split(name: str) -> DataError:
  return DataError('E_EMPTY', f'split {name}', 'expected at least one record; found none')


def seal(directory: Path) -> None:
  """Reads every record of a dataset that was written elsewhere, and adds the fingerprints that `Split` asks for."""
  info = tfds.builder_from_directory(directory).info
  digests = {}
  for name in info.splits:
    split, digest = Split(directory, name, sealed=False), hashlib.sha256()
    for index in range(len(split)):
      _update(digest, split[index])
    digests[name] = digest.hexdigest()
  metadata = tfds.core.MetadataDict({'sha256': digests})
  metadata.save_metadata(directory)


def _chunk(records: Iterator[Record]) -> list[Record]:
  """The next few: videos are not piled up."""
  found, size = [], 0
  while len(found) < _CHUNK and size < _CHUNK_BYTES and (record := next(records, None)) is not None:
    bytes_here = sum(map(len, record['media']))
    check_media_bytes(bytes_here, f'sample {record["id"]!r}')
    found.append(record)
    size += bytes_here
  return found


def check_media_bytes(found: int, where: str) -> None:
  """Raises DataError E_TOO_LARGE for more bytes of media, all together, than a record holds."""
  if found > MAX_MEDIA_BYTES:
    expected = f'expected media of at most {MAX_MEDIA_BYTES} bytes in all; found {found}'
    raise DataError('E_TOO_LARGE', where, expected)


def _update(digest, record: Record) -> None:
  """Feeds a record to a hash, each part preceded by its length so that no two records look alike."""
  turns = [part for turn in record['conversations'] for part in (turn['from'], turn['value'])]
  for group in ([record['id'], record['category']], record['media'], turns):
    digest.update(len(group).to_bytes(8, 'little'))
    for part in group:
      part = part.encode() if isinstance(part, str) else part
      digest.update(len(part).to_bytes(8, 'little'))
      digest.update(part)


class Split:
  """One split, by random access. Pickles as its path, so worker processes open their own files.

  Attributes:
    directory, name: what it was opened from.
    fingerprint: sha256 of the records, as they were written.
  """

  def __init__(self, directory: str | os.PathLike, name: str, *, sealed: bool = True):
    """Args: sealed: False = it has no fingerprint yet. Raises DataError as `open_split`."""
    self.directory, self.name = Path(directory), name
    builder = _open_builder(self.directory, sealed)
    info = builder.info
    if name not in info.splits:
      raise DataError('E_NO_SPLIT', str(directory), f'expected one of {", ".join(sorted(info.splits))}; found {name!r}')
    split = info.splits[name]
    self._files = [Path(path) for path in split.filepaths]
    for path in self._files:
      if not path.is_file():
        raise DataError('E_DATASET_CORRUPT', str(path), 'the file is missing')
    self._ends = list(itertools.accumulate(split.shard_lengths))
    self.fingerprint = info.metadata['sha256'][name] if sealed else ''
    self._source = builder.as_data_source(name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

  def __reduce__(self):
    return type(self), (self.directory, self.name)

  def __len__(self) -> int:
    return self._ends[-1]

  def place(self, index: int) -> str:
    """Names record `index` in errors."""
    return f'{self.directory}: record {index} of split {self.name}'

  def __getitem__(self, index: int) -> Record:
    """Record `index`. Raises IndexError past the end, DataError E_DATASET_CORRUPT if its bytes are damaged."""
    index = index.__index__()
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    try:
      feature = tf_example_pb2.Example.FromString(self._source[index]).features.feature
      name, category, media, roles, values = (list(feature[key].bytes_list.value) for key in _KEYS)
      return {
        'id': name[0].decode(),
        'category': category[0].decode(),
        'media': media,
        'conversations': [
          {'from': role.decode(), 'value': value.decode()} for role, value in zip(roles, values, strict=True)
        ],
      }
    except Exception as error:  # a damaged file surfaces as a RuntimeError (often empty), a protobuf or a TFDS error
      path = self._files[bisect.bisect_right(self._ends, index)]
      detail = str(error).strip().splitlines()[:1] or [type(error).__name__]
      raise DataError(
        'E_DATASET_CORRUPT', f'{path}: record {index} of split {self.name}', f'cannot be read ({detail[0]})'
      ) from error


def place_of(source: Sequence[Record], index: int) -> str:
  """Where record `index` lies, for errors; '' if the source, a list of records, does not know."""
  return source.place(index) if hasattr(source, 'place') else ''


def open_split(directory: str | os.PathLike, split: str) -> Split:
  """Opens one split of a prepared dataset.

  Raises:
    DataError: E_NO_DATASET (no such directory, or no dataset in it), E_NO_SPLIT (lists those there are),
      E_DATASET_CORRUPT (damaged metadata, a missing file).
  """
  return Split(directory, split)


def _open_builder(directory: Path, sealed: bool) -> tfds.core.DatasetBuilder:
  where = str(directory)
  if not directory.is_dir():
    raise DataError('E_NO_DATASET', where, 'no such directory; prepare it with launch/prepare_data.py')
  if not (directory / 'dataset_info.json').is_file():
    raise DataError('E_NO_DATASET', where, 'not a prepared dataset (no dataset_info.json); see launch/prepare_data.py')
  try:
    builder = tfds.builder_from_directory(directory)
    info = builder.info
    digests = info.metadata.get('sha256', ()) if sealed else info.splits
    ours = set(info.features) == set(features()) and set(digests) == set(info.splits)
  except Exception as error:  # TFDS raises whatever its JSON and protobuf parsers do
    raise DataError('E_DATASET_CORRUPT', where, f'the metadata cannot be read ({type(error).__name__})') from error
  if not ours:
    raise DataError(
      'E_NO_DATASET', where, f'not written by this version of the package (name {info.name}); prepare it again'
    )
  return builder

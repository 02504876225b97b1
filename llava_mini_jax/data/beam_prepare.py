"""LLaVA-style annotation files -> a prepared dataset, by a TFDS builder on Apache Beam: one machine or a cluster.

Enters: files as `sources.read_llava` reads them, under paths that every worker sees, and Beam's pipeline options.
Leaves: the records that `records.write_splits` of `read_llava` writes, in the same order, with the same fingerprint and
refusals; where one file ends and the next begins is TFDS's choice. A worker parses an annotation file once and then
reads, decodes and checks the media of its blocks of samples. Which ids are taken is the one thing that depends on all
samples before; it is decided between the check and the writing, from the ids alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import records
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import Record
from llava_mini_jax.data.sources import Report, claim_id, entries, to_record

_BLOCK = 256  # samples that a worker takes at once

Claims = dict[int, str | tuple[str, str, str]]  # what becomes of a repeated id, by sample: another id, or an error


@dataclasses.dataclass(frozen=True)
class Source:
  """One split to be. Attributes: as the arguments of `sources.read_llava`."""

  file: str
  media_root: str | os.PathLike | None
  reserved: tuple[str, ...] = ()
  number_duplicates: bool = False


def write_splits(
  directory: Path, sources: Mapping[str, Source], *, description: str, options: Sequence[str] = ()
) -> dict[str, Report]:
  """Writes a dataset straight into an existing directory (`records.staged`).

  Args:
    sources: by the name of the split that each becomes.
    options: of Beam, as on its command line: `--runner=DirectRunner`, `--direct_num_workers=4`, ...
  Returns:
    What became of the samples of each split.
  Raises:
    ConfigError: Apache Beam is not installed.
    DataError: E_NO_SOURCE, E_JSON, E_SPLIT_NAME, E_EMPTY.
  """
  pipeline_options = _pipeline_options(options)
  records.check_split_names(sources)
  counts = {name: len(_parsed(source.file)) for name, source in sources.items()}
  for name, count in counts.items():
    if not count:
      raise records.empty_split(name)
  refused = directory / 'refused'
  refused.mkdir()
  builder = _builder_class()(sources, counts, refused, description=description, data_dir=os.fspath(directory / 'tfds'))
  config = tfds.download.DownloadConfig(
    beam_options=pipeline_options, compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
  )
  try:
    builder.download_and_prepare(file_format='array_record', download_config=config)
  except ValueError as error:
    if 'generated examples is 0' not in str(error):
      raise
    message = 'expected at least one record; every sample of a split was refused: without Beam you see why'
    raise DataError('E_EMPTY', ', '.join(sources), message) from error
  reports = {name: _report(refused, name, counts[name]) for name in sources}
  for path in Path(builder.data_dir).iterdir():
    path.rename(directory / path.name)
  shutil.rmtree(directory / 'tfds')
  shutil.rmtree(refused)
  records.seal(directory)
  return reports


def _pipeline_options(options: Sequence[str]) -> Any:
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ConfigError("beam: expected the package apache-beam; pip install 'llava_mini_jax[beam]'") from error
  return PipelineOptions(list(options))


def _parsed(file: str) -> list[tuple[str, Any]]:
  """All entries of a file: a process that gets several of its blocks parses it once."""
  version = os.stat(file) if os.path.exists(file) else None
  return _parsed_version(file, *((version.st_mtime_ns, version.st_size) if version else (0, 0)))


@functools.lru_cache(maxsize=2)
def _parsed_version(file: str, changed: int, size: int) -> list[tuple[str, Any]]:
  del changed, size
  return list(entries(file))


def _checked(block: tuple[int, int], source: Source) -> Iterator[tuple[int, str, Record | None, Any]]:
  """(number, place, record or None, None or why not) of each sample of a block."""
  for number in range(*block):
    place, value = _parsed(source.file)[number]
    try:
      record = to_record(value, source.media_root, source.reserved, place)
    except DataError as error:
      yield number, place, None, (error.code, error.where, error.message)
    else:
      yield number, place, record, None


def _claims(found: Iterable[tuple[int, str, str]], number_duplicates: bool) -> Claims:
  """(number, place, id) of all good samples, in any order -> what becomes of those whose id is taken."""
  seen: dict[str, str] = {}
  claims: Claims = {}
  for number, place, name in sorted(found):
    try:
      claimed = claim_id(name, place, seen, number_duplicates)
    except DataError as error:
      claims[number] = (error.code, error.where, error.message)
    else:
      if claimed != name:
        claims[number] = claimed
  return claims


def _settle(checked: tuple[int, str, Record | None, Any], claims: Claims) -> tuple[int, Record | None, Any]:
  """A sample once it is known which ids are taken."""
  number, _, record, error = checked
  claim = claims.get(number)
  if isinstance(claim, str):
    record = {**record, 'id': claim}
  elif claim is not None:
    record, error = None, claim
  return number, record, error


def _report(directory: Path, name: str, count: int) -> Report:
  lines = [line for path in directory.glob(f'{name}-*') for line in path.read_text().splitlines()]
  refused = [DataError(*error) for _, error in sorted(map(json.loads, lines))]
  return Report(kept=count - len(refused), refused=refused)


@functools.cache
def _builder_class() -> type:
  """The TFDS builder. Made when it is asked for, since Beam is an extra."""
  import apache_beam as beam

  class LlavaMiniJax(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    name = records.NAME

    def __init__(self, sources: Mapping[str, Source], counts: Mapping[str, int], refused: Path, *, description, **rest):
      self._sources, self._counts, self._refused, self._description = sources, counts, refused, description
      super().__init__(**rest)

    def _info(self) -> tfds.core.DatasetInfo:
      # Keys are the numbers of samples: without shuffling they are the order.
      return tfds.core.DatasetInfo(
        builder=self, features=records.features(), description=self._description, disable_shuffling=True
      )

    def _split_generators(self, dl_manager, pipeline):
      return {name: self._generate_examples(pipeline, name) for name in self._sources}

    def _generate_examples(self, pipeline, name: str):
      source, count = self._sources[name], self._counts[name]
      blocks = [(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
      checked = (
        pipeline
        | f'{name}: blocks' >> beam.Create(blocks)
        | f'{name}: spread' >> beam.Reshuffle()
        | f'{name}: check' >> beam.FlatMap(_checked, source)
      )
      claims = (
        checked
        | f'{name}: good' >> beam.Filter(lambda found: found[2] is not None)
        | f'{name}: ids' >> beam.Map(lambda found: (found[0], found[1], found[2]['id']))
        | f'{name}: together' >> beam.combiners.ToList()
        | f'{name}: claims' >> beam.Map(_claims, source.number_duplicates)
      )
      settled = checked | f'{name}: settle' >> beam.Map(_settle, beam.pvalue.AsSingleton(claims))
      _ = (
        settled
        | f'{name}: bad' >> beam.Filter(lambda found: found[1] is None)
        | f'{name}: lines' >> beam.Map(lambda found: json.dumps([found[0], found[2]]))
        | f'{name}: refused' >> beam.io.WriteToText(os.fspath(self._refused / name))
      )
      return (
        settled
        | f'{name}: kept' >> beam.Filter(lambda found: found[1] is not None)
        | f'{name}: examples' >> beam.Map(lambda found: found[:2])
      )

  return LlavaMiniJax

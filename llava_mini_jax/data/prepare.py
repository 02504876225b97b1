"""Annotation files, the data set embedded in a package, or generated scenes -> a prepared dataset directory.

Leaves: `<out>/` with the array_record files (`records.open_split`), `tokenizer/` trained on the `train` split, and
`summary.json`: what was kept, what was refused and why. It appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.config import ConfigError
from llava_mini_jax.data import easy_vqa, records
from llava_mini_jax.data.beam_prepare import Source, write_splits
from llava_mini_jax.data.conversation import MEDIA_TAG, special_tokens
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.records import Record
from llava_mini_jax.data.scenes import Scenes
from llava_mini_jax.data.scenes import splits as scene_splits
from llava_mini_jax.data.sources import Report, read_llava
from llava_mini_jax.data.tokenizer import (
  SPECIAL_TOKENS,
  fingerprint,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
)

EASY_VQA, SCENES = BUILT_IN = 'easy_vqa', 'scenes'  # sources that are no files and bring their own splits
_LISTED = 20  # refusals shown; summary.json holds them all

Progress = Callable[[Iterable[Record], str], Iterable[Record]]


@dataclasses.dataclass
class _Split:
  """A split to be: its records, yet to be read, and what is known once they are."""

  file: str
  records: Iterator[Record]
  report: Report
  source: Source | None = None  # where the records come from, if that is an annotation file


def prepare(
  files: Sequence[str],
  out: str | os.PathLike,
  *,
  splits: Sequence[str] = ('train',),
  media_roots: Sequence[str | os.PathLike] = (),
  tokenizer: str | os.PathLike = '',
  tokenizer_vocab_size: int = 512,
  max_refused: float = 0.0,
  number_duplicates: bool = False,
  force: bool = False,
  beam: Sequence[str] | None = None,
  scenes: Scenes | None = None,
  progress: Progress = lambda iterable, split: iterable,
) -> dict[str, Any]:
  """Reads, checks and writes; see the module docstring.

  Args:
    files: LLaVA-style annotation files (`sources.read_llava`); or 'easy_vqa' or 'scenes' alone, which
      bring their own splits.
    splits: the name of the split that each file becomes.
    media_roots: where the image and video paths of each file are relative to; one = the same for all, none = text only.
    tokenizer: HF directory of the tokenizer to use: text that spells one of its special tokens is refused, and it is
      stored with the dataset. '' = train one.
    tokenizer_vocab_size: of the tokenizer to train; 0 = none.
    max_refused: share of a file's samples that may be refused. With the default any refusal fails the whole, after
      all samples of the file were looked at, so that one run shows everything there is to mend in it.
    number_duplicates: as `sources.read_llava`.
    force: replace an existing prepared dataset.
    beam: options of an Apache Beam pipeline that does the work (`beam_prepare`), with the same result. None = this
      process does it.
    scenes: which ones, with the source 'scenes'; None = the default.
    progress: without Beam, wraps the records of a split, e.g. in a progress bar.
  Returns:
    What `summary.json` holds: {'splits': {name: {'records': int, 'refused': int, 'source': str}}, 'refused': [{'code',
    'where', 'reason'}], 'tokenizer': {'size': int, 'sha256': str} or None}.
  Raises:
    ConfigError: files, splits and media roots that do not pair.
    DataError: E_REFUSED (more than max_refused; lists the first), E_OUT_EXISTS, E_SPLIT_NAME, E_EMPTY, E_NO_SOURCE,
      E_JSON, E_VOCAB_SIZE.
  """
  given = load_tokenizer(tokenizer) if tokenizer else None
  reserved = special_tokens(given) if given else SPECIAL_TOKENS if tokenizer_vocab_size else ()
  if not 0 <= max_refused <= 1:
    raise ConfigError(f'max_refused: expected a share from 0 to 1; found {max_refused}')
  with records.staged(out, force=force) as directory:
    scenes = scenes or Scenes()
    found = _open(files, splits, media_roots, reserved, number_duplicates, scenes)
    description = f'LLaVA-style samples of {", ".join(files)}'
    description = {EASY_VQA: easy_vqa.DESCRIPTION, SCENES: scenes.description}.get(files[0], description)
    if beam is None:
      iterators = {name: _checked(name, split, max_refused, progress) for name, split in found.items()}
      records.write_splits(directory, iterators, description=description)
    else:
      _write_on_beam(directory, found, beam, max_refused, description)
    summary = {
      'splits': {
        name: {'records': split.report.kept, 'refused': len(split.report.refused), 'source': split.file}
        for name, split in found.items()
      },
      'refused': [
        {'code': error.code, 'where': error.where, 'reason': error.message}
        for split in found.values()
        for error in split.report.refused
      ],
      'tokenizer': None,
    }
    if not given and tokenizer_vocab_size:
      learnt_from = ['train'] if 'train' in found else list(found)
      given = train_tokenizer(_texts(directory, learnt_from), tokenizer_vocab_size)
    if given:
      save_tokenizer(given, directory / 'tokenizer')
      summary['tokenizer'] = {'size': len(given), 'sha256': fingerprint(given)}
    (directory / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
  return summary


def parse_shard(text: str) -> tuple[int, int]:
  """'I/N' -> (I, N). Raises ConfigError for anything else, and unless 0 <= I < N."""
  index, slash, count = text.partition('/')
  if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
    raise ConfigError(f'shard: expected I/N with I from 0 to N - 1; found {text!r}')
  return int(index), int(count)


def describe(summary: dict[str, Any]) -> str:
  """The summary in a few lines: counts by split, the first refusals, the tokenizer."""
  lines = [
    f'{name}: {split["records"]} records from {split["source"]}, {split["refused"]} refused'
    for name, split in summary['splits'].items()
  ]
  lines += _listing([f'{entry["code"]}: {entry["where"]}: {entry["reason"]}' for entry in summary['refused']])
  if summary['tokenizer']:
    lines.append(f'tokenizer: {summary["tokenizer"]["size"]} tokens')
  return '\n'.join(lines)


def _open(
  files: Sequence[str],
  splits: Sequence[str],
  media_roots: Sequence[str | os.PathLike],
  reserved: Sequence[str],
  number_duplicates: bool,
  scenes: Scenes,
) -> dict[str, _Split]:
  if built_in := next((file for file in files if file in BUILT_IN), None):
    if len(files) > 1:
      raise ConfigError(f'source: {built_in} brings its own splits and cannot be joined with {len(files) - 1} more')
    if media_roots or tuple(splits) != ('train',):
      raise ConfigError(f'source: {built_in} brings its own splits and images; expected no split and no media root')
    own = easy_vqa.splits() if built_in == EASY_VQA else scene_splits(scenes)
    reports = {name: Report() for name in own}
    return {name: _Split(built_in, _counted(found, reports[name]), reports[name]) for name, found in own.items()}
  if len(files) != len(splits) or len(set(splits)) < len(splits) or not files:
    raise ConfigError(
      f'split: expected a name of its own for each of {len(files)} source(s); found {", ".join(splits)}'
    )
  roots = list(media_roots) or [None]
  if len(roots) not in (1, len(files)):
    raise ConfigError(f'media_root: expected one, or one for each of {len(files)} source(s); found {len(roots)}')
  found = {}
  for file, name, root in zip(files, splits, roots * (len(files) // len(roots)), strict=True):
    report = Report()
    samples = read_llava(file, root, report, reserved=reserved, number_duplicates=number_duplicates)
    found[name] = _Split(file, samples, report, Source(file, root, tuple(reserved), number_duplicates))
  return found


def _counted(found: Iterator[Record], report: Report) -> Iterator[Record]:
  for record in found:
    report.kept += 1
    yield record


def _checked(name: str, split: _Split, max_refused: float, progress: Progress) -> Iterator[Record]:
  """Passes records on; at their end, raises E_REFUSED if too many were refused."""
  yield from progress(split.records, name)
  _check_refused(split, max_refused)


def _write_on_beam(
  directory: Path, found: dict[str, _Split], options: Sequence[str], max_refused: float, description: str
) -> None:
  if built_in := next((split.file for split in found.values() if split.file in BUILT_IN), None):
    raise ConfigError(f'source: {built_in} is no annotation file; expected annotation files with Beam')
  sources = {name: split.source for name, split in found.items()}
  reports = write_splits(directory, sources, description=description, options=options)
  for name, split in found.items():
    split.report = reports[name]
    _check_refused(split, max_refused)


def _check_refused(split: _Split, max_refused: float) -> None:
  report = split.report
  refused = len(report.refused)
  if report.refused_share > max_refused:
    head = f'{refused} of {refused + report.kept} sample(s) refused, allowed are {max_refused:.2%} (--max_refused):'
    raise DataError('E_REFUSED', split.file, '\n'.join([head, *_listing([str(error) for error in report.refused])]))


def _listing(lines: list[str]) -> list[str]:
  more = len(lines) - _LISTED
  return [f'  {line}' for line in lines[:_LISTED]] + ([f'  and {more} more'] if more > 0 else [])


def _texts(directory: Path, splits: list[str]) -> Iterator[str]:
  """What the splits just written say, tags apart."""
  for name in splits:
    split = records.open_split(directory, name)
    for index in range(len(split)):
      for turn in split[index]['conversations']:
        yield MEDIA_TAG.sub('', turn['value']).strip()

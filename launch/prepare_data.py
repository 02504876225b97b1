"""Prepares a dataset: checks every sample, writes array_record files, and trains a tokenizer on them.

python launch/prepare_data.py --source=easy_vqa --out=data/easy_vqa
python launch/prepare_data.py --source=train.json,val.jsonl --split=train,validation --media_root=images --out=data/mine
"""

from absl import flags
from tqdm import tqdm

from llava_mini_jax.cli import launch
from llava_mini_jax.data.prepare import describe, prepare

_SOURCE = flags.DEFINE_list('source', None, 'easy_vqa, or LLaVA-style .json/.jsonl files.')
_SPLIT = flags.DEFINE_list('split', ['train'], 'The split that each source file becomes.')
_MEDIA_ROOT = flags.DEFINE_list(
  'media_root', [], 'Directory that image and video paths are relative to; one for all sources, or one each.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory to write.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'HF tokenizer directory to check the text against and to store.')
_VOCAB_SIZE = flags.DEFINE_integer(
  'tokenizer_vocab_size', 512, 'Most tokens of the tokenizer that is trained; 0 = train none.', lower_bound=0
)
_MAX_REFUSED = flags.DEFINE_float(
  'max_refused', 0.0, 'Share of bad samples to leave out instead of failing.', lower_bound=0.0, upper_bound=1.0
)
_NUMBER_DUPLICATES = flags.DEFINE_bool(
  'number_duplicates', False, 'Keep samples with an id that occurred before, as ID#2, ID#3, ...'
)
_FORCE = flags.DEFINE_bool('force', False, 'Replace the prepared dataset in --out.')
flags.mark_flags_as_required(['source', 'out'])


def main(_) -> None:
  summary = prepare(
    _SOURCE.value,
    _OUT.value,
    splits=_SPLIT.value,
    media_roots=_MEDIA_ROOT.value,
    tokenizer=_TOKENIZER.value,
    tokenizer_vocab_size=_VOCAB_SIZE.value,
    max_refused=_MAX_REFUSED.value,
    number_duplicates=_NUMBER_DUPLICATES.value,
    force=_FORCE.value,
    progress=lambda records, split: tqdm(records, desc=split, unit=' records'),
  )
  print(describe(summary))
  print(f'written to {_OUT.value}')


if __name__ == '__main__':
  launch(main)

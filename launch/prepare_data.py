"""Prepares a dataset: checks every sample, writes array_record files, and trains a tokenizer on them.

python launch/prepare_data.py --source=easy_vqa --out=data/easy_vqa
python launch/prepare_data.py --source=scenes --scenes=20000 --seed=0 --out=data/scenes
python launch/prepare_data.py --source=train.json,val.jsonl --split=train,validation --media_root=images --out=data/mine
python launch/prepare_data.py --features --config=configs/llava_mini_vicuna_7b.py:stage1 --out=data/features --shard=0/4
python launch/prepare_data.py --source=train.json --media_root=images --out=data/mine --beam=--runner=DirectRunner
The fourth runs a config's frozen vision tower (that of train.init_from) over its dataset; --config.data.features then
names what it wrote. Killed, it goes on when it is called again.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from llava_mini_jax.cli import launch
from llava_mini_jax.data.features import DTYPES
from llava_mini_jax.data.prepare import describe, parse_shard, prepare
from llava_mini_jax.data.scenes import Scenes
from llava_mini_jax.experiment import Experiment
from llava_mini_jax.train.features import write_features

_SOURCE = flags.DEFINE_list('source', None, 'easy_vqa, scenes, or LLaVA-style .json/.jsonl files.')
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
_SCENES = flags.DEFINE_integer('scenes', 20_000, 'Scenes to generate for the split train; a tenth for test.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the scenes.')
_SCENE_PIXELS = flags.DEFINE_integer('scene_pixels', 64, 'Width and height of a scene.')
_BEAM = flags.DEFINE_multi_string('beam', None, 'An option of Apache Beam, which then does the work; may be repeated.')
_FEATURES = flags.DEFINE_bool('features', False, "Instead: write what a config's vision tower makes of its dataset.")
_CONFIG = config_flags.DEFINE_config_file('config', help_string='Features: experiment, FILE.py or FILE.py:arguments.')
_SHARD = flags.DEFINE_string('shard', '0/1', 'Features: I/N, this process of N that share the work.')
_DTYPE = flags.DEFINE_enum('features_dtype', 'bfloat16', DTYPES, 'Features: dtype stored.')
_BATCH = flags.DEFINE_integer('batch_size', 64, 'Features: images or frames at a time.', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 4, 'Features: threads that decode images.', lower_bound=1)
flags.mark_flag_as_required('out')
flags.register_multi_flags_validator(
  ['source', 'features', 'config'],
  lambda given: bool(given['features']) == bool(given['config']) != bool(given['source']),
  message='expected --source, or --features with --config',
)


def features() -> None:
  shard_index, shard_count = parse_shard(_SHARD.value)
  count = write_features(
    Experiment.from_dict(_CONFIG.value),
    Path(_OUT.value),
    dtype=_DTYPE.value,
    batch_size=_BATCH.value,
    shard_index=shard_index,
    shard_count=shard_count,
    threads=_THREADS.value,
    report=lambda line: print(line, flush=True),
    progress=lambda split, records: tqdm(total=records, desc=split.name, unit=' records').update,
  )
  print(f'{count:,} images and frames encoded; written to {_OUT.value}')


def main(_) -> None:
  if _FEATURES.value:
    return features()
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
    beam=_BEAM.value,
    scenes=Scenes(_SCENES.value, _SEED.value, _SCENE_PIXELS.value),
    progress=lambda records, split: tqdm(records, desc=split, unit=' records'),
  )
  print(describe(summary))
  print(f'written to {_OUT.value}')


if __name__ == '__main__':
  launch(main)

"""Hugging Face checkpoints in and out.

python launch/convert.py import --from=llava-mini-llama-3.1-8b --to=runs/released
python launch/convert.py import --vision=clip-vit-large-patch14-336 --decoder=vicuna-7b-v1.5 --to=runs/start
python launch/convert.py export --from=runs/mine --to=mine-hf
Import reads LLaVA-Mini, LLaVA-v1.5 (either naming), or parts: a CLIP tower, a Llama, a LLaVA projector.
"""

from absl import flags
from tqdm import tqdm

from llava_mini_jax.cli import launch
from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.import_model import Sources, describe, import_model

_FROM = flags.DEFINE_string('from', '', 'Import: checkpoint that is a whole model. Export: directory of the run.')
_TO = flags.DEFINE_string('to', None, 'Directory to write.')
_MAX_SHARD = flags.DEFINE_string('max_shard_size', '5GB', 'Largest file; a larger tensor gets a file of its own.')
_VISION = flags.DEFINE_string('vision', '', 'Import: CLIP checkpoint; replaces the tower of --from.')
_DECODER = flags.DEFINE_string('decoder', '', 'Import: Llama checkpoint; replaces the decoder of --from.')
_PROJECTOR = flags.DEFINE_string('projector', '', 'Import: LLaVA checkpoint or mm_projector file; of parts: or random.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'Import: tokenizer directory; default that of the decoder.')
_TEMPLATE = flags.DEFINE_string('template', '', 'Import: conversation template; default by the special tokens.')
_GRID = flags.DEFINE_integer('compressor_grid', 1, 'Import of parts: an image costs grid² tokens.', lower_bound=1)
_LAYERS = flags.DEFINE_integer('prefusion_layers', 4, 'Import of parts: pre-fusion layers.', lower_bound=0)
_INIT = flags.DEFINE_enum('prefusion_init', 'random', ['random', 'decoder'], 'Import of parts: what they begin as.')
_SEED = flags.DEFINE_integer('seed', 0, 'Import of parts: of what is random.')
_STEP = flags.DEFINE_integer('step', None, 'Export: checkpoint step; default the newest.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Export: dtype of the tensors.')
_MERGE = flags.DEFINE_bool('merge_lora', False, 'Export: add the LoRA adapters of the run to its kernels.')
_BASE = flags.DEFINE_string('base', '', 'Export: the run that they were trained on, if it has moved.')
flags.mark_flags_as_required(['to'])


def main(argv) -> None:
  if argv[1:] not in (['import'], ['export']):
    raise ConfigError(f'expected import or export; found {" ".join(argv[1:])!r}')
  with tqdm(unit=' tensors') as bar:
    options = dict(max_shard_size=_MAX_SHARD.value, progress=lambda _: bar.update())
    if argv[1] == 'export':
      options |= dict(step=_STEP.value, dtype=_DTYPE.value, merge_lora=_MERGE.value, base=_BASE.value)
      export_model(_FROM.value, _TO.value, **options)
    else:
      sources = Sources(
        whole=_FROM.value,
        vision=_VISION.value,
        decoder=_DECODER.value,
        projector=_PROJECTOR.value,
        compressor_grid=_GRID.value,
        prefusion_layers=_LAYERS.value,
        prefusion_init=_INIT.value,
        seed=_SEED.value,
      )
      print(describe(import_model(sources, _TO.value, tokenizer=_TOKENIZER.value, template=_TEMPLATE.value, **options)))
  print(f'written to {_TO.value}')


if __name__ == '__main__':
  launch(main, arguments=True)

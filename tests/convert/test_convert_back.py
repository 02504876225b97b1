"""What an export keeps besides its tensors: modules that are not there, the template, how images are cut."""

from __future__ import annotations

import hf_directories as hf
import pytest

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.data.errors import DataError


def test_no_prefusion_out_and_in(tmp_path):
  """A LLaVA-Mini without pre-fusion has no tensor of it, and comes back; one that has layers needs them."""
  clip, llama = hf.clip(tmp_path / 'clip'), hf.llama(tmp_path / 'llama')
  parts = Sources(vision=str(clip), decoder=str(llama), prefusion_layers=0)
  experiment = import_model(parts, tmp_path / 'run')
  export_model(tmp_path / 'run', tmp_path / 'out')
  assert import_model(Sources(whole=str(tmp_path / 'out')), tmp_path / 'again') == experiment
  names = ('SHA256SUMS', 'model.safetensors')
  first, second = ([(tmp_path / run / 'weights' / name).read_bytes() for name in names] for run in ('run', 'again'))
  assert first == second
  layers = hf.edited(tmp_path / 'out', tmp_path / 'layers', lambda c: c.update(prefusion_layer_num=1))
  with pytest.raises(DataError) as error:
    import_model(Sources(whole=layers), tmp_path / 'refused')
  assert str(error.value).startswith(
    f'E_FAMILY: {layers}: model_type llava_mini_llama means LLaVA-Mini, whose names are not there: '
  )


def test_the_template_follows_the_export(tmp_path):
  """Not the tokenizer, unless there is none in it; what images are cut into comes from config.json."""
  source = hf.released(tmp_path / 'hf')
  experiment = import_model(Sources(whole=str(source)), tmp_path / 'a', template='vicuna_v1')
  assert (experiment.data.template, experiment.data.grid_order) == ('vicuna_v1', 'split_then_pad')
  export_model(tmp_path / 'a', tmp_path / 'out')
  assert import_model(Sources(whole=str(tmp_path / 'out')), tmp_path / 'b') == experiment
  high = hf.edited(tmp_path / 'out', tmp_path / 'high', lambda c: c.update(resolution_ratio=2, image_aspect_ratio=None))
  data = import_model(Sources(whole=high), tmp_path / 'c', template='qa').data
  assert (data.template, data.grid, data.aspect) == ('qa', 2, 'crop')
  assert export_model(tmp_path / 'c', tmp_path / 'again')['resolution_ratio'] == 2
  lost = hf.edited(tmp_path / 'out', tmp_path / 'lost', lambda c: c['llava_mini_jax'].update(template='lost.jinja'))
  with pytest.raises(ConfigError, match=r"^template: expected one of .* or a file; found 'lost.jinja'$"):
    import_model(Sources(whole=lost), tmp_path / 'd')
  assert not (tmp_path / 'd').exists()

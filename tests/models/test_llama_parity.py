"""The decoder equals `transformers.LlamaForCausalLM` on random tiny configurations: every stage, greedy generation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from small_model import quick_jit
from torch_parity import close, load, randomize

from llava_mini_jax.config import DecoderConfig, LlavaMiniConfig, RopeScaling, ScanConfig
from llava_mini_jax.convert.released import to_released
from llava_mini_jax.infer.generate import generate
from llava_mini_jax.models.decoder import Decoder
from llava_mini_jax.train.tree import abstract_model, merge, parameter_shapes
from llava_mini_jax.types import Batch

BASE = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=8,
)
CONFIGS = {
  'mha': BASE,
  # Original length 64: of the eight frequencies some are kept, one blends and some are slowed down.
  'gqa_llama3_rope': dataclasses.replace(
    BASE,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=500.0,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
  ),
  'one_kv_head_tied': dataclasses.replace(
    BASE,
    num_hidden_layers=2,
    num_key_value_heads=1,
    head_dim=12,
    rope_theta=100000.0,
    rms_norm_eps=1e-2,
    tie_word_embeddings=True,
  ),
}
LENGTHS = (13, 11)
NEW_TOKENS = 8


def torch_model(config: DecoderConfig, seed: int) -> transformers.LlamaForCausalLM:
  sizes = dataclasses.asdict(config)
  scaling = sizes.pop('rope_scaling')
  rope = dict(rope_type='llama3', **scaling) if scaling['factor'] != 1.0 else dict(rope_type='default')
  special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
  rope['rope_theta'] = sizes.pop('rope_theta')
  hf = transformers.LlamaConfig(**sizes, **special, rope_parameters=rope, attn_implementation='eager')
  model = transformers.LlamaForCausalLM(hf).eval()
  randomize(model, seed)
  return model


@dataclasses.dataclass
class Pair:
  config: DecoderConfig
  torch: transformers.LlamaForCausalLM
  tensors: dict[str, np.ndarray]
  decoder: Decoder
  params: dict[str, np.ndarray]
  prompts: list[np.ndarray]

  def hidden_states(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """torch's hidden states (embeddings, each layer's output, the last one normed) and logits of one sequence."""
    with torch.no_grad():
      out = self.torch(torch.tensor(ids)[None].long(), output_hidden_states=True)
    return [state[0].numpy() for state in out.hidden_states], out.logits[0].numpy()


@pytest.fixture(scope='module', params=CONFIGS)
def pair(request) -> Pair:
  config = CONFIGS[request.param]
  model = torch_model(config, seed=list(CONFIGS).index(request.param))
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  decoder, params = load(lambda rngs: Decoder(config, scan=ScanConfig(remat='none'), rngs=rngs), 'decoder', tensors)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, config.vocab_size, n, dtype=np.int32) for n in LENGTHS]
  return Pair(config, model, tensors, decoder, params, prompts)


def test_every_stage_in_padded_and_in_packed_rows(pair):
  """Row 0 and 1 hold one sequence and padding, row 2 both sequences; torch runs each sequence alone."""
  length = sum(LENGTHS)
  places = [(0, 0, 0), (1, 0, 1), (2, 0, 0), (2, LENGTHS[0], 1)]  # row, start, which sequence
  tokens, positions, segments = (np.zeros((3, length), np.int32) for _ in range(3))
  for number, (row, start, which) in enumerate(places):
    at = slice(start, start + LENGTHS[which])
    tokens[row, at], positions[row, at] = pair.prompts[which], np.arange(LENGTHS[which])
    segments[row, at] = number + 1

  @quick_jit
  def run(tokens):
    x = pair.decoder.embed(tokens)
    normed, layers = pair.decoder(x, positions, segments, return_hidden=True)
    return x, layers, normed, pair.decoder.logits(normed)

  embedded, layers, normed, logits = run(tokens)
  assert len(layers) == pair.config.num_hidden_layers
  for row, start, which in places:
    states, expected_logits = pair.hidden_states(pair.prompts[which])
    at = (row, slice(start, start + LENGTHS[which]))
    close(embedded[at], states[0], 'embeddings')
    for i, expected in enumerate(states[1:-1]):
      close(layers[i][at], expected, f'row {row}: output of layer {i}')
    close(normed[at], states[-1], f'row {row}: normed hidden states')
    close(logits[at], expected_logits, f'row {row}: logits')


def test_names_cover_the_whole_decoder_both_ways(pair):
  tensors = to_released(pair.params)
  tied = {'lm_head.weight'} if pair.config.tie_word_embeddings else set()
  assert tensors.keys() == pair.tensors.keys() - tied
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, pair.tensors[name], err_msg=name)


@pytest.fixture(scope='module')
def greedy(pair):
  """(tokens, logits) of torch for every prompt alone, and a function that generates for all of them in one batch."""
  prompts = [pair.prompts[0][:9], pair.prompts[1][:5], pair.prompts[1][:1]]
  expected = []
  for ids in prompts:
    out = pair.torch.generate(
      torch.tensor(ids)[None].long(),
      attention_mask=torch.ones(1, len(ids), dtype=torch.long),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      output_logits=True,
      return_dict_in_generate=True,
    )
    expected.append((out.sequences[0, len(ids) :].numpy(), torch.cat(out.logits).numpy()))

  batch = right_padded(prompts)
  whole = dataclasses.replace(LlavaMiniConfig.preset('tiny'), decoder=pair.config)
  graphdef, _ = abstract_model(whole)
  params = {path: np.zeros(shape, np.float32) for path, shape in parameter_shapes(whole).items()} | pair.params

  # The end token is an argument, so that both tests share one compilation; no token is -1.
  generated = quick_jit(
    lambda params, eos_id: generate(
      merge(graphdef, params), batch, max_new_tokens=NEW_TOKENS, eos_id=eos_id, return_logits=True
    )
  )

  def run(eos_id):
    return [np.asarray(x) for x in generated(params, eos_id)]

  return expected, run


def right_padded(prompts: list[np.ndarray]) -> Batch:
  """Text alone, one prompt per row; the padding holds a real token, which must not matter."""
  rows, length = len(prompts), max(map(len, prompts))
  tokens, positions, segments = (np.full((rows, length), fill, np.int32) for fill in (7, 0, 0))
  for row, ids in enumerate(prompts):
    tokens[row, : len(ids)], positions[row, : len(ids)], segments[row, : len(ids)] = ids, np.arange(len(ids)), 1
  return Batch(
    tokens=tokens,
    targets=np.zeros_like(tokens),
    loss_mask=np.zeros(tokens.shape, bool),
    segment_ids=segments,
    positions=positions,
    pixels=np.zeros((rows, 0, 1, 64, 64, 3), np.float32),
    fuse_index=np.zeros((rows, 0, 0), np.int32),
    fuse_mask=np.zeros((rows, 0, 0), bool),
    slot_index=np.zeros((rows, 0, 1), np.int32),
  )


def test_greedy_generation_of_prompts_of_several_lengths(greedy):
  expected, run = greedy
  tokens, logits = run(-1)
  for row, (ids, trace) in enumerate(expected):
    np.testing.assert_array_equal(tokens[row], ids, err_msg=f'row {row}')
    close(logits[row], trace, f'row {row}: logits')
  assert len({tuple(ids) for ids, _ in expected}) == len(expected)  # the prompts do lead to different answers


def test_generation_ends_a_row_at_its_eos_and_lets_the_others_go_on(greedy):
  expected, run = greedy
  eos = int(expected[0][0][2])
  tokens, _ = run(eos)
  for row, (ids, _) in enumerate(expected):
    ended = np.flatnonzero(ids == eos)
    count = ended[0] + 1 if len(ended) else NEW_TOKENS
    np.testing.assert_array_equal(tokens[row], [*ids[:count], *[-1] * (NEW_TOKENS - count)], err_msg=f'row {row}')
  assert (tokens == -1).any() and (tokens[:, -1] != -1).any()

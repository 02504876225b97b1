"""The same answers in torch, eager: our tower, compressor and pre-fusion as `torch_twin` has them, and the decoder of
`transformers` with its cache.

Enters: prompts as the engine lays them out. Leaves: greedy ids, which must be those of the engine, and seconds. All
prompts of one call have the same layout, so nothing is padded. Needs torch (the [convert] extra).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mini_jax.benchmark.asking import KINDS, Speed, requests
from llava_mini_jax.benchmark.torch_twin import Twin
from llava_mini_jax.config import DecoderConfig
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.infer.prompts import Laid, PromptEncoder
from llava_mini_jax.models.vision import normalize_pixels
from llava_mini_jax.train.tree import flatten


class TorchAsker:
  """A LLaVA-Mini, and the LLaVA-v1.5 that has the same weights where it has any."""

  def __init__(self, run: Loaded):
    """Raises ConfigError: a model that the twin does not compute."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params = {path: np.asarray(value, np.float32) for path, value in flatten(run.params).items()}
    self.twin = Twin(run.experiment.model, params, rate=0.0)
    self.llama = decoder_of(run.experiment.model.decoder, self.twin.weights)

  def measure(self, run: Loaded, ours: Speed, ids: Sequence[Sequence[int]], *, rounds: int) -> Speed:
    """The same requests as `ours`. Raises ArithmeticError if the answers are not `ids`."""
    encoder = PromptEncoder(run.experiment, run.tokenizer)
    asked = requests(run.experiment.model, KINDS[ours.kind], ours.requests, ours.tokens)
    compressed = run.experiment.model.compressor.kind != 'none'

    def answer() -> tuple[list[list[int]], float, float]:
      began = time.perf_counter()
      laid = [encoder.lay(request.prompt, request.grid) for request in asked]
      return self.answer(laid, ours.tokens, compressed=compressed, began=began)

    if (theirs := answer()[0]) != [list(one) for one in ids]:
      raise ArithmeticError(f'{ours.system}, {ours.kind}: expected the same answers; found {theirs} and {ids}')
    first, rest = zip(*(answer()[1:] for _ in range(rounds)), strict=True)
    return dataclasses.replace(ours, system=f'{ours.system}, torch', first=first, rest=rest, held_bytes=0, peak_bytes=0)

  @torch.inference_mode()
  def answer(
    self, laid: Sequence[Laid], tokens: int, *, compressed: bool, began: float
  ) -> tuple[list[list[int]], float, float]:
    """Greedy ids, seconds since `began` to the first token, and from there."""
    found = self.llama(inputs_embeds=self.rows(laid, compressed=compressed), use_cache=True, logits_to_keep=1)
    ids = [found.logits[:, -1].argmax(-1)]
    first = time.perf_counter() - began
    for _ in range(tokens - 1):
      found = self.llama(input_ids=ids[-1][:, None], past_key_values=found.past_key_values, use_cache=True)
      ids.append(found.logits[:, -1].argmax(-1))
    return torch.stack(ids, 1).tolist(), first, time.perf_counter() - began - first

  def rows(self, laid: Sequence[Laid], *, compressed: bool) -> Tensor:
    """What the decoder is given: [B L D]."""
    text = self.llama.model.embed_tokens(torch.from_numpy(np.stack([one.tokens for one in laid]).astype(np.int64)))
    if not laid[0].media:
      return text
    views = np.stack([view[0] for one in laid for some in one.media for view in some])
    pixels = torch.from_numpy(np.array(normalize_pixels(views)))
    slots, at = (torch.from_numpy(np.asarray(x, np.int64)) for x in (laid[0].slots, laid[0].fused))
    visuals = len(slots)
    if not compressed:
      patches = self.twin.project(self.twin.clip(pixels))
      return text.index_put(
        (torch.arange(len(text))[:, None], slots.flatten()), patches.reshape(len(text), -1, text.shape[2])
      )
    asked = text[:, at].repeat_interleave(visuals, 0)
    tokens, fused = self.twin.encode(pixels, asked, torch.ones(asked.shape[:2], dtype=torch.bool))
    rows = torch.arange(len(text))[:, None]
    mean = fused.unflatten(0, (len(text), visuals)).mean(1)
    return text.index_put((rows, at), mean).index_put(
      (rows, slots.flatten()), tokens.reshape(len(text), -1, text.shape[2])
    )


def decoder_of(config: DecoderConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
  """transformers' decoder with the twin's weights, by their names there."""
  with torch.device('meta'):
    llama = LlamaForCausalLM(
      LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        tie_word_embeddings=False,
      )
    )
  named = {}
  for path, value in weights.items():
    if path.startswith('decoder/'):
      name = path.removeprefix('decoder/').removesuffix('/weight').replace('/', '.')
      name = f'layers.{name}' if name[0].isdigit() else name
      named[f'{name}.weight' if name == 'lm_head' else f'model.{name}.weight'] = value.detach()
  llama.load_state_dict(named, strict=True, assign=True)
  llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)  # has no weights, and was made without values
  return llama.eval()

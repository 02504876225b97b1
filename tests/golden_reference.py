"""An independent LLaVA-Mini in torch, written from the formulas of the released forward pass, that records cases.

Enters: a `models/<variant>` directory and the inputs of a case. Leaves: the
case's arrays, under the keys that `test_golden.py` reads. It shares no code
with the package; its misbehaviours are those of the released code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

IMAGE_TAG, IGNORE = -200, -100
COMPRESSOR_HEADS = 8
VISION = 'model.vision_tower.vision_tower.vision_model'


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What one call of the released model is given.

  images: [B P 3 h w], [B F P 3 h w], or one entry per row, [P 3 h w] (image) or [F P 3 h w] (video); None = no images.
  """

  ids: np.ndarray  # int64[B T], IMAGE_TAG where the image stands
  images: np.ndarray | Sequence[np.ndarray] | None
  labels: np.ndarray | None = None  # int64[B T], IGNORE = not learnt
  mask: np.ndarray | None = None  # bool[B T]
  max_length: int | None = None  # of a row after splicing; None = the config's
  padding_side: str = 'right'

  @property
  def listed(self) -> bool:
    return not isinstance(self.images, np.ndarray | None)

  def arrays(self) -> dict[str, np.ndarray]:
    """Under the keys of a case. The padding side is no key: it shows in `lm_attention_mask`."""
    found = dict(input_ids=self.ids, images_is_list=np.bool_(self.listed))
    if self.listed:
      found |= {f'images_{i}': images for i, images in enumerate(self.images)} | dict(num_images=len(self.images))
    elif self.images is not None:
      found |= dict(images=self.images)
    optional = dict(labels=self.labels, attention_mask=self.mask, tokenizer_model_max_length=self.max_length)
    return found | {key: value for key, value in optional.items() if value is not None}


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
  """q [B N Q H], k and v [B N K H], allowed bool[B Q K] -> [B Q N*H] and weights [B N Q K]."""
  scores = q @ k.mT / math.sqrt(q.shape[-1])
  if allowed is not None:  # a query that sees nothing (left padding) gets uniform weights
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
  weights = scores.softmax(-1)
  return (weights @ v).transpose(1, 2).flatten(2), weights


def heads(x: Tensor, count: int) -> Tensor:
  """[B L N*H] -> [B N L H]."""
  return x.unflatten(-1, (count, -1)).transpose(1, 2)


def to_raster(crops: Tensor) -> Tensor:
  """Features of r*r crops [B r*r N W] -> one grid over the whole picture, [B r*r*N W]."""
  r, n = math.isqrt(crops.shape[1]), math.isqrt(crops.shape[2])
  tiles = crops.unflatten(2, (n, n))
  bands = [torch.cat([tiles[:, a * r + b] for b in range(r)], dim=2) for a in range(r)]
  return torch.cat(bands, dim=1).flatten(1, 2)


class Reference:
  """The released model with the weights of a `models/<variant>` directory; its vision tower is frozen."""

  def __init__(self, root: Path, dtype: torch.dtype = torch.float64):
    self.dtype = dtype
    self.config = json.loads((root / 'config.json').read_text())
    self.vision = json.loads((root / 'vision_config.json').read_text())
    tensors = load_file(root / 'model.safetensors')
    self.weights = {name: x.to(dtype).requires_grad_('vision_tower' not in name) for name, x in tensors.items()}

  def linear(self, x: Tensor, name: str) -> Tensor:
    return F.linear(x, self.weights[f'{name}.weight'], self.weights.get(f'{name}.bias'))

  def layer_norm(self, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weights[f'{name}.weight'], self.weights[f'{name}.bias'], 1e-5)

  def rms_norm(self, x: Tensor, name: str) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config['rms_norm_eps'])
    return x * scale * self.weights[f'{name}.weight']

  def clip(self, pixels: Tensor) -> list[Tensor]:
    """[n 3 h w] -> every hidden state [n patches+1 W]."""
    x = F.conv2d(pixels, self.weights[f'{VISION}.embeddings.patch_embedding.weight'], stride=self.vision['patch_size'])
    first = self.weights[f'{VISION}.embeddings.class_embedding'].expand(len(x), 1, -1)
    x = torch.cat([first, x.flatten(2).mT], dim=1) + self.weights[f'{VISION}.embeddings.position_embedding.weight']
    hidden = [self.layer_norm(x, f'{VISION}.pre_layrnorm')]
    for i in range(self.vision['num_hidden_layers']):
      name, x = f'{VISION}.encoder.layers.{i}', hidden[-1]
      y = self.layer_norm(x, f'{name}.layer_norm1')
      q, k, v = (heads(self.linear(y, f'{name}.self_attn.{p}_proj'), self.vision['num_attention_heads']) for p in 'qkv')
      x = x + self.linear(attend(q, k, v)[0], f'{name}.self_attn.out_proj')
      y = self.linear(self.layer_norm(x, f'{name}.layer_norm2'), f'{name}.mlp.fc1')
      hidden.append(x + self.linear(y * torch.sigmoid(1.702 * y), f'{name}.mlp.fc2'))
    return hidden

  def compress(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B K W] -> compressed [B C W], head-mean weights [B C K], key positions [K W]."""
    name, table = 'model.compressor', self.weights['model.compressor.pos_embed']
    have, need = math.isqrt(len(table)), math.isqrt(features.shape[1])
    key_pos = table
    if have != need:
      square = table.mT.unflatten(1, (have, have))[None]
      key_pos = F.interpolate(square, (need, need), mode='bicubic', align_corners=False)[0].flatten(1).mT
    kv = self.layer_norm(features, f'{name}.ln_kv')
    query = self.layer_norm(self.weights[f'{name}.query'], f'{name}.ln_q') + table
    sides = zip(
      (query.expand(len(kv), -1, -1), kv + key_pos, kv),
      self.weights[f'{name}.attn.in_proj_weight'].chunk(3),
      self.weights[f'{name}.attn.in_proj_bias'].chunk(3),
      strict=True,
    )
    out, weights = attend(*(heads(F.linear(x, weight, bias), COMPRESSOR_HEADS) for x, weight, bias in sides))
    return self.linear(out, f'{name}.attn.out_proj'), weights.mean(1), key_pos

  def project(self, x: Tensor) -> Tensor:
    return self.linear(F.gelu(self.linear(x, 'model.mm_projector.0')), 'model.mm_projector.2')

  def frequencies(self) -> Tensor:
    c = self.config
    size = c['hidden_size'] // c['num_attention_heads']
    inverse = c['rope_theta'] ** -(torch.arange(0, size, 2, dtype=self.dtype) / size)
    if not (s := c.get('rope_scaling')):
      return inverse
    turns = s['original_max_position_embeddings'] * inverse / (2 * math.pi)  # within the original context
    kept = ((turns - s['low_freq_factor']) / (s['high_freq_factor'] - s['low_freq_factor'])).clamp(0, 1)
    return inverse * (kept + (1 - kept) / s['factor'])

  def llama(self, x: Tensor, name: str, count: int, positions: Tensor, allowed: Tensor) -> list[Tensor]:
    """[B L D] through `count` layers -> the output of each. positions: int[B L]; allowed: bool[B L L]."""
    angle = (positions[..., None] * self.frequencies())[:, None].repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    n, shared = self.config['num_attention_heads'], self.config['num_key_value_heads']

    def rotate(y):
      first, second = y.chunk(2, dim=-1)
      return y * cos + torch.cat([-second, first], dim=-1) * sin

    outputs = []
    for i in range(count):
      layer = f'{name}.{i}'
      y = self.rms_norm(x, f'{layer}.input_layernorm')
      q = rotate(heads(self.linear(y, f'{layer}.self_attn.q_proj'), n))
      k = rotate(heads(self.linear(y, f'{layer}.self_attn.k_proj'), shared)).repeat_interleave(n // shared, dim=1)
      v = heads(self.linear(y, f'{layer}.self_attn.v_proj'), shared).repeat_interleave(n // shared, dim=1)
      x = x + self.linear(attend(q, k, v, allowed)[0], f'{layer}.self_attn.o_proj')
      y = self.rms_norm(x, f'{layer}.post_attention_layernorm')
      gate = F.silu(self.linear(y, f'{layer}.mlp.gate_proj')) * self.linear(y, f'{layer}.mlp.up_proj')
      x = x + self.linear(gate, f'{layer}.mlp.down_proj')
      outputs.append(x)
    return outputs

  def embed(self, ids: Tensor) -> Tensor:
    return self.weights['model.embed_tokens.weight'][ids.clamp(min=0)]

  def encode(self, pixels: Tensor, ids: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """One encoder call, [B P 3 h w] with int[B T]: every tensor under its name without `enc{k}_`."""
    out = {}
    hidden = self.clip(pixels.flatten(0, 1))
    out |= {f'clip_hidden{i}': x for i, x in enumerate(hidden)}
    out['clip_features'] = hidden[self.config['mm_vision_select_layer']][:, 1:]
    views = out['clip_features'].unflatten(0, pixels.shape[:2])  # [B P N W]
    keys, detail = views[:, -1], []
    if views.shape[1] > 1:
      keys = out['compressor_in'] = to_raster(views[:, :-1])
      out['proj_hd_views'] = self.project(views[:, :-1])
      detail = [to_raster(out['proj_hd_views'])]
    out['compressor_out'], out['compressor_attn'], out['compressor_kv_pos'] = self.compress(keys)
    out['proj_compressed'] = self.project(out['compressor_out'])
    out['proj_global'] = self.project(views[:, -1])

    text = self.embed(ids).detach()
    x = out['prefusion_in'] = torch.cat([*detail, out['proj_global'], out['proj_compressed'], text], dim=1)
    fused = ids > 0 if labels is None else (ids > 0) & (labels == IGNORE)
    seen = x.shape[1] - ids.shape[1]
    valid = torch.cat([fused.new_ones(len(ids), seen), fused], dim=1)
    positions = out['prefusion_position_ids'] = (valid.cumsum(1) - 1).masked_fill(~valid, 1)
    allowed = out['prefusion_allowed'] = torch.ones(2 * x.shape[1:2], dtype=torch.bool).tril() & valid[:, None]
    layers = self.llama(x, 'model.prefusion_layers', self.config['prefusion_layer_num'], positions, allowed)
    out |= {f'prefusion_out{i}': y for i, y in enumerate(layers)}
    out['fused_compressed'] = layers[-1][:, seen - out['proj_compressed'].shape[1] : seen]
    out['fused_text'] = torch.where(fused[..., None], layers[-1][:, seen:], text)
    return out

  def see(self, inputs: Inputs) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """All encoder calls: their tensors by key, visual tokens of each row [n D], fused text [B T D]."""
    ids = torch.from_numpy(inputs.ids)
    labels = None if inputs.labels is None else torch.from_numpy(inputs.labels)
    rows = [slice(i, i + 1) for i in range(len(ids))] if inputs.listed else [slice(None)]
    groups = [torch.as_tensor(images[None]) for images in inputs.images] if inputs.listed else [inputs.images]
    trace, visual, text = {}, [], []
    calls = 0
    for where, images in zip(rows, groups, strict=True):
      images = torch.as_tensor(images).to(self.dtype)
      frames = images if images.ndim == 6 else images[:, None]
      stopped = images.ndim == 6 and not inputs.listed  # the released code runs stacked videos without gradient
      with torch.no_grad() if stopped else contextlib.nullcontext():
        seen = [
          self.encode(frames[:, f], ids[where], None if labels is None else labels[where])
          for f in range(frames.shape[1])
        ]
        visual += torch.cat([s['fused_compressed'] for s in seen], dim=1)
        text.append(torch.stack([s['fused_text'] for s in seen]).mean(0))
      trace |= {f'enc{calls + f}_{key}': value for f, s in enumerate(seen) for key, value in s.items()}
      calls += len(seen)
    return trace, visual, torch.cat(text)

  def splice(self, inputs: Inputs, visual: list[Tensor], text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> decoder input [B L2 D], labels int[B L2], mask bool[B L2]."""
    limit = inputs.max_length or self.config['tokenizer_model_max_length']
    rows = []
    for i, ids in enumerate(inputs.ids):
      keep = np.ones(ids.shape, bool) if inputs.mask is None else inputs.mask[i]
      labels = np.full(ids.shape, IGNORE) if inputs.labels is None else inputs.labels[i]
      labels, ids = torch.from_numpy(labels[keep]), ids[keep]
      tags = np.flatnonzero(ids == IMAGE_TAG)
      # Released bug, kept: places among the kept ids cut text that still has the others in it.
      row, count = text[i], len(ids)
      if len(tags):
        at, slots = tags[0], visual[i]
        row = torch.cat([row[:at], slots, row[at + 1 : count]])
        labels = torch.cat([labels[:at], labels.new_full((len(slots),), IGNORE), labels[at + 1 :]])
      rows.append((row[: len(labels)][:limit], labels[:limit]))
    longest = max(len(x) for x, _ in rows)
    pads = [(0, longest - len(x)) if inputs.padding_side == 'right' else (longest - len(x), 0) for x, _ in rows]
    embeds = torch.stack([F.pad(x, (0, 0, *pad)) for (x, _), pad in zip(rows, pads, strict=True)])
    labels = torch.stack([F.pad(y, pad, value=IGNORE) for (_, y), pad in zip(rows, pads, strict=True)])
    mask = torch.stack(
      [F.pad(torch.ones(len(x), dtype=torch.bool), pad) for (x, _), pad in zip(rows, pads, strict=True)]
    )
    return embeds, labels, mask

  def decode(self, x: Tensor, mask: Tensor, positions: Tensor) -> tuple[list[Tensor], Tensor]:
    """[B L D] -> each layer's output (the last one normed), logits [B L vocab]."""
    allowed = torch.ones(2 * x.shape[1:2], dtype=torch.bool).tril() & mask[:, None]
    *hidden, last = self.llama(x, 'model.layers', self.config['num_hidden_layers'], positions, allowed)
    hidden.append(self.rms_norm(last, 'model.norm'))
    return hidden, self.linear(hidden[-1], 'lm_head')

  def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
    """The encoder's tensors and what the decoder is given."""
    if inputs.images is None:
      ids = torch.from_numpy(inputs.ids)
      labels = torch.full_like(ids, IGNORE) if inputs.labels is None else torch.from_numpy(inputs.labels)
      mask = torch.ones_like(ids, dtype=torch.bool) if inputs.mask is None else torch.from_numpy(inputs.mask)
      return dict(inputs_embeds=self.embed(ids), lm_labels=labels, lm_attention_mask=mask)
    trace, visual, text = self.see(inputs)
    embeds, labels, mask = self.splice(inputs, visual, text)
    return trace | dict(inputs_embeds=embeds, lm_labels=labels, lm_attention_mask=mask)

  def forward(self, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor of a case, by key."""
    trace = self.prepare(inputs)
    embeds, labels = trace['inputs_embeds'], trace['lm_labels']
    positions = torch.arange(embeds.shape[1]).expand(embeds.shape[:2])
    hidden, logits = self.decode(embeds, trace['lm_attention_mask'], positions)
    trace |= {f'lm_hidden{i + 1}': x for i, x in enumerate(hidden)}
    trace |= dict(lm_position_ids_is_none=torch.tensor(True), logits=logits)
    if inputs.labels is not None:
      trace['loss'] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    return trace

  @torch.no_grad()
  def generate(self, inputs: Inputs, count: int = 8) -> dict[str, Tensor]:
    """Greedy, without a cache; every row must end where the batch does."""
    start = self.prepare(inputs)
    x, mask = start['inputs_embeds'], start['lm_attention_mask']
    if not mask[:, -1].all():
      raise ValueError('generation: expected rows padded on the left; found padding on the right')
    ids, logits = [], []
    for _ in range(count):
      logits.append(self.decode(x, mask, (mask.cumsum(1) - 1).clamp(min=0))[1][:, -1])
      ids.append(logits[-1].argmax(-1))
      x = torch.cat([x, self.embed(ids[-1][:, None])], dim=1)
      mask = F.pad(mask, (0, 1), value=True)
    logits = torch.stack(logits, dim=1)
    best = logits.topk(2).values
    return dict(gen_ids=torch.stack(ids, dim=1), gen_logits=logits, gen_margin=best[..., 0] - best[..., 1])

  def gradients(self, inputs: Inputs, *, full: Sequence[str] = ()) -> dict[str, Tensor]:
    """`loss` and, of every parameter but the vision tower's, `gradnorm::`, or `gradnone::` if it has none.

    full: beginnings of names; such a parameter's gradient is given too, whole (`grad::`) unless it is one of the
      decoder's matrices (`gradslice::`).
    """
    names = [name for name, x in self.weights.items() if x.requires_grad]
    loss = self.forward(inputs)['loss']
    found = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
    out = dict(loss=loss)
    for name, grad in zip(names, found, strict=True):
      if grad is None:
        out[f'gradnone::{name}'] = torch.tensor(True)
        continue
      out[f'gradnorm::{name}'] = grad.double().norm()
      if name.startswith(tuple(full)):
        corner = grad.ndim > 1 and name.startswith(('model.layers', 'lm_head'))
        out[f'gradslice::{name}' if corner else f'grad::{name}'] = grad[:16, :16] if corner else grad
    return out


def to_arrays(trace: dict[str, Tensor], prefix: str = '') -> dict[str, np.ndarray]:
  """As a case stores them: float32, but norms of gradients float64."""
  found = {prefix + key: value.detach().numpy() for key, value in trace.items()}
  single = {key for key, value in found.items() if value.dtype == np.float64 and not key.startswith('gradnorm')}
  return {key: value.astype(np.float32) if key in single else value for key, value in found.items()}

"""The same training step in torch, eager, written as its users write it: what the JAX step is measured against.

Enters: our parameters by path, and Batches with one image of one view per row. Leaves: losses. It computes what
`models` computes for such batches, in float32, with torch's fused attention and fused AdamW; `benchmark.train_step`
checks that both learn alike before it reads a clock. Needs torch (the [convert] extra).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.models.layers import rope_frequencies
from llava_mini_jax.models.positions import bicubic_weights
from llava_mini_jax.types import Batch

_HEADS_OUT = ('q_proj', 'k_proj', 'v_proj')  # [in, heads, head_dim]; the projections back are [heads, head_dim, out]


def check(config: LlavaMiniConfig) -> None:
  """Raises ConfigError for a model that the twin does not compute."""
  c = config.compressor
  plain = (config.decoder.rope_scaling.factor == 1.0, not config.decoder.tie_word_embeddings, not config.detach_text)
  released = (c.kind, c.space, c.attention, c.key_position) == ('query', 'vision', 'mha', 'query_table')
  if not (all(plain) and released and config.prefusion.num_layers and config.prefusion.fuse_compressed):
    raise ConfigError(
      'torch twin: expected a released compressor, pre-fusion, untied and undetached text; found another'
    )


class Twin:
  """Model and optimizer. Every parameter trains, at one rate, without decay.

  Args:
    params: ours by path, as numpy arrays.
    rate, beta1, beta2, eps, max_grad_norm: as `train.optimizer`.
  """

  def __init__(
    self,
    config: LlavaMiniConfig,
    params: Mapping[str, np.ndarray],
    *,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
  ):
    check(config)
    self.config, self.max_grad_norm = config, max_grad_norm
    self.weights: dict[str, Tensor] = {}
    for path, value in params.items():
      if '/layers/' in path:
        for i, layer in enumerate(value):
          self._add(path.replace('/layers/', f'/{i}/'), layer)
      else:
        self._add(path, value)
    self.frequencies = torch.from_numpy(
      rope_frequencies(config.decoder.head_dim, config.decoder.rope_theta, config.decoder.rope_scaling)
    )
    grid = bicubic_weights(config.compressor.grid, config.vision.grid)
    self.resize = torch.from_numpy(np.einsum('yr,xc->yxrc', grid, grid).reshape(config.vision.num_patches, -1))
    self.optimizer = torch.optim.AdamW(
      list(self.weights.values()), lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=0.0, fused=True
    )

  def _add(self, path: str, value: np.ndarray) -> None:
    """Kernels become [out, in], as torch's Linear has them."""
    name = path.split('/')[-1]
    if name in _HEADS_OUT:
      value = value.reshape(value.shape[0], -1).T
    elif name in ('o_proj', 'out_proj', 'patch_embedding'):
      value = value.reshape(-1, value.shape[-1]).T
    elif name in ('kernel', 'lm_head', 'gate_proj', 'up_proj', 'down_proj'):
      value = value.T
    elif name.endswith('_proj_bias'):
      value = value.reshape(-1)
    self.weights[path] = torch.tensor(np.ascontiguousarray(value), requires_grad=True)

  def step(self, batch: Mapping[str, Tensor]) -> Tensor:
    """One step of training; the loss before it. `batch` from `to_torch`."""
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.loss(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.max_grad_norm)
    self.optimizer.step()
    return loss.detach()

  def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
    c = self.config.decoder
    w = self.weights
    text = F.embedding(batch['tokens'], w['decoder/embed_tokens'])
    rows = torch.arange(len(text))[:, None]
    fuse, slots, fused_mask = batch['fuse_index'], batch['slot_index'], batch['fuse_mask']
    compressed, fused = self.encode(batch['pixels'], text[rows, fuse], fused_mask)
    # An index that lists nothing is one past the row: a row of padding takes what is written there.
    x = F.pad(text, (0, 0, 0, 1))
    at = torch.where(fused_mask, fuse, text.shape[1])
    x = x.index_put((rows, at), fused).index_put((rows, slots), compressed)[:, :-1]
    segments = batch['segment_ids']
    allowed = torch.ones(2 * x.shape[1:2], dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None])
    allowed &= (segments > 0)[:, None]
    x = self.llama(x, 'decoder', c.num_hidden_layers, batch['positions'], allowed)
    logits = F.linear(self.rms_norm(x, 'decoder/norm'), w['decoder/lm_head'])
    targets = torch.where(batch['loss_mask'], batch['targets'], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

  def encode(self, pixels: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compressed tokens [B C D], fused text [B T D]."""
    features = self.clip(pixels)
    patches = self.project(features)
    compressed = self.project(self.compress(features))
    x = torch.cat([patches, compressed, text], dim=1)
    seen = x.shape[1] - text.shape[1]
    valid = torch.cat([text_mask.new_ones(len(x), seen), text_mask], dim=1)
    positions = (valid.cumsum(1) - 1).masked_fill(~valid, 1)
    allowed = torch.ones(2 * x.shape[1:2], dtype=torch.bool).tril() & valid[:, None]
    slots = compressed.shape[1]
    layers = self.config.prefusion.num_layers
    x = self.llama(x, 'prefusion', layers, positions, allowed, last=slots + text.shape[1])
    return x[:, :slots], x[:, slots:]

  def clip(self, pixels: Tensor) -> Tensor:
    v, w, name = self.config.vision, self.weights, 'vision'
    g, p = v.grid, v.patch_size
    x = pixels.reshape(-1, g, p, g, p, 3).transpose(2, 3).reshape(-1, g * g, p * p * 3)
    x = F.linear(x, w['vision/patch_embedding'])
    x = torch.cat([w['vision/class_embedding'].expand(len(x), 1, -1), x], dim=1) + w['vision/position_embedding']
    x = self.layer_norm(x, 'vision/pre_layernorm')
    for i in range(v.run_layers):
      name = f'vision/{i}'
      y = self.layer_norm(x, f'{name}/layer_norm1')
      q, k, u = (self.heads(y, f'{name}/self_attn/{p}_proj', v.num_attention_heads) for p in 'qkv')
      y = F.scaled_dot_product_attention(q, k, u).transpose(1, 2).flatten(2)
      x = x + self.linear(y, f'{name}/self_attn/out_proj', f'{name}/self_attn/out_proj_bias')
      y = self.linear(self.layer_norm(x, f'{name}/layer_norm2'), f'{name}/fc1/kernel', f'{name}/fc1/bias')
      x = x + self.linear(y * torch.sigmoid(1.702 * y), f'{name}/fc2/kernel', f'{name}/fc2/bias')
    return x[:, 1:]

  def compress(self, features: Tensor) -> Tensor:
    w, n = self.weights, self.config.compressor.num_heads
    table = w['compressor/pos_embed']
    kv = self.layer_norm(features, 'compressor/ln_kv')
    query = self.layer_norm(w['compressor/query'], 'compressor/ln_q') + table
    q = self.heads(query.expand(len(kv), -1, -1), 'compressor/q_proj', n)
    k = self.heads(kv + self.resize @ table, 'compressor/k_proj', n)
    v = self.heads(kv, 'compressor/v_proj', n)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return self.linear(y, 'compressor/out_proj', 'compressor/out_proj_bias')

  def project(self, x: Tensor) -> Tensor:
    x = F.gelu(self.linear(x, 'projector/linear_1/kernel', 'projector/linear_1/bias'))
    return self.linear(x, 'projector/linear_2/kernel', 'projector/linear_2/bias')

  def llama(
    self, x: Tensor, name: str, count: int, positions: Tensor, allowed: Tensor, last: int | None = None
  ) -> Tensor:
    """last: so many tokens are wanted; the last layer computes keys and values alone of the others."""
    c = self.config.decoder
    angle = (positions[..., None] * self.frequencies)[:, None]
    cos, sin = angle.cos(), angle.sin()
    groups = c.num_attention_heads // c.num_key_value_heads

    def rotate(y, first=0):
      (a, b), of = y.chunk(2, dim=-1), (cos[:, :, first:], sin[:, :, first:])
      return torch.cat([a * of[0] - b * of[1], b * of[0] + a * of[1]], dim=-1)

    for i in range(count):
      at = f'{name}/{i}/self_attn'
      first = x.shape[1] - last if last is not None and i == count - 1 else 0
      y = self.rms_norm(x, f'{name}/{i}/input_layernorm')
      q = rotate(self.heads(y[:, first:], f'{at}/q_proj', c.num_attention_heads), first)
      k = rotate(self.heads(y, f'{at}/k_proj', c.num_key_value_heads))
      v = self.heads(y, f'{at}/v_proj', c.num_key_value_heads)
      y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, first:], enable_gqa=groups > 1)
      x = x[:, first:] + self.linear(y.transpose(1, 2).flatten(2), f'{at}/o_proj')
      y = self.rms_norm(x, f'{name}/{i}/post_attention_layernorm')
      at = f'{name}/{i}/mlp'
      x = x + self.linear(
        F.silu(self.linear(y, f'{at}/gate_proj')) * self.linear(y, f'{at}/up_proj'), f'{at}/down_proj'
      )
    return x

  def linear(self, x: Tensor, kernel: str, bias: str | None = None) -> Tensor:
    return F.linear(x, self.weights[kernel], None if bias is None else self.weights[bias])

  def heads(self, x: Tensor, kernel: str, count: int) -> Tensor:
    """[B L D] -> [B N L H]."""
    y = F.linear(x, self.weights[kernel], self.weights.get(f'{kernel}_bias'))
    return y.unflatten(-1, (count, -1)).transpose(1, 2)

  def layer_norm(self, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weights[f'{name}/weight'], self.weights[f'{name}/bias'], 1e-5)

  def rms_norm(self, x: Tensor, name: str) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weights[f'{name}/weight'], self.config.decoder.rms_norm_eps)


def to_torch(batch: Batch) -> dict[str, Tensor]:
  """A Batch of one image of one view per row: its only visual's fields without their axis.

  Indices that list nothing are clipped, as gathers clip them; `fuse_mask` says which those are.
  """
  length = batch.tokens.shape[1]
  fields = {name: getattr(batch, name) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  fields |= dict(fuse_index=np.minimum(batch.fuse_index[:, 0], length - 1), slot_index=batch.slot_index[:, 0])
  found = {name: torch.from_numpy(np.asarray(value, np.int64)) for name, value in fields.items()}
  found |= dict(loss_mask=torch.from_numpy(batch.loss_mask), fuse_mask=torch.from_numpy(batch.fuse_mask[:, 0]))
  return found | dict(pixels=torch.from_numpy(batch.pixels[:, 0, 0]))

"""PruMerge and PruMerge+ (arXiv 2403.15388): keep the patches that the class token looks at, merge the rest into them.

a = softmax(q_cls kᵀ / √W) over all places, with q and k from the layer after the selected one, heads not split. The
`keep` patches of largest a stay; PruMerge+ adds as many from an even grid, a patch that both name twice. Each becomes
x_i + Σ a_j x_j over the `neighbours` patches whose k are most like its own (cosine, itself left out); one more token is
Σ a_j x_j over the patches that are not kept. No parameters.

Original: K is the share of outliers, a > Q3 + 1.5 IQR, over a batch. `elastic` counts them for each image, at least 1
and at most `keep`, and masks the rest, so that shapes stay static; else K is `keep`, as in the original's training. Of
PruMerge+ the fixed share alone is here, as trained, and patches that are named twice hide no other from the last token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax.config import CompressorConfig, ConfigError, LlavaMiniConfig
from llava_mini_jax.models.compressors.base import Compressor


def outliers(a: jax.Array, most: int) -> jax.Array:
  """How many of a float32[B P] lie above Q3 + 1.5 IQR, from 1 to `most`: int32[B]."""
  q1, q3 = jnp.quantile(a, jnp.array([0.25, 0.75]), axis=1)
  return jnp.clip((a > (q3 + 1.5 * (q3 - q1))[:, None]).sum(1), 1, most).astype(jnp.int32)


class PruMerge(Compressor):
  fields = ('keep', 'neighbours', 'elastic')
  reads = ('class_attention',)

  @staticmethod
  def check(model: LlavaMiniConfig) -> None:
    config, patches = model.compressor, model.vision.num_patches
    if config.space != 'vision':
      raise ConfigError(f"CompressorConfig.space: expected 'vision' with {config.kind}; found {config.space!r}")
    if not 1 <= config.keep < patches:
      raise ConfigError(f'CompressorConfig.keep: expected 1 to {patches - 1} with {config.kind}; found {config.keep}')
    if not 1 <= config.neighbours < patches:
      raise ConfigError(f'CompressorConfig.neighbours: expected 1 to {patches - 1}; found {config.neighbours}')
    if model.vision.run_layers == model.vision.num_hidden_layers:
      raise ConfigError(f'VisionConfig.select_layer: expected a layer after it with {config.kind}; found none')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return config.keep + 1

  @staticmethod
  def varies(config: CompressorConfig) -> bool:
    return config.elastic

  @classmethod
  def flops(cls, model: LlavaMiniConfig, patches: int, images: int, text: int) -> tuple[float, float]:
    """The keys and a are the tower's."""
    kept, width = cls.tokens(model.compressor, patches) - 1, model.vision.hidden_size
    return 0.0, images * 2.0 * patches * width * (2 * kept + 1)

  def kept(self, a: jax.Array) -> jax.Array:
    """Of float32[B P] the patches to keep, int[B K]."""
    return jax.lax.top_k(a, self.config.keep)[1]

  def __call__(self, x: jax.Array, *, class_attention: jax.Array):
    """x [B P W], class_attention [B P W + 1] = k and a -> [B K + 1 W]; elastic: and int32[B], how many count."""
    keys, a = class_attention[..., :-1].astype(jnp.float32), class_attention[..., -1].astype(jnp.float32)
    index = self.kept(a)
    keys /= jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    alike = jnp.einsum('BKW,BPW->BKP', jnp.take_along_axis(keys, index[..., None], axis=1), keys)
    itself = index[..., None] == jnp.arange(x.shape[1])
    _, near = jax.lax.top_k(jnp.where(itself, -jnp.inf, alike), self.config.neighbours)
    weights = jnp.put_along_axis(jnp.zeros_like(alike), near, 1.0, axis=-1, inplace=False) * a[:, None]
    features = x.astype(jnp.float32)
    merged = jnp.take_along_axis(features, index[..., None], axis=1) + jnp.einsum('BKP,BPW->BKW', weights, features)

    count = outliers(a, self.config.keep) if self.config.elastic else jnp.full(index.shape[:1], index.shape[1])
    counts = jnp.arange(index.shape[1]) < count[:, None]
    dropped = jnp.where((itself & counts[..., None]).any(1), 0.0, a)
    rest = jnp.einsum('BP,BPW->BW', dropped, features)
    tokens = jnp.pad(merged, ((0, 0), (0, 1), (0, 0)))
    is_rest = jnp.arange(tokens.shape[1]) == count[:, None]
    tokens = jnp.where(is_rest[..., None], rest[:, None], tokens).astype(x.dtype)
    return (tokens, count + 1) if self.config.elastic else tokens


class PruMergePlus(PruMerge):
  fields = ('keep', 'neighbours')

  @staticmethod
  def tokens(config: CompressorConfig, patches: int) -> int:
    return 2 * config.keep + 1

  def kept(self, a: jax.Array) -> jax.Array:
    step = a.shape[1] // self.config.keep
    even = np.arange(step // 2, a.shape[1], step)[: self.config.keep]
    return jnp.concatenate([super().kept(a), jnp.broadcast_to(even, (len(a), len(even)))], axis=1)

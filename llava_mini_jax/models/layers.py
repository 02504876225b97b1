"""Building blocks shared by the stations: parameters, norms, rotary embedding, attention, the Llama layer.

Compute runs in the dtype of the activations; norms, rotary embedding and
softmax run in float32. Parameters are float32 and are cast where they are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_mini_jax.config import DecoderConfig, RopeScaling, ScanConfig
from llava_mini_jax.models.attention import CONTEXT, attend
from llava_mini_jax.models.quantized import dequantize
from llava_mini_jax.sharding import constrain

Init = Callable[..., jax.Array]
# By name, for `scan_layers`:
PROJECTION = 'attention_projection'  # queries, keys and values
WIDENED = 'feed_forward_widened'  # what goes into the activation of a feed-forward part


def param(rngs: nnx.Rngs, init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
  """A float32 parameter that declares its logical axes."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def fan_in(*axes: int) -> Init:
  """Normal with variance 1 / (product of the input axes)."""

  def init(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) / math.sqrt(math.prod(shape[a] for a in axes))

  return init


zeros, ones = nnx.initializers.zeros, nnx.initializers.ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A kernel base[in, out] + scale · a[in, rank] · b[rank, out] that is never added up; stands where a kernel does."""

  base: jax.Array | qwix.QArray
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata=dict(static=True))

  def __getitem__(self, index: Any) -> LowRank:
    if index is not Ellipsis:
      raise TypeError(f'LowRank: expected [...]; found [{index}]')
    return self


def linear(x: jax.Array, kernel: jax.Array | qwix.QArray | LowRank, inputs: int = 1) -> jax.Array:
  """x[... in] · kernel[in, out], where `in` may be the last few axes of x (`inputs` of them) and `out` any number.

  The same as an einsum, but as one matrix product: XLA on CPUs computes the gradient of a product with more axes
  several times slower.
  """
  if isinstance(kernel, LowRank):
    return linear(x, kernel.base, inputs) + kernel.scale * linear(linear(x, kernel.a, inputs), kernel.b)
  if isinstance(kernel, qwix.QArray):
    kernel = dequantize(kernel, x.dtype)
  lead, out = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
  size = math.prod(kernel.shape[:inputs])
  return (x.reshape(-1, size) @ kernel.astype(x.dtype).reshape(size, -1)).reshape(*lead, *out)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
  """`count` layers as one module whose every parameter has a leading `layer` axis."""
  build = nnx.transform_metadata(lambda key: make(nnx.Rngs(key)), partition='layer')
  return jax.vmap(build)(jax.random.split(rngs.params(), count))


def remat(body: Callable, config: ScanConfig, *, prevent_cse: bool = True) -> Callable:
  """`body`, of which `ScanConfig.remat` says what is kept for the backward pass."""
  if config.remat == 'none':
    return body
  policies, save = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names
  keep = dict(
    full=None,
    attention=save(CONTEXT),
    projections=save(CONTEXT, PROJECTION),
    mlp=save(CONTEXT, PROJECTION, WIDENED),
    dots=policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, save(CONTEXT)),
  )
  return jax.checkpoint(body, policy=keep[config.remat], prevent_cse=prevent_cse)


def scan_layers(body: Callable, x: Any, layers: Any, config: ScanConfig) -> tuple[Any, Any]:
  """lax.scan of `body(x, layer) -> (x, out)` over stacked layers; `ScanConfig.remat` says what each keeps."""
  # A rolled loop already keeps the compiler from merging the two computations of a layer.
  return jax.lax.scan(remat(body, config, prevent_cse=config.unroll), x, layers, unroll=config.unroll)


class LayerNorm(nnx.Module):
  def __init__(self, size: int, eps: float, *, rngs: nnx.Rngs):
    self.eps = eps
    self.weight = param(rngs, ones, (size,), ('norm',))
    self.bias = param(rngs, zeros, (size,), ('norm',))

  def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  def __init__(self, size: int, eps: float, *, rngs: nnx.Rngs):
    self.eps = eps
    self.weight = param(rngs, ones, (size,), ('norm',))

  def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * self.weight[...]).astype(x.dtype)


class Linear(nnx.Module):
  """Linear map over the last axis, with bias."""

  def __init__(self, size_in: int, size_out: int, axes: tuple[str, str], *, rngs: nnx.Rngs):
    self.kernel = param(rngs, fan_in(0), (size_in, size_out), axes)
    self.bias = param(rngs, zeros, (size_out,), axes[1:])

  def __call__(self, x: jax.Array) -> jax.Array:
    return linear(x, self.kernel[...]) + self.bias[...].astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Inverse frequencies, float32[H/2], with Llama-3 scaling.

  Wavelengths above original_max / low_freq_factor are slowed by `factor`, those
  below original_max / high_freq_factor are kept, and between them the two blend.
  """
  frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling.factor == 1.0:
    return frequency.astype(np.float32)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (keep * frequency + (1 - keep) * frequency / scaling.factor).astype(np.float32)


def rope_tables(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
  """positions int[B L] -> cos, sin float32[B L H/2]."""
  frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Half-split rotation of x[B L N H]."""
  cos, sin = (t[:, :, None, :] for t in rope)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _last(x: jax.Array, count: int | None) -> jax.Array:
  return x if count is None else x[:, x.shape[1] - count :]


class LlamaAttention(nnx.Module):
  """Grouped-query attention with rotary embedding and no biases."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    init = nnx.initializers.normal(config.initializer_range)
    self.q_proj = param(rngs, init, (d, n, h), ('embed', 'heads', 'head_dim'))
    self.k_proj = param(rngs, init, (d, k, h), ('embed', 'kv_heads', 'head_dim'))
    self.v_proj = param(rngs, init, (d, k, h), ('embed', 'kv_heads', 'head_dim'))
    self.o_proj = param(rngs, init, (n, h, d), ('heads', 'head_dim', 'embed'))

  def __call__(self, x, rope, mask, cache=None, last=None):
    """Attends within x, or within `cache` after writing x into it.

    Args:
      x: [B L D].
      rope: cos, sin float32[B L H/2].
      mask: of `AttentionMask.resolve`, or bool[B 1 L S], True = may attend; S is L without a cache.
      cache: keys [B S K H], values [B S K H], slots int32[B L] where x's tokens are written (S = dropped).
      last: only so many tokens of x, its last, ask; None = all. `mask` is theirs then.
    Returns:
      [B L D], or [B last D], and the keys and values attended to.
    """
    q, k, v = self.heads(x, rope, last)
    if cache is not None:
      keys, values, slots = cache
      write = jax.vmap(lambda store, at, new: store.at[at].set(new.astype(store.dtype), mode='drop'))
      k, v = write(keys, slots, k), write(values, slots, v)
    y = attend(q, k.astype(x.dtype), v.astype(x.dtype), mask)
    return linear(y, self.o_proj[...], inputs=2), (k, v)

  def heads(
    self, x: jax.Array, rope: tuple[jax.Array, jax.Array], last: int | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B L D] -> rotated queries [B L N H], or of the last tokens alone, and keys [B L K H], and values [B L K H]."""
    q = linear(_last(x, last), self.q_proj[...])
    k, v = (linear(x, kernel[...]) for kernel in (self.k_proj, self.v_proj))
    q, k = rotate(q, tuple(_last(table, last) for table in rope)), rotate(k, rope)
    q, k, v = (checkpoint_name(x, PROJECTION) for x in (q, k, v))
    return constrain(q, 'batch', 'length', 'act_heads', None), k, v


class LlamaMLP(nnx.Module):
  """SwiGLU."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    d, f = config.hidden_size, config.intermediate_size
    init = nnx.initializers.normal(config.initializer_range)
    self.gate_proj = param(rngs, init, (d, f), ('embed', 'mlp'))
    self.up_proj = param(rngs, init, (d, f), ('embed', 'mlp'))
    self.down_proj = param(rngs, init, (f, d), ('mlp', 'embed'))

  def __call__(self, x: jax.Array) -> jax.Array:  # [B L D] -> [B L D]
    gate, up = (checkpoint_name(linear(x, kernel[...]), WIDENED) for kernel in (self.gate_proj, self.up_proj))
    return linear(constrain(jax.nn.silu(gate) * up, 'batch', 'length', 'act_mlp'), self.down_proj[...])


class LlamaLayer(nnx.Module):
  """Pre-norm block, used by the decoder and by pre-fusion."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
    self.self_attn = LlamaAttention(config, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
    self.mlp = LlamaMLP(config, rngs=rngs)

  def __call__(self, x, rope, mask, cache=None, last=None):
    """See LlamaAttention; returns [B L D], or [B last D], and the keys and values attended to."""
    y, kv = self.self_attn(self.input_layernorm(x), rope, mask, cache, last)
    x = _last(x, last) + y
    x = x + self.mlp(self.post_attention_layernorm(x))
    return constrain(x, 'batch', 'length', 'act_embed'), kv

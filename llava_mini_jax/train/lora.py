"""LoRA (arXiv:2106.09685): a frozen kernel W trains as W + alpha / rank · A · B, with A at random and B zero at first.

Enters parameters by path. Adapters are parameters too: those of `decoder/layers/mlp/up_proj` are
`lora/decoder/layers/mlp/up_proj/a` [layer, in…, rank] and `…/b` [layer, rank, out…], whatever axes the kernel has, so
groups, optimizer, shardings and checkpoints treat them as any other.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llava_mini_jax.config import ConfigError
from llava_mini_jax.convert.names import RELEASED, Rule
from llava_mini_jax.experiment import TrainConfig
from llava_mini_jax.models import quantized
from llava_mini_jax.models.layers import LowRank

PREFIX = 'lora/'
_RULES = RELEASED.rules()


@dataclasses.dataclass(frozen=True)
class Lora:
  """rank: columns of A. alpha: its share is alpha / rank. targets: patterns of the paths of kernels that get one.

  base: what these kernels are kept in, one of `config.QUANTIZED`; '' = as they are.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  base: str = ''

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def lora_of(config: TrainConfig) -> Lora | None:
  """What the fields `lora_…` say."""
  if not config.lora_rank:
    return None
  return Lora(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_base)


def adapted_paths(paths: Iterable[str]) -> list[str]:
  """The kernels that adapters among these parameters belong to."""
  return [
    path.removeprefix(PREFIX).removesuffix('/a') for path in paths if path.startswith(PREFIX) and path[-2:] == '/a'
  ]


def adapter_names(path: str) -> tuple[str, str]:
  """Paths of A and B of a kernel."""
  return f'{PREFIX}{path}/a', f'{PREFIX}{path}/b'


def target_paths(paths: Iterable[str], targets: Iterable[str]) -> list[str]:
  """The kernels that a pattern matches as a whole.

  Raises:
    ConfigError: a pattern that is none, that matches nothing, or that matches what is not the kernel of a layer.
  """
  paths, found = sorted(paths), {}
  for pattern in targets:
    try:
      matched = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
      raise ConfigError(f'train.lora_targets: {pattern!r} is not a regular expression: {error}') from error
    if not matched:
      raise ConfigError(f'train.lora_targets: {pattern!r} matches no parameter, such as {_example(paths)}')
    for path in matched:
      if not _is_kernel(path):
        raise ConfigError(f'train.lora_targets: {pattern!r} matches {path}; expected kernels such as {_example(paths)}')
    found |= dict.fromkeys(matched)
  return sorted(found)


def _is_kernel(path: str) -> bool:
  """Whether it is what `models.layers.linear` multiplies with; the output head is not."""
  return _RULES[path].kind.startswith('linear') and path != 'decoder/lm_head'


def _example(paths: list[str]) -> str:
  return next((path for path in paths if _is_kernel(path)), 'none')


def abstract_adapters(leaves: Mapping[str, jax.ShapeDtypeStruct], lora: Lora) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, dtype and sharding of every adapter, by path: A is laid out as the kernel's inputs, B as its outputs.

  Raises:
    ConfigError: as `target_paths`.
  """
  found = {}
  for path in target_paths(leaves, lora.targets):
    leaf, lead, split = leaves[path], int(_RULES[path].stacked), _split(_RULES[path])
    axes = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
    for name, shape, layout in (
      ('a', (*leaf.shape[:split], lora.rank), (*axes[:split], None)),
      ('b', (*leaf.shape[:lead], lora.rank, *leaf.shape[split:]), (*axes[:lead], None, *axes[split:])),
    ):
      where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*layout))
      found[f'{PREFIX}{path}/{name}'] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
  return found


def _split(rule: Rule) -> int:
  """Where a kernel's output axes begin."""
  return rule.stacked + (2 if rule.kind == 'linear2' else 1)


def abstract_base(leaves: Mapping[str, jax.ShapeDtypeStruct], lora: Lora) -> dict[str, Any]:
  """The adapted kernels as they are kept, by path, where that is not as they are; raises as `target_paths`."""
  paths = target_paths(leaves, lora.targets) if lora.base else ()
  return {path: quantized.abstract(leaves[path], lora.base, **_axes(path)) for path in paths}


def kept(path: str, kernel: jax.Array, lora: Lora) -> Any:
  """A kernel as it is kept, on the devices where it is."""
  return in_few_bits(path, kernel, lora.base) if _is_quantized(path, lora) else kernel


def in_few_bits(path: str, kernel: jax.Array, kind: str) -> Any:
  """The kernel of this path, on the devices where it is; kind: one of `config.QUANTIZED`."""
  leaf = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=kernel.sharding)
  where = jax.tree.map(lambda part: part.sharding, quantized.abstract(leaf, kind, **_axes(path)))
  return jax.jit(lambda x: quantized.quantize(x, kind, **_axes(path)), out_shardings=where)(kernel)


def as_kept(path: str, kernel: jax.Array, lora: Lora) -> jax.Array:
  """A kernel with the numbers that it has where it is kept: those that its adapter was trained on."""
  if not _is_quantized(path, lora):
    return kernel

  def rounded(x):
    return quantized.dequantize(quantized.quantize(x, lora.base, **_axes(path)), x.dtype)

  return jax.jit(rounded, out_shardings=kernel.sharding)(kernel)


def as_kept_on_host(path: str, kernel: np.ndarray, lora: Lora) -> np.ndarray:
  """`as_kept`, layer by layer where the kernel is stacked."""
  if not _is_quantized(path, lora):
    return kernel
  whole, cpu = np.empty(kernel.shape, kernel.dtype), jax.local_devices(backend='cpu')[0]
  part = 1 if _RULES[path].stacked else len(kernel)
  for start in range(0, len(kernel), part):
    at = slice(start, start + part)
    whole[at] = as_kept(path, jax.device_put(kernel[at], cpu), lora)
  return whole


def _is_quantized(path: str, lora: Lora) -> bool:
  return bool(lora.base) and any(re.fullmatch(pattern, path) for pattern in lora.targets)


def _axes(path: str) -> dict[str, int]:
  """How many axes of a kernel count layers, and how many inputs."""
  layers = int(_RULES[path].stacked)
  return dict(layers=layers, inputs=_split(_RULES[path]) - layers)


def check_groups(rates: Mapping[str, float | None]) -> None:
  """Raises ConfigError unless adapters train and what they belong to does not.

  Args:
    rates: as `optimizer.assign_groups` gives them, of parameters with adapters among them.
  """
  for path in adapted_paths(rates):
    if rates[path] is not None:
      raise ConfigError(f"train.groups: {path} has a LoRA adapter; expected 'frozen', found {rates[path]}")
    if idle := [name for name in adapter_names(path) if rates[name] is None]:
      raise ConfigError(f'train.groups: {idle[0]} is frozen; begin with a row such as ({PREFIX + ".*"!r}, 1e-4)')


def draw_adapters(key: jax.Array, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """A of variance 1 / inputs, B zero; the same numbers for a kernel whatever other targets there are."""
  drawn = {}
  for path, leaf in abstract.items():
    drawn[path] = jnp.zeros(leaf.shape, leaf.dtype)
    if path.endswith('/a'):
      rule = _RULES[adapted_paths([path])[0]]
      inputs = math.prod(leaf.shape[rule.stacked : _split(rule)])
      drawn[path] = jax.random.normal(
        jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, leaf.dtype
      ) / math.sqrt(inputs)
  return drawn


def attach(flat: Mapping[str, Any], scale: float) -> dict[str, Any]:
  """Parameters with adapters among them -> those of the model, adapted kernels as `LowRank`; nothing is added up."""
  own = {path: leaf for path, leaf in flat.items() if not path.startswith(PREFIX)}
  return own | {
    path: LowRank(own[path], *(flat[name] for name in adapter_names(path)), scale) for path in adapted_paths(flat)
  }


def merged(path: str, base: Any, a: Any, b: Any, scale: float) -> Any:
  """W + scale · A · B, of NumPy or JAX arrays, in float32.

  Args:
    path: of the kernel; where it is stacked, the arrays may be those of all layers, or of one.
  """
  inputs = 'ij'[: _split(_RULES[path]) - _RULES[path].stacked]
  layer = 'l' if a.ndim > len(inputs) + 1 else ''
  outputs = 'opq'[: b.ndim - len(layer) - 1]
  equation = f'{layer}{inputs}r,{layer}r{outputs}->{layer}{inputs}{outputs}'
  if isinstance(base, jax.Array):
    return base + scale * jnp.einsum(equation, a, b, precision='highest')
  return base + np.float32(scale) * np.einsum(equation, a, b, optimize=True)


def merged_on_host(path: str, base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
  """`merged`, layer by layer where the kernel is stacked: besides the result, one layer is in memory."""
  if not _RULES[path].stacked:
    return merged(path, base, a, b, scale)
  whole = np.empty(base.shape, np.float32)
  for layer in range(len(base)):
    whole[layer] = merged(path, base[layer], a[layer], b[layer], scale)
  return whole

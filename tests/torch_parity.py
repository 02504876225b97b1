"""Torch modules with random weights, and our modules filled from them through the table of released names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from flax import nnx

from llava_mini_jax.convert.released import from_released
from llava_mini_jax.train.tree import flatten, merge

TOLERANCE = 1e-4


def randomize(module: torch.nn.Module, seed: int) -> None:
  """Matrices that keep the size of what they map; norms and biases away from 1 and 0, so that each of them counts."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
      else:
        parameter.copy_(0.2 * noise + ('norm' in name and name.endswith('weight')))


def load(
  make: Callable[[nnx.Rngs], nnx.Module], path: str, tensors: Mapping[str, np.ndarray]
) -> tuple[nnx.Module, dict[str, np.ndarray]]:
  """Our module, and its parameters by path in the whole model.

  Args:
    make: builds the module.
    path: where it stands in the whole model, e.g. `vision`.
    tensors: torch tensors by released name.
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  shapes = {f'{path}/{leaf}': value.shape for leaf, value in flatten(nnx.to_pure_dict(state)).items()}
  params = from_released(tensors.__getitem__, shapes)
  return merge(graphdef, {name.removeprefix(f'{path}/'): value for name, value in params.items()}), params


def close(actual, expected, what: str, tolerance: float = TOLERANCE) -> None:
  """Every element within `tolerance`; shapes must agree."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, f'{what}: shape {actual.shape}, expected {expected.shape}'
  worst = np.abs(actual - expected).max()
  assert worst <= tolerance, f'{what}: off by {worst:.2e} (tolerance {tolerance})'

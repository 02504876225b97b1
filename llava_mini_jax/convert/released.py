"""Whole models by the tensor names of the released LLaVA-Mini package, in memory: for parity tests and gradients.

Enter torch tensors by name, leave parameters by path, and the reverse; `names.py` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llava_mini_jax.convert.names import RELEASED, from_torch, to_torch

RULES = RELEASED.rules()


def from_released(read: Callable[[str], np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Parameters by path, from a reader of torch tensors by name.

  Args:
    read: gives the tensor of a name (raising KeyError if there is none).
    shapes: the shape of every parameter path of the model.
  Raises:
    ValueError: a tensor's size does not fit; the message has its name, the expected shape and the one found.
  """
  params = {}
  for path, shape in shapes.items():
    rule = RULES[path]
    if rule.stacked:
      layers = (from_torch(read(rule.name.format(i=i)), rule, shape[1:]) for i in range(shape[0]))
      params[path] = np.stack(list(layers))
    else:
      params[path] = from_torch(read(rule.name), rule, shape)
  return params


def to_released(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Torch tensors by released name, from parameters (or gradients) by path; the exact inverse."""
  tensors: dict[str, np.ndarray] = {}
  packed: dict[str, dict[int, np.ndarray]] = {}
  for path, array in params.items():
    rule = RULES[path]
    array = np.asarray(array)
    if rule.stacked:
      tensors.update({rule.name.format(i=i): to_torch(layer, rule) for i, layer in enumerate(array)})
    elif rule.part is None:
      tensors[rule.name] = to_torch(array, rule)
    else:
      packed.setdefault(rule.name, {})[rule.part] = to_torch(array, rule)
  tensors.update({name: np.concatenate([parts[i] for i in range(3)]) for name, parts in packed.items()})
  return tensors

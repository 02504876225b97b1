"""Which parameters of a run another model can start from, and which it must not: by configs and shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_mini_jax.config import LlavaMiniConfig
from llava_mini_jax.convert.names import MODULES
from llava_mini_jax.convert.run_weights import read_experiment
from llava_mini_jax.train.errors import CheckpointError
from llava_mini_jax.train.tree import parameter_shapes

# Fields that change what a module computes and not the shapes of its parameters.
_MEANING = dict(
  vision=('num_hidden_layers', 'select_layer', 'layer_norm_eps'),
  compressor=('kind', 'space', 'within', 'attention', 'key_position', 'num_heads', 'layers'),
  prefusion=('fuse_compressed',),
  decoder=('rope_theta', 'rope_scaling', 'rms_norm_eps'),
)


def starting_paths(
  workdir: Path, source: LlavaMiniConfig, model: LlavaMiniConfig, modules: Collection[str] = MODULES
) -> dict[str, str]:
  """Where training of `model` finds what it starts from: path -> path in the run in `workdir`, whose model is `source`.

  It is every parameter of the modules that both have. A vision tower without its unused last layers takes the first
  ones of a whole tower. A pre-fusion that the run does not have is copied from its decoder if `model.prefusion.init`
  says so; other modules that it does not have are left out.

  Args:
    modules: those of the model that are wanted.
  Raises:
    CheckpointError: fields of a shared module that would make it compute something else, and its parameters that are
      missing, unexpected or misshaped; lists all of them.
  """
  wanted = {path: shape for path, shape in parameter_shapes(model).items() if path.split('/')[0] in modules}
  there = _modules(stored := parameter_shapes(source))
  origin = {path: path for path in wanted if path.split('/')[0] in there}
  if _copies_prefusion(model, there):
    copies = [path for path in wanted if path.startswith('prefusion/')]
    origin |= {path: path.replace('prefusion/', 'decoder/', 1) for path in copies}
  faults = _differences(source, model, there & _modules(wanted))
  faults += _misfits({path: wanted[path] for path in origin}, origin, stored)
  if faults:
    raise CheckpointError(f'{workdir} does not fit this model:\n  ' + '\n  '.join(faults))
  return origin


def describe_start(workdir: Path, model: LlavaMiniConfig, step: int | None = None) -> str:
  """Which modules `starting_paths` takes from the run, which it leaves there, and which start anew: one line.

  Raises:
    CheckpointError: there is no such run.
  """
  there = _modules(parameter_shapes(read_experiment(workdir, step).model))
  wanted = _modules(parameter_shapes(model))
  copied = {'prefusion'} & wanted if _copies_prefusion(model, there) else set()

  def listed(modules: set[str]) -> str:
    return ', '.join(module for module in MODULES if module in modules) or 'none'

  line = (
    f'from {workdir}: loaded {listed(there & wanted)}; left out {listed(there - wanted)}; '
    f'started anew: {listed(wanted - there - copied)}'
  )
  return f'{line}; prefusion copied from the decoder' if copied else line


def _modules(paths: Iterable[str]) -> set[str]:
  return {path.split('/')[0] for path in paths}


def _copies_prefusion(model: LlavaMiniConfig, modules: set[str]) -> bool:
  return 'prefusion' not in modules and model.prefusion.init == 'decoder'


def _differences(stored: LlavaMiniConfig, wanted: LlavaMiniConfig, shared: set[str]) -> list[str]:
  """One line per field, of the modules that both have, whose values make the same parameters compute other things."""
  faults = []
  for module in (module for module in MODULES if module in shared & _MEANING.keys()):
    old, new = getattr(stored, module), getattr(wanted, module)
    fields = [(name, getattr(old, name), getattr(new, name)) for name in _MEANING[module]]
    if module == 'vision' and old.run_layers == new.run_layers:
      fields = [field for field in fields if field[0] == 'layer_norm_eps']  # the same layer, counted otherwise
    for name, a, b in fields:
      if name == 'num_heads' and {old.attention, new.attention} == {'plain'}:
        continue  # which has none
      if name != 'rope_scaling':
        faults += _difference(f'model.{module}.{name}', a, b)
      elif {a.factor, b.factor} != {1.0}:  # else it is off in both
        names = [field.name for field in dataclasses.fields(a)]
        faults += [
          line for n in names for line in _difference(f'model.{module}.{name}.{n}', getattr(a, n), getattr(b, n))
        ]
  return faults


def _difference(field: str, stored: Any, wanted: Any) -> list[str]:
  """Numbers that went through float32 somewhere are the same."""
  numbers = isinstance(stored, float) and isinstance(wanted, float)
  same = math.isclose(stored, wanted, rel_tol=1e-6) if numbers else stored == wanted
  return [] if same else [f'{field}: stored {stored!r}, wanted {wanted!r}']


def _misfits(
  wanted: Mapping[str, tuple[int, ...]], origin: Mapping[str, str], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One line for all that is wanted and not there, in its shape or with more layers where that is fine; or too much."""
  faults = []
  for path, shape in sorted(wanted.items()):
    found = stored.get(origin[path])
    # More layers than wanted are those of a tower that never run, or those of a decoder that pre-fusion copies.
    may_be_cut = path.startswith('vision/layers/') or path != origin[path]
    if found is None:
      faults.append(f'{path}: missing')
    elif found != shape and not (may_be_cut and found[1:] == shape[1:] and found[0] > shape[0]):
      faults.append(f'{path}: expected {list(shape)}, found {list(found)}')
  modules = _modules(wanted)
  # As the layers after the selected one.
  unused = {path for path in stored if path.startswith('vision/post_layernorm/')}
  extra = {path for path in stored if path.split('/')[0] in modules} - set(origin.values()) - unused
  return faults + [f'{path}: unexpected' for path in sorted(extra)]

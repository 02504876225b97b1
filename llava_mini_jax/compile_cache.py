"""Where compiled programs are kept between runs.

Enters: the environment. Leaves: JAX's persistent compilation cache, switched on
(https://docs.jax.dev/en/latest/persistent_compilation_cache.html). JAX_COMPILATION_CACHE_DIR chooses another directory,
JAX_ENABLE_COMPILATION_CACHE=false switches it off.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

_CPUINFO = Path('/proc/cpuinfo')


def use_compilation_cache() -> Path | None:
  """Sets JAX's cache directory unless something else has; gives the one in use, None for a user without a home.

  To be called before JAX compiles.
  """
  if jax.config.jax_compilation_cache_dir is None and default_directory().is_absolute():
    jax.config.update('jax_compilation_cache_dir', str(default_directory()))
  directory = jax.config.jax_compilation_cache_dir
  return Path(directory) if directory else None


def default_directory(cpuinfo: Path = _CPUINFO) -> Path:
  """`llava_mini_jax/KIND OF CPU` in XDG_CACHE_HOME, else in ~/.cache.

  A program compiled for a CPU uses its instructions, but JAX's key does not name them all: machines that share a home
  directory must not run each other's.
  """
  base = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
  return base / 'llava_mini_jax' / f'{platform.machine()}-{_cpu(cpuinfo)}'


def _cpu(cpuinfo: Path) -> str:
  """Short hash of the first processor's model and features."""
  described = platform.processor()
  if cpuinfo.exists():
    lines = cpuinfo.read_text().split('\n\n')[0].splitlines()
    described = '\n'.join(line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU part')))
  return hashlib.sha256(described.encode()).hexdigest()[:12]

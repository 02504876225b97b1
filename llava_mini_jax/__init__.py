"""LLaVA-Mini in JAX: one vision token per image.

Reading order, which is the order data flows: `config` → `types` → `data` →
`models/llava_mini.py` → `train` → `infer` → `evaluate`, `analyze`; `convert`
stands at the side door to Hugging Face checkpoints.

Axis letters, used in every einsum and shape comment:

  B rows           L row length        M visuals per row    V views per visual
  P patches        C compressed tokens T fused text tokens  S cache slots
  N query heads    K key/value heads   H head dim
  D decoder width  W vision width      F feed-forward width

The vocabulary axis is written `vocab`.
"""

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.experiment import DataConfig, Experiment, TrainConfig

__all__ = ['ConfigError', 'DataConfig', 'Experiment', 'LlavaMiniConfig', 'TrainConfig']
__version__ = '0.1.0'

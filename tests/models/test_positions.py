"""Position tables equal those recorded from the released package, and torch's own bicubic interpolation."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from torch_parity import close

from llava_mini_jax.config import LlavaMiniConfig, RopeScaling
from llava_mini_jax.models.layers import rope_frequencies, rope_tables, rotate
from llava_mini_jax.models.positions import bicubic_weights, resize_table, sincos_table

TIGHT = 2e-6  # some units in the last place of values around 1
SIZES = ((1, 4), (2, 3), (2, 24), (3, 8), (5, 5), (8, 24), (7, 4), (24, 8))


@pytest.fixture(scope='module')
def tables() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'preprocess' / 'tables.npz') as stored:
    return {key: stored[key] for key in stored}


@pytest.mark.parametrize(('width', 'grid'), [(64, 1), (64, 2), (64, 3), (1024, 1), (1024, 2)])
def test_sincos_table(tables, width, grid):
  table = sincos_table(grid, width)
  assert table.dtype == np.float32
  close(table, tables[f'sincos_D{width}_G{grid}'], 'sincos', TIGHT)


def test_sincos_table_by_hand():
  """Grid 2, width 8: [sin, cos] of the column, then of the row, at frequencies 1 and 1/100."""
  at = {0: [0, 0, 1, 1], 1: [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]}
  close(sincos_table(2, 8), [[*at[column], *at[row]] for row in (0, 1) for column in (0, 1)], 'sincos', TIGHT)


@pytest.mark.parametrize('keys', [16, 64, 576])
@pytest.mark.parametrize('grid', [1, 2, 3])
def test_resized_sincos_table(tables, grid, keys):
  resized = resize_table(sincos_table(grid, 64), grid, int(keys**0.5))
  close(resized, tables[f'kvpos_D64_G{grid}_n{keys}'], 'resized', TIGHT)


@pytest.mark.parametrize('keys', [16, 64, 144])
@pytest.mark.parametrize('grid', [2, 3])
def test_resized_random_table(tables, grid, keys):
  resized = resize_table(tables[f'rand_src_G{grid}'], grid, int(keys**0.5))
  close(resized, tables[f'rand_G{grid}_n{keys}'], 'resized', TIGHT)


@pytest.mark.parametrize(('size_in', 'size_out'), SIZES)
def test_resize_equals_torch_bicubic(size_in, size_out):
  table = np.random.default_rng(0).normal(size=(size_in**2, 6)).astype(np.float32)
  square = torch.tensor(table).double().reshape(1, size_in, size_in, 6).permute(0, 3, 1, 2)
  expected = torch.nn.functional.interpolate(square, size=(size_out, size_out), mode='bicubic', align_corners=False)
  expected = expected[0].permute(1, 2, 0).reshape(size_out**2, 6).numpy()
  close(resize_table(table, size_in, size_out), expected, 'resized', TIGHT)


def test_jax_resize_would_not_do():
  """Why the weights are written out: the cubic kernel of jax.image is another one."""
  square = np.random.default_rng(0).normal(size=(8, 8, 6)).astype(np.float32)
  other = jax.image.resize(square, (24, 24, 6), 'cubic', antialias=False).reshape(576, 6)
  assert np.abs(other - resize_table(square.reshape(64, 6), 8, 24)).max() > 0.02


@pytest.mark.parametrize(('size_in', 'size_out'), SIZES)
def test_bicubic_weights_keep_a_constant(size_in, size_out):
  weights = bicubic_weights(size_in, size_out)
  assert weights.shape == (size_out, size_in)
  close(weights.sum(1), np.ones(size_out), 'sum of weights', TIGHT)


SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
ROPES = {
  'vicuna': (16, 1e4, RopeScaling()),
  'llama3': (16, 5e5, SCALED),
  'llama31_8b_headdim128': (128, 5e5, SCALED),
}


@pytest.mark.parametrize('name', ROPES)
def test_rope_frequencies(tables, name):
  frequencies = rope_frequencies(*ROPES[name])
  assert frequencies.dtype == np.float32
  np.testing.assert_allclose(frequencies, tables[f'rope_inv_freq_{name}'], rtol=5e-7, atol=0)


def test_the_scaled_frequencies_are_kept_blended_and_slowed():
  plain, scaled = (rope_frequencies(128, 5e5, scaling) for scaling in (RopeScaling(), SCALED))
  ratio = plain / scaled
  wavelength = 2 * np.pi / plain
  np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelength > 8192 / 1], 8.0, rtol=1e-6)
  between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
  assert len(between) and (between > 1.0).all() and (between < 8.0).all() and (np.diff(between) > 0).all()


@pytest.mark.parametrize('preset', ['vicuna_7b', 'llama31_8b'])
def test_presets_have_the_recorded_frequencies(tables, preset):
  decoder = LlavaMiniConfig.preset(preset).decoder
  frequencies = rope_frequencies(decoder.head_dim, decoder.rope_theta, decoder.rope_scaling)
  recorded = tables['rope_inv_freq_llama31_8b_headdim128']
  unscaled = 1e4 ** (-np.arange(0, 128, 2) / 128)
  np.testing.assert_allclose(frequencies, recorded if preset == 'llama31_8b' else unscaled, rtol=5e-7)


@pytest.mark.parametrize('name', ['vicuna', 'llama3'])
def test_cos_and_sin(tables, name):
  head_dim, theta, scaling = ROPES[name]
  decoder = dataclasses.replace(
    LlavaMiniConfig.preset('tiny').decoder, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling
  )
  cos, sin = rope_tables(tables['rope_positions'][None], decoder)
  # One unit in the last place of a frequency, times the position, is what an angle may be off by.
  angle = tables['rope_positions'][:, None] * np.concatenate([tables[f'rope_inv_freq_{name}']] * 2).astype(np.float64)
  for kind, table in (('cos', cos), ('sin', sin)):
    off = np.abs(np.concatenate([table[0]] * 2, axis=-1) - tables[f'rope_{kind}_{name}'])
    assert (off <= angle * 2.0**-22 + TIGHT).all(), f'{kind}: off by {off.max():.2e}'


def test_rotation_depends_on_the_distance_alone():
  """Half-split rotation: the product of a query and a key is that of complex numbers turned by their distance."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  angle = rope_frequencies(8, 100.0, RopeScaling())

  def product(i, j):
    a, b = (rotate(x, (np.cos(p * angle)[None, None], np.sin(p * angle)[None, None])) for x, p in ((q, i), (k, j)))
    return float((a * b).sum())

  complex_q, complex_k = ((x[..., :4] + 1j * x[..., 4:]).ravel() for x in (q, k))
  for i, j in ((3, 3), (7, 2), (12, 7), (2, 7)):
    expected = float((complex_q * np.conj(complex_k) * np.exp(1j * (i - j) * angle)).real.sum())
    assert abs(product(i, j) - expected) < 1e-5

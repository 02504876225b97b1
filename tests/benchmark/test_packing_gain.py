"""What packing is said to gain is what its plans give."""

from __future__ import annotations

import numpy as np

from llava_mini_jax.benchmark.packing_gain import assumed_sizes, describe, gains
from llava_mini_jax.data.packing import plan


def test_gains_are_those_of_the_plans():
  sizes = assumed_sizes(400)
  assert (sizes[:, 0].min() >= 60) and (sizes[:, 0].max() <= 400) and set(sizes[:, 1]) == {0, 1}
  (gain,) = gains(400, shapes=((1024, 8),), windows=(50,))
  rows = plan(sizes, (1024, 8), 0, window=50)
  assert np.isclose(gain.packed.samples, 400 / len(rows))
  assert np.isclose(gain.packed.tokens, sizes[:, 0].sum() / (1024 * len(rows)))
  assert np.isclose(gain.packed.tokens / gain.apart, gain.packed.samples)
  cells = describe([gain]).splitlines()[-1].split(' | ')
  assert cells[:2] == ['| 1,024, 8', '50'] and cells[5] == f'{gain.packed.samples:.2f}'

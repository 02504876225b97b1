"""How many samples of a run were masked (`data.bad_sample`), and when that is too many.

Enters: the count in the metrics of every step, which is that of the global batch: the same on every process, and the
same for a step that is done again after a resume. Leaves: the count so far, which goes into every checkpoint, so that a
resumed run counts as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llava_mini_jax.data.errors import DataError


@dataclasses.dataclass
class BadSamples:
  """Counts masked samples.

  Attributes:
    share: of `samples` that may be masked. samples: of the whole run.
    found: masked so far.
  """

  share: float
  samples: int
  found: int = 0

  def count(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes the metrics of one step. Raises DataError E_BAD_SAMPLES at the first that goes beyond the share."""
    self.found += int(metrics.get('bad_samples', 0))
    if self.found > self.share * self.samples:
      expected = f'expected at most {self.share:.4g} of the {self.samples:,} samples of the run to be bad'
      message = f'{expected}; found {self.found:,} (data.bad_sample_share; the log names each)'
      raise DataError('E_BAD_SAMPLES', f'step {step}', message)

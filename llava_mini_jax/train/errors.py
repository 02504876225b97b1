"""What ends a training run."""


class CheckpointError(RuntimeError):
  """No checkpoint where one was asked for, or one that does not fit; the message lists every leaf at fault."""


class TrainingError(RuntimeError):
  """Training cannot go on; the message names the step and what was found."""

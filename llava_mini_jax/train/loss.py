"""Next-token cross-entropy over the learnt tokens, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def next_token_loss(
  logits: jax.Array, targets: jax.Array, loss_mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean over all learnt tokens of the batch; 0, not NaN, when there is none.

  Args:
    logits: float32[B L vocab]. targets: int[B L]. loss_mask: bool[B L].
  Returns:
    float32 loss, and {accuracy, target_tokens}: the share of targets that are the most likely token, and their count.
  """
  weight = loss_mask.astype(jnp.float32)
  count = weight.sum()
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  total = jnp.maximum(count, 1.0)
  loss = ((log_z - picked) * weight).sum() / total
  accuracy = ((jnp.argmax(logits, -1) == targets) * weight).sum() / total
  return loss, dict(accuracy=accuracy, target_tokens=count)

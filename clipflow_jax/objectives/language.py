"""Next-token prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def predict_next(
  logits: jax.Array, tokens: jax.Array, segments: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums over the batch of the cross-entropy of the next token and of its being the likeliest.

  logits f32[B,S,V] at each slot; tokens, segments i32[B,S]; weights f32[B,S] of predicting the token *in*
  that slot (from the slot before it, so the first token of an example is never predicted).
  """
  same = segments[:, 1:] == segments[:, :-1]
  weights = jnp.where(same, weights[:, 1:], 0.0)
  targets = tokens[:, 1:]
  logits = logits[:, :-1].astype(jnp.float32)
  taken = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - taken
  right = logits.argmax(axis=-1) == targets
  return (loss * weights).sum(), (right * weights).sum()


def weight(segments: jax.Array, weights: jax.Array) -> jax.Array:
  """The sum of weights that `predict_next` uses: what its sums are divided by."""
  return jnp.where(segments[:, 1:] == segments[:, :-1], weights[:, 1:], 0.0).sum()

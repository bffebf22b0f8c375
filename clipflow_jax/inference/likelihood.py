"""How likely are given words? One compiled pass over prompt and words together."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.models.clipflow import ClipFlow


@flax.struct.dataclass
class Likelihood:
  """Of the words that are to be predicted in each row; arrays [B]."""

  log_p: jax.Array  # f32 the sum of the logarithms of their probabilities
  tokens: jax.Array  # i32 how many they are
  greedy: jax.Array  # bool whether each is the likeliest: what greedy decoding would write


def likelihood(model: ClipFlow, params, rows: Batch, features: jax.Array | None, *, end: int | None) -> Likelihood:
  """Likelihood of the words with loss_weights > 0 in rows of one example each; features f32[B,N,T,C] of their pictures.

  end: a token that is not counted although it has weight, as the end of a turn in comparisons with other programs; None
  counts all. Pure; jit it with model and end closed over.
  """

  def run(bound: ClipFlow) -> Likelihood:
    hidden, _ = bound.read(rows, features)
    logits = bound.logits(hidden[:, :-1])
    targets = rows.tokens[:, 1:]
    counted = (rows.segments[:, 1:] > 0) & (rows.loss_weights[:, 1:] > 0)
    if end is not None:
      counted &= targets != end
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    likeliest = logits.argmax(axis=-1) == targets
    return Likelihood(
      jnp.where(counted, taken, 0.0).sum(axis=1), counted.sum(axis=1), jnp.all(likeliest | ~counted, axis=1)
    )

  return model.apply({"params": params}, method=run)

"""Next-token prediction."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.errors import UserError
from clipflow_jax.models.layers import flat_rows, wide_product
from clipflow_jax.parallel.sharding import shard


@flax.struct.dataclass
class Predicted:
  """Weighted sums over a batch's predicted tokens, f32[] each."""

  loss: jax.Array  # cross-entropy
  right: jax.Array  # whether the token was the likeliest
  z: jax.Array  # the square of the log of the softmax's denominator (PaLM, Chowdhery et al. 2022)


def predict_next(
  hidden: jax.Array,
  matrix: jax.Array,
  tokens: jax.Array,
  segments: jax.Array,
  weights: jax.Array,
  *,
  chunk: int = 0,
  axes: tuple[str, str | None] = ("batch", "sequence"),
) -> Predicted:
  """How well each token is predicted from the slot before it, in float32.

  hidden f[B,S,D] at each slot, matrix f[D,V]: their product is the logits; tokens, segments i32[B,S]; weights f32[B,S]
  of predicting the token *in* that slot (from the slot before it, so the first token of an example is never predicted).
  chunk: so many slots of each row at a time, forwards and backwards, so that logits of all slots are never there at
  once (0: all). axes: where hidden's rows and slots lie. UserError if chunk does not divide S.
  """
  b, length, _ = hidden.shape
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  weights = jnp.pad(_shifted(segments, weights), ((0, 0), (0, 1)))
  if not chunk:
    return _predict(matrix, axes, hidden, targets, weights)
  if length % chunk:
    raise UserError(
      f"objective.vocabulary_chunk {chunk} does not divide the {length} slots of a row; choose one that does"
    )

  # A chunk takes every (S/chunk)-th slot: of a sequence that is cut over chips, each has its share of every chunk.
  def cut(x):
    return jnp.moveaxis(x.reshape(b, chunk, length // chunk, *x.shape[2:]), 2, 0)

  one = jax.checkpoint(functools.partial(_predict, matrix, axes), prevent_cse=False)

  def add(total, part):
    return jax.tree.map(jnp.add, total, one(*part)), None

  nothing = Predicted(*[jnp.float32(0)] * 3)
  return jax.lax.scan(add, nothing, (cut(hidden), cut(targets), cut(weights)))[0]


def _predict(matrix, axes, hidden, targets, weights) -> Predicted:
  """hidden f[B,s,D], targets i32[B,s], weights f32[B,s]."""
  logits = wide_product(flat_rows(hidden), matrix)
  logits = shard(logits.reshape(*targets.shape, -1), *axes, "vocabulary")
  taken = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  log_sum = jax.nn.logsumexp(logits, axis=-1)
  right = logits.argmax(axis=-1) == targets
  sums = log_sum - taken, right, jnp.square(log_sum)
  return Predicted(*((each * weights).sum() for each in sums))


def _shifted(segments: jax.Array, weights: jax.Array) -> jax.Array:
  """f32[B,S-1]: the weight of predicting the next slot from each but the last."""
  return jnp.where(segments[:, 1:] == segments[:, :-1], weights[:, 1:], 0.0)


def weight(segments: jax.Array, weights: jax.Array) -> jax.Array:
  """The sum of weights that `predict_next` uses: what its sums are divided by."""
  return _shifted(segments, weights).sum()

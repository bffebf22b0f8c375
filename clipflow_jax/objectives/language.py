"""Next-token prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.errors import UserError
from clipflow_jax.models.layers import flat_rows
from clipflow_jax.parallel.sharding import shard


@flax.struct.dataclass
class Predicted:
  """Weighted sums over a batch's predicted tokens, f32[] each. Only `loss` has a gradient."""

  loss: jax.Array  # cross-entropy, and z by its weight
  right: jax.Array  # whether no token was likelier
  z: jax.Array  # the square of the log of the softmax's denominator (PaLM, Chowdhery et al. 2022)


def predict_next(
  hidden: jax.Array,
  matrix: jax.Array,
  tokens: jax.Array,
  segments: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  chunk: int = 0,
  axes: tuple[str, str | None] = ("batch", "sequence"),
) -> Predicted:
  """How well each token is predicted from the slot before it, in float32.

  hidden f[B,S,D] at each slot, matrix f[D,V]: their product is the logits; tokens, segments i32[B,S]; weights f32[B,S]
  of predicting the token *in* that slot (from the slot before it, so the first token of an example is never predicted).
  z_loss: the weight of z in the loss. chunk: so many slots of each row at a time, so that logits of all slots are never
  there at once (0: all). axes: where hidden's rows and slots lie. UserError if chunk does not divide S.
  """
  length = hidden.shape[1]
  if chunk and length % chunk:
    raise UserError(
      f"objective.vocabulary_chunk {chunk} does not divide the {length} slots of a row; choose one that does"
    )
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  weights = jnp.pad(_shifted(segments, weights), ((0, 0), (0, 1)))
  return _predict(_Settings(z_loss, chunk or length, axes), hidden, matrix, targets, weights)


class _Settings(NamedTuple):
  z_loss: float
  chunk: int
  axes: tuple[str, str | None]


# The gradient of a sum is known as soon as its logits are: made with them, it spares the backward pass to make them, or
# to keep them (Hsu et al. 2024, Liger Kernel).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _predict(how: _Settings, hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> Predicted:
  """hidden f[B,S,D], matrix f[D,V], targets i32[B,S], weights f32[B,S]."""
  low = _gathered(matrix, hidden.dtype)

  def add(total, part):
    return jax.tree.map(jnp.add, total, _score(how, low, part)[0]), None

  return _in_chunks(how, add, _nothing(), (hidden, targets, weights))[0]


def _predict_forward(how, hidden, matrix, targets, weights):
  low = _gathered(matrix, hidden.dtype)

  def add(carry, part):
    total, of_matrix = carry
    found, of_logits = _score(how, low, part, with_gradient=True)
    of_logits = flat_rows(of_logits.astype(hidden.dtype))
    of_matrix += jnp.einsum("...d,...v->dv", flat_rows(part[0]), of_logits, preferred_element_type=jnp.float32)
    of_hidden = jnp.matmul(of_logits, low.T).reshape(part[0].shape)
    return (jax.tree.map(jnp.add, total, found), of_matrix), of_hidden

  nothing = _nothing(), jnp.zeros(matrix.shape, jnp.float32)
  (total, of_matrix), of_hidden = _in_chunks(how, add, nothing, (hidden, targets, weights))
  return total, (of_hidden, of_matrix.astype(matrix.dtype))


def _predict_backward(how, kept, gradient):
  return *(of_sum * gradient.loss.astype(of_sum.dtype) for of_sum in kept), None, None


_predict.defvjp(_predict_forward, _predict_backward)


def _gathered(matrix: jax.Array, dtype: Any) -> jax.Array:
  """matrix f[D,V] as all rows and chunks multiply with it: left to the partitioner it is gathered anew in each."""
  return shard(matrix.astype(dtype), None, "vocabulary")


def _nothing() -> Predicted:
  return Predicted(*[jnp.float32(0)] * 3)


def _in_chunks(how: _Settings, add: Callable, carry: Any, arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
  """`lax.scan` over chunks of arrays [B,S,...] -> (carry, outputs [B,S,...] or None).

  A chunk takes every (S/chunk)-th slot: of a sequence that is cut over chips, each has its share of every chunk.
  """
  b, length = arrays[0].shape[:2]
  if how.chunk == length:
    return add(carry, arrays)

  def cut(x):
    return jnp.moveaxis(x.reshape(b, how.chunk, length // how.chunk, *x.shape[2:]), 2, 0)

  carry, out = jax.lax.scan(add, carry, jax.tree.map(cut, arrays))
  return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(b, length, *x.shape[3:]), out)


def _score(how: _Settings, matrix: jax.Array, part: tuple[jax.Array, ...], with_gradient: bool = False) -> Any:
  """part: hidden f[B,s,D], targets i32[B,s], weights f32[B,s] -> (Predicted, None).

  with_gradient: the second is the loss's gradient by logits, f32[B,s,V].
  """
  hidden, targets, weights = part
  logits = jnp.matmul(flat_rows(hidden), matrix, preferred_element_type=jnp.float32)
  logits = shard(logits.reshape(*targets.shape, -1), *how.axes, "vocabulary")
  taken = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  highest = logits.max(axis=-1)
  log_sum = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
  z = jnp.square(log_sum)
  sums = log_sum - taken + how.z_loss * z, taken >= highest, z
  found = Predicted(*((each * weights).sum() for each in sums))
  if not with_gradient:
    return found, None
  likely = jnp.exp(logits - log_sum[..., None]) * (1 + 2 * how.z_loss * log_sum)[..., None]
  words = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  return found, (likely - (words == targets[..., None])) * weights[..., None]


def _shifted(segments: jax.Array, weights: jax.Array) -> jax.Array:
  """f32[B,S-1]: the weight of predicting the next slot from each but the last."""
  return jnp.where(segments[:, 1:] == segments[:, :-1], weights[:, 1:], 0.0)


def weight(segments: jax.Array, weights: jax.Array) -> jax.Array:
  """The sum of weights that `predict_next` uses: what its sums are divided by."""
  return _shifted(segments, weights).sum()

"""Writing: one compiled prefill and one compiled loop over a buffer of fixed size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.models.clipflow import ClipFlow


def generate(model: ClipFlow, params, prompts: Batch, features: jax.Array | None, *, new: int, end: int) -> jax.Array:
  """Greedy continuation i32[B,new] of B prompts, `end` once a row has ended; features f32[B,N,T,C] of their pictures.

  Pure; jit it with model, new and end closed over. The loop stops when all rows have ended.
  """
  rows, length = prompts.tokens.shape

  def run(bound: ClipFlow) -> jax.Array:
    hidden, context = bound.read(prompts, features)
    valid = prompts.segments > 0
    count = valid.sum(axis=1)
    logits = bound.logits(jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1))[:, 0]
    # New words go behind the prompt's padding; segment and order say what sees what, wherever a slot lies.
    first_order = jnp.where(valid, prompts.order, -1).max(axis=1) + 1
    first_position = jnp.where(valid[..., None], prompts.positions, -1).max(axis=(1, 2)) + 1
    ahead = jnp.arange(new, dtype=jnp.int32)
    room = [(0, 0), (0, 0), (0, new), (0, 0), (0, 0)]
    context = context.replace(
      keys=jnp.pad(context.keys, room),
      values=jnp.pad(context.values, room),
      segments=jnp.concatenate([prompts.segments, jnp.ones((rows, new), jnp.int32)], axis=1),
      order=jnp.concatenate([prompts.order, first_order[:, None] + ahead], axis=1),
    )

    def going(carry):
      i, token, *_ = carry
      return (i < new) & jnp.any(token != end)

    def write(carry):
      i, token, written, context = carry
      written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], i, axis=1)
      logits, context = bound.extend(token[:, None], (first_position + i)[:, None], context, length + i)
      following = logits[:, 0].argmax(axis=-1).astype(jnp.int32)
      return i + 1, jnp.where(token == end, end, following), written, context

    first = logits.argmax(axis=-1).astype(jnp.int32)
    start = (jnp.int32(0), first, jnp.full((rows, new), end, jnp.int32), context)
    return jax.lax.while_loop(going, write, start)[2]

  return model.apply({"params": params}, method=run)

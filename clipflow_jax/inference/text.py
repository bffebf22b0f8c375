"""Writing: one compiled prefill and one compiled loop over a buffer of fixed size."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.models.transformer import Context
from clipflow_jax.training.state import Params

Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (logits f32[B,V], place of the word i32[B]) -> words i32[B]


class Writing(flax.struct.PyTreeNode):
  """Rows that are being written: all that the next words need."""

  token: jax.Array  # i32[B] chosen, but not yet written
  slot: jax.Array  # i32[] where in the context's buffer it goes
  position: jax.Array  # i32[B] its rotary time
  context: Context  # with room for what will be written


def check(new: int, temperature: float) -> None:
  """UserError where so many words are no answer, or none can be chosen at that temperature."""
  if new < 1:
    raise UserError(f"{new} tokens are no answer; let it write at least 1")
  if not 0 <= temperature < math.inf:
    raise UserError(f"temperature {temperature} chooses no words; give 0 for the likeliest, or more")


def greedy(logits: jax.Array, position: jax.Array) -> jax.Array:
  """The likeliest words."""
  return logits.argmax(axis=-1).astype(jnp.int32)


def sampled(temperature: jax.Array, keys: jax.Array) -> Choose:
  """Words drawn from softmax(logits / temperature f32[B]), the likeliest ones at 0, by Gumbel's maximum.

  A word is a function of its row's text and key (keys key[B]) alone.
  """

  def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda key, at: jax.random.gumbel(jax.random.fold_in(key, at), logits.shape[1:]))(keys, position)
    return (logits + temperature[:, None] * noise).argmax(axis=-1).astype(jnp.int32)

  return choose


def begin(
  model: ClipFlow, params, prompts: Batch, features: jax.Array | None, *, room: int, choose: Choose = greedy
) -> Writing:
  """Reads B prompts, features f32[B,N,T,C] of their pictures, and makes room for so many words behind them."""
  rows, length = prompts.tokens.shape

  def run(bound: ClipFlow) -> Writing:
    hidden, context = bound.read(prompts, features)
    valid = prompts.segments > 0
    count = valid.sum(axis=1)
    logits = bound.logits(jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1))[:, 0]
    # New words go behind the prompt's padding; segment and order say what sees what, wherever a slot lies.
    order = jnp.where(valid, prompts.order, -1).max(axis=1) + 1
    position = jnp.where(valid[..., None], prompts.positions, -1).max(axis=(1, 2)) + 1
    grown = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    context = context.replace(
      keys=jnp.pad(context.keys, grown),
      values=jnp.pad(context.values, grown),
      segments=jnp.concatenate([prompts.segments, jnp.ones((rows, room), jnp.int32)], axis=1),
      order=jnp.concatenate([prompts.order, order[:, None] + jnp.arange(room, dtype=jnp.int32)], axis=1),
    )
    return Writing(choose(logits, position), jnp.int32(length), position, context)

  return model.apply({"params": params}, method=run)


def go_on(
  model: ClipFlow, params: Params, writing: Writing, *, new: int, ends: tuple[int, ...], choose: Choose = greedy
) -> tuple[Writing, jax.Array]:
  """The next words i32[B,new], of `ends` once a row has ended. The loop stops when all rows have."""
  # One layer after the other, each with its own weights, taken from their stack before the loop over words: a loop over
  # layers in it would copy all of them for each word, which on CPU is half of the time.
  unrolled = model.clone(transformer={**model.transformer, "unroll": True})
  stack = params["language_model"]["text"]["layers"]
  of_layers = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(model.transformer["layers"])]

  def with_stack(i: jax.Array) -> Params:  # in the loop: what takes the layers from it undoes it, and none is made
    # Whole numbers stay so: bound to the number of the word they are not made floats of once, before the loop.
    layers = jax.tree.map(lambda x: jax.lax.optimization_barrier((x, i))[0] if x.dtype == jnp.int8 else x, of_layers)
    text = {"layers": jax.tree.map(lambda *each: jnp.stack(each), *layers)}
    return {**params, "language_model": {**params["language_model"], "text": text}}

  def ended(now: Writing) -> jax.Array:
    return jnp.isin(now.token, jnp.array(ends, jnp.int32))

  def going(carry):
    i, now, _ = carry
    return (i < new) & ~jnp.all(ended(now))

  def write(carry):
    i, now, written = carry
    written = jax.lax.dynamic_update_slice_in_dim(written, now.token[:, None], i, axis=1)
    words = now.token[:, None], now.position[:, None], now.context, now.slot
    logits, context = unrolled.apply({"params": with_stack(i)}, *words, method="extend")
    following = choose(logits[:, 0], now.position + 1)
    token = jnp.where(ended(now), now.token, following)
    return i + 1, Writing(token, now.slot + 1, now.position + 1, context), written

  start = (jnp.int32(0), writing, jnp.full((writing.token.shape[0], new), ends[0], jnp.int32))
  return jax.lax.while_loop(going, write, start)[1:]


def generate(
  model: ClipFlow,
  params,
  prompts: Batch,
  features: jax.Array | None,
  *,
  new: int,
  ends: tuple[int, ...],
  choose: Choose = greedy,
) -> jax.Array:
  """Continuation i32[B,new] of B prompts, as `go_on`; features f32[B,N,T,C] of their pictures.

  Pure; jit it with model, new and ends closed over.
  """
  writing = begin(model, params, prompts, features, room=new, choose=choose)
  return go_on(model, params, writing, new=new, ends=ends, choose=choose)[1]

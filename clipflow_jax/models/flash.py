"""Attention to a range of slots, fused, on GPUs: a Pallas (Triton) kernel that computes only what is seen.

Packed rows are mostly blocks of scores that nobody sees: of other examples, and of what comes later. A kernel that is
given them as a mask computes all; this one is given each query's first and last key, and leaves out the blocks between.
Source: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

UNSEEN = -1e30  # a score of what is not seen: finite, for a query that sees nothing would make a NaN of -inf
LOG2_E = math.log2(math.e)  # GPUs have an exponential of base 2


class Blocks(NamedTuple):
  """How a kernel is cut: so many `outer` slots a program, which walks through the others `inner` at a time."""

  outer: int
  inner: int
  warps: int
  stages: int


def blocks(dim: int) -> dict[str, Blocks]:
  """For each kernel, by the channels of a head: what was fastest of some that were tried on an H200."""
  inner = 64 if dim > 64 else 32
  return {"out": Blocks(64, 64, 4, 3), "keys": Blocks(64, inner, 4, 2), "queries": Blocks(64, inner, 4, 2)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash(
  q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """softmax(q k^T / sqrt(k)) v over keys first <= slot < end, softmax in float32, and what the softmax divided by.

  q f[B,Q,h,k], k and v f[B,K,g,k] with g dividing h, first and end i32[B,Q] -> (f[B,Q,h,k], the logarithm to base 2 of
  the sum f32[B,h,Q]), from which `joined` makes one softmax of two. A query that sees no key gets a finite value and a
  sum of next to nothing, and gives no gradient. interpret: on a CPU, slowly, for tests.
  """
  return _forward(q, k, v, first, end, interpret)


def joined(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
  """One softmax over the keys of all parts, f32[B,Q,h,k], from what `flash` made of each."""
  total = functools.reduce(jnp.logaddexp2, (log_sum for _, log_sum in parts))
  shares = [jnp.exp2(log_sum - total).transpose(0, 2, 1)[..., None] for _, log_sum in parts]
  return functools.reduce(jnp.add, (out * share for (out, _), share in zip(parts, shares, strict=True)))


def _flash_forward(q, k, v, first, end, interpret):
  out, log_sum = _forward(q, k, v, first, end, interpret)
  # Names of remat.KEPT: what is kept of them spares the kernel's second run.
  out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
  return (out, log_sum), (q, k, v, first, end, out, log_sum)


def _flash_backward(interpret, kept, gradients):
  q, k, v, first, end, out, log_sum = kept
  gradient, of_sum = gradients
  share = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1).transpose(0, 2, 1)  # f32[B,h,Q]
  share -= LOG2_E * of_sum  # a score adds its weight to the sum's logarithm
  rest = (first, end, q, k, v, gradient, log_sum, share)
  dk, dv = _backward_keys(*rest, interpret)
  return _backward_queries(*rest, interpret), dk, dv, None, None


flash.defvjp(_flash_forward, _flash_backward)


# Kernels. Refs of a head's q, k, v and out are [slots, channels], of its log_sum and share [slots]; `bounds` are four
# numbers of blocks: from which on something is seen, all is seen, not all is seen any more, and nothing.


def _forward(q, k, v, first, end, interpret):
  (b, queries, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
  cut, channels = blocks(dim)["out"], pl.next_power_of_2(dim)
  first, end = (_whole(x, cut.outer) for x in (first, end))

  def kernel(bounds_ref, first_ref, end_ref, q_ref, k_ref, v_ref, out_ref, sum_ref):
    start = pl.program_id(0) * cut.outer
    q = _load(q_ref, _left(queries, cut.outer, start), dim)
    first, end = first_ref[:], end_ref[:]

    def step(i, carry, partly):
      out, highest, total = carry
      at = i * cut.inner
      k, v = (_load(ref.at[pl.ds(at, cut.inner)], _left(keys, cut.inner, at), dim) for ref in (k_ref, v_ref))
      scores = triton.dot(q, k.T) * (LOG2_E / math.sqrt(dim))
      if partly:
        scores = jnp.where(_sees(at, cut.inner, first[:, None], end[:, None], 1), scores, UNSEEN)
      now = jnp.maximum(highest, scores.max(axis=1))
      weights, before = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
      out = out * before[:, None] + triton.dot(weights.astype(v.dtype), v)
      return out, now, total * before + weights.sum(axis=1)

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    carry = zeros((cut.outer, channels)), zeros(cut.outer) + UNSEEN, zeros(cut.outer)
    out, highest, total = _walk(bounds_ref, step, carry)
    total = jnp.maximum(total, 1e-30)
    rows, columns = jnp.arange(cut.outer) < queries - start, jnp.arange(channels) < dim
    out = (out / total[:, None]).astype(out_ref.dtype)
    triton.store(out_ref, out, mask=rows[:, None] & columns)
    triton.store(sum_ref, highest + jnp.log2(total), mask=rows)

  seen, own, number = _specs_by_queries(cut, channels, keys, heads // groups)
  return _call(
    kernel,
    "flash_out",
    cut,
    grid=(pl.cdiv(queries, cut.outer), b, heads),
    in_specs=seen,
    out_specs=(own, number),
    out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, queries), jnp.float32)),
    interpret=interpret,
  )(_seen_blocks(first, end, cut), first, end, q, k, v)


def _specs_by_queries(
  cut: Blocks, channels: int, keys: int, per_group: int
) -> tuple[list[pl.BlockSpec], pl.BlockSpec, pl.BlockSpec]:
  """What a program for some queries of a head is given: (bounds, first, end, q, k and v; as q; a number a query)."""
  bounds = pl.BlockSpec((None, None, 4), lambda i, b, h: (b, i, 0))
  range_ = pl.BlockSpec((None, cut.outer), lambda i, b, h: (b, i))
  own = pl.BlockSpec((None, cut.outer, None, channels), lambda i, b, h: (b, i, h, 0))
  whole = pl.BlockSpec((None, keys, None, channels), lambda i, b, h: (b, 0, h // per_group, 0))
  number = pl.BlockSpec((None, None, cut.outer), lambda i, b, h: (b, h, i))
  return [bounds, range_, range_, own, whole, whole], own, number


def _backward_queries(first, end, q, k, v, gradient, log_sum, share, interpret):
  (b, queries, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
  cut, channels = blocks(dim)["queries"], pl.next_power_of_2(dim)
  first, end = (_whole(x, cut.outer) for x in (first, end))

  def kernel(bounds_ref, first_ref, end_ref, q_ref, k_ref, v_ref, gradient_ref, sum_ref, share_ref, dq_ref):
    start = pl.program_id(0) * cut.outer
    q, gradient = (_load(ref, _left(queries, cut.outer, start), dim) for ref in (q_ref, gradient_ref))
    log_sum, share = (_load(ref, _left(queries, cut.outer, start)) for ref in (sum_ref, share_ref))
    first, end = first_ref[:], end_ref[:]

    def step(i, dq, partly):
      at = i * cut.inner
      k, v = (_load(ref.at[pl.ds(at, cut.inner)], _left(keys, cut.inner, at), dim) for ref in (k_ref, v_ref))
      weights = jnp.exp2(triton.dot(q, k.T) * (LOG2_E / math.sqrt(dim)) - log_sum[:, None])
      if partly:
        weights = jnp.where(_sees(at, cut.inner, first[:, None], end[:, None], 1), weights, 0.0)
      of_scores = weights * (triton.dot(gradient, v.T) - share[:, None])
      return dq + triton.dot(of_scores.astype(k.dtype), k)

    dq = _walk(bounds_ref, step, jnp.zeros((cut.outer, channels), jnp.float32)) / math.sqrt(dim)
    rows, columns = jnp.arange(cut.outer) < queries - start, jnp.arange(channels) < dim
    triton.store(dq_ref, dq.astype(dq_ref.dtype), mask=rows[:, None] & columns)

  seen, own, number = _specs_by_queries(cut, channels, keys, heads // groups)
  return _call(
    kernel,
    "flash_queries",
    cut,
    grid=(pl.cdiv(queries, cut.outer), b, heads),
    in_specs=[*seen, own, number, number],
    out_specs=own,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    interpret=interpret,
  )(_seen_blocks(first, end, cut), first, end, q, k, v, gradient, log_sum, share)


def _backward_keys(first, end, q, k, v, gradient, log_sum, share, interpret):
  (b, queries, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
  cut, channels, per_group = blocks(dim)["keys"], pl.next_power_of_2(dim), heads // groups
  bounds = _seeing_blocks(first, end, keys, cut)
  first, end = (_whole(x, cut.inner) for x in (first, end))

  def kernel(bounds_ref, first_ref, end_ref, q_ref, k_ref, v_ref, gradient_ref, sum_ref, share_ref, dk_ref, dv_ref):
    start = pl.program_id(0) * cut.outer
    k, v = (_load(ref, _left(keys, cut.outer, start), dim) for ref in (k_ref, v_ref))

    def of_head(h, carry):
      def step(i, carry, partly):
        dk, dv = carry
        at = i * cut.inner
        own = pl.ds(at, cut.inner)
        q, gradient = (_load(ref.at[own, h], _left(queries, cut.inner, at), dim) for ref in (q_ref, gradient_ref))
        log_sum, share = (_load(ref.at[h, own], _left(queries, cut.inner, at)) for ref in (sum_ref, share_ref))
        weights = jnp.exp2(triton.dot(k, q.T) * (LOG2_E / math.sqrt(dim)) - log_sum[None])
        if partly:
          first, end = (ref[own] for ref in (first_ref, end_ref))
          weights = jnp.where(_sees(start, cut.outer, first[None], end[None], 0), weights, 0.0)
        dv += triton.dot(weights.astype(gradient.dtype), gradient)
        of_scores = weights * (triton.dot(v, gradient.T) - share[None])
        return dk + triton.dot(of_scores.astype(q.dtype), q), dv

      return _walk(bounds_ref, step, carry)

    zeros = jnp.zeros((cut.outer, channels), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, per_group, of_head, (zeros, zeros))
    mask = (jnp.arange(cut.outer) < keys - start)[:, None] & (jnp.arange(channels) < dim)
    triton.store(dk_ref, (dk / math.sqrt(dim)).astype(dk_ref.dtype), mask=mask)
    triton.store(dv_ref, dv.astype(dv_ref.dtype), mask=mask)

  def grouped(x):  # f[B,Q,h,k] -> f[B,Q,g,h/g,k]
    return x.reshape(*x.shape[:2], groups, per_group, dim)

  own = pl.BlockSpec((None, cut.outer, None, channels), lambda i, b, g: (b, i, g, 0))
  whole = pl.BlockSpec((None, queries, None, per_group, channels), lambda i, b, g: (b, 0, g, 0, 0))
  range_ = pl.BlockSpec((None, first.shape[1]), lambda i, b, g: (b, 0))
  number = pl.BlockSpec((None, None, per_group, queries), lambda i, b, g: (b, g, 0, 0))
  return _call(
    kernel,
    "flash_keys",
    cut,
    grid=(pl.cdiv(keys, cut.outer), b, groups),
    in_specs=[
      pl.BlockSpec((None, None, 4), lambda i, b, g: (b, i, 0)),
      range_,
      range_,
      whole,
      own,
      own,
      whole,
      number,
      number,
    ],
    out_specs=(own, own),
    out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    interpret=interpret,
  )(
    bounds,
    first,
    end,
    grouped(q),
    k,
    v,
    grouped(gradient),
    *(x.reshape(b, groups, per_group, queries) for x in (log_sum, share)),
  )


def _call(kernel: Any, name: str, cut: Blocks, **how: Any) -> Any:
  params = triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages)
  return pl.pallas_call(kernel, name=name, compiler_params=params, **how)


def _load(ref: Any, there: Any, dim: int | None = None) -> jax.Array:
  """Ref [slots] or, with dim, [slots, channels]; zeros behind `there` slots (None: all are there) and dim channels."""
  masks = []
  if there is not None:
    masks.append((jnp.arange(ref.shape[0]) < there).reshape(-1, *[1] * (len(ref.shape) - 1)))
  if dim is not None and dim < ref.shape[-1]:
    masks.append((jnp.arange(ref.shape[-1]) < dim)[None])
  if not masks:
    return triton.load(ref)
  mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), ref.shape)
  return triton.load(ref, mask=mask, other=0.0)


def _left(length: int, size: int, start: Any) -> Any:
  """How many slots there are from `start` on; None where blocks of this size are always whole."""
  return length - start if length % size else None


def _sees(start: Any, size: int, first: jax.Array, end: jax.Array, axis: int) -> jax.Array:
  """Which of the `size` keys from `start` on, along the axis, lie between first and end, which lie along the other."""
  slots = jnp.expand_dims(start + jnp.arange(size), 1 - axis)
  return (first <= slots) & (slots < end)


def _walk(bounds_ref: Any, step: Any, carry: Any) -> Any:
  """step(block, carry, partly seen?) over the blocks between the bounds."""
  begin, full, partly, stop = (bounds_ref[i] for i in range(4))
  carry = jax.lax.fori_loop(begin, full, functools.partial(step, partly=True), carry)
  carry = jax.lax.fori_loop(full, partly, functools.partial(step, partly=False), carry)
  return jax.lax.fori_loop(partly, stop, functools.partial(step, partly=True), carry)


def _whole(x: jax.Array, size: int) -> jax.Array:
  """x[B,Q] up to whole blocks, its last number again and again."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge")


def _seen_blocks(first: jax.Array, end: jax.Array, cut: Blocks) -> jax.Array:
  """Bounds i32[B,blocks,4] on the blocks of keys that each block of queries sees; first, end i32[B,Q], whole."""
  first, end = (x.reshape(len(x), -1, cut.outer) for x in (first, end))
  some = first < end
  lowest = jnp.where(some, first, end.max(axis=-1, keepdims=True)).min(axis=-1)
  return _bounds(lowest, first.max(axis=-1), end.min(axis=-1), end.max(axis=-1), cut.inner)


def _seeing_blocks(first: jax.Array, end: jax.Array, keys: int, cut: Blocks) -> jax.Array:
  """Bounds i32[B,blocks,4] on the blocks of queries that see each block of keys; first, end i32[B,Q]."""
  start = jnp.arange(0, keys, cut.outer)[:, None]
  queries = first.shape[1]
  at = jnp.arange(queries)
  first, end = first[:, None], end[:, None]  # [B,1,Q]
  some = (first < start + cut.outer) & (end > start)
  every = (first <= start) & (end >= jnp.minimum(start + cut.outer, keys))

  def earliest(which):
    return jnp.where(which, at, queries).min(axis=-1)

  begin, stop = earliest(some), jnp.where(some, at + 1, 0).max(axis=-1)
  full = earliest(every)
  return _bounds(begin, full, earliest(~every & (at > full[..., None])), stop, cut.inner)


def _bounds(begin: jax.Array, full: jax.Array, partly: jax.Array, stop: jax.Array, size: int) -> jax.Array:
  """Of slots (something is seen from `begin` to before `stop`, all from `full` to before `partly`) -> of blocks."""
  begin, stop = begin // size, -(-stop // size)
  full = jnp.clip(-(-full // size), begin, stop)
  return jnp.stack([begin, full, jnp.clip(partly // size, full, stop), stop], axis=-1)

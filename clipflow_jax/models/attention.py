"""Attention: one mask rule, rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.layers import Linear, RMSNorm
from clipflow_jax.models.rotary import frequencies


def visible(
  query_segments: jax.Array, query_order: jax.Array, key_segments: jax.Array, key_order: jax.Array
) -> jax.Array:
  """The one mask rule, bool[..., Q, K]: same segment (0 is padding) and not later in order.

  Worked example, segment 1, a picture of three tokens between words; order 0 1 2 2 2 3:
    word 0 sees 0; word 1 sees 0 1; a picture token sees 0 1 and the whole picture; word 3 sees everything.
  That is causal text and bidirectional pictures. Noisy blocks are not keys of the text stream at all; a block
  sees the stream by this rule, and itself, so no block sees another.
  """
  same = (query_segments[..., :, None] == key_segments[..., None, :]) & (key_segments[..., None, :] > 0)
  return same & (key_order[..., None, :] <= query_order[..., :, None])


def rotate(
  x: jax.Array, positions: jax.Array, theta: float, sections: tuple[int, ...], scaling: dict[str, Any] | None = None
) -> jax.Array:
  """Rotary positions (Su et al. 2021): halves turned as in Llama, frequencies split by axis as in Qwen2-VL.

  x f[B,S,h,k], positions i32[B,S,3] (time, row, column), sections: how many of the k/2 frequencies turn with
  each axis. Positions equal on all three axes are ordinary RoPE. scaling: as in `frequencies`.
  """
  half = x.shape[-1] // 2
  if sum(sections) != half:
    raise ValueError(f"rotary sections {sections} must add up to half the head dim, {half}")
  speeds, factor = frequencies(half, theta, scaling)
  axis = jnp.repeat(jnp.arange(len(sections)), jnp.array(sections), total_repeat_length=half)
  angles = jnp.take(positions, axis, axis=-1).astype(jnp.float32) * speeds  # [B,S,k/2]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  if factor != 1:
    cos, sin = cos * factor, sin * factor
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """softmax(q k^T / sqrt(k)) v.

  q f[B,Q,h,k], k and v f[B,K,g,k] with g dividing h, mask bool[B,Q or 1,K] or None -> f[B,Q,h,k]. Softmax in
  float32. A query that sees no key (padding) gets a finite value that nothing reads.
  """
  b, queries, heads, dim = q.shape
  keys, groups = k.shape[1], k.shape[2]
  # One batched product over [B*g], the heads of a group side by side: the layout that XLA on CPU likes best.
  q = q.reshape(b, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
  q = q.reshape(b * groups, -1, dim) * (dim**-0.5)
  k = k.transpose(0, 2, 3, 1).reshape(b * groups, dim, keys)
  v = v.transpose(0, 2, 1, 3).reshape(b * groups, keys, dim)
  logits = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(b, heads, queries, keys)
  if mask is not None:
    logits = jnp.where(mask[:, None], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(b * groups, -1, keys)
  out = jnp.matmul(weights, v).reshape(b, groups, heads // groups, queries, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, queries, heads * dim)


def attend_beside(q: jax.Array, k: jax.Array, v: jax.Array, past: tuple[jax.Array, jax.Array], mask: jax.Array):
  """Blocks that attend to themselves and to the row beside which they stand: one softmax over both.

  q f[B*M,n,h,k], k and v f[B*M,n,g,k] of M blocks a row; past keys and values f[B,P,g,k]; mask bool[B,M,P]: what of
  the past a block sees -> f[B*M,n,h*k]. The same as `attend` over the concatenation, but a row's past is neither
  copied for each of its blocks nor multiplied by itself in small pieces.
  """
  b, m, length = mask.shape
  n, heads, dim = q.shape[1:]
  groups = k.shape[2]
  share = heads // groups
  q = q.reshape(b, m, n, groups, share, dim).transpose(0, 3, 1, 4, 2, 5) * (dim**-0.5)  # [B,g,M,h/g,n,k]
  k = k.reshape(b, m, n, groups, dim).transpose(0, 3, 1, 4, 2).reshape(-1, dim, n)
  v = v.reshape(b, m, n, groups, dim).transpose(0, 3, 1, 2, 4).reshape(-1, n, dim)
  past_k = past[0].transpose(0, 2, 3, 1).reshape(-1, dim, length)
  past_v = past[1].transpose(0, 2, 1, 3).reshape(-1, length, dim)

  def product(left, right):  # of f[B,g,M,h/g,n,x], in as few batches as the right side has
    out = jnp.matmul(left.reshape(right.shape[0], -1, left.shape[-1]), right, preferred_element_type=jnp.float32)
    return out.reshape(b, groups, m, share, n, right.shape[-1])

  beside = jnp.where(mask[:, None, :, None, None], product(q, past_k), -1e30)
  weights = jax.nn.softmax(jnp.concatenate([beside, product(q, k)], axis=-1), axis=-1).astype(v.dtype)
  out = (product(weights[..., :length], past_v) + product(weights[..., length:], v)).astype(v.dtype)
  return out.transpose(0, 2, 4, 1, 3, 5).reshape(b * m, n, heads * dim)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions (Ainslie et al. 2023).

  x f[B,S,D], positions i32[B,S,3], mask bool[B,S or 1,K] or None -> (f[B,S,D], (keys, values) f[B,K,g,k]).

  past: keys and values seen besides x's own. Without `write_at` x is M blocks for each of B rows of the past,
    f[B,P,g,k], and mask is bool[B,M,P] (`attend_beside`). With it they are a buffer whose slots
    [write_at, write_at+S) x's own overwrite, and K = P: decoding with static shapes.
  """

  heads: int
  kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  rope_sections: tuple[int, ...] = ()
  qk_norm: bool = True
  qkv_bias: bool = False
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  out_bias: bool = False
  rope_scaling: dict[str, Any] | None = None

  @nn.compact
  def __call__(self, x, positions, mask, past=None, write_at=None):
    def project(name, heads):
      y = Linear(heads * self.head_dim, self.qkv_bias, dtype=self.dtype, name=name)(x)
      return y.reshape(*x.shape[:2], heads, self.head_dim)

    q, k, v = project("query", self.heads), project("key", self.kv_heads), project("value", self.kv_heads)
    if self.qk_norm:
      q = RMSNorm(self.norm_eps, self.dtype, name="query_norm")(q)
      k = RMSNorm(self.norm_eps, self.dtype, name="key_norm")(k)
    sections = self.rope_sections or (self.head_dim // 2,)
    q, k = (rotate(a, positions, self.rope_theta, sections, self.rope_scaling) for a in (q, k))
    if past is not None and write_at is None:
      out = attend_beside(q, k, v, past, mask)
    else:
      if past is not None:
        k, v = (
          jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), write_at, axis=1)
          for old, new in zip(past, (k, v), strict=True)
        )
      out = attend(q, k, v, mask)
    return Linear(x.shape[-1], self.out_bias, dtype=self.dtype, name="out")(out), (k, v)

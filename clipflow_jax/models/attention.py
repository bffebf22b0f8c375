"""Attention: one mask rule, rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from clipflow_jax.models.kernels import Mask, Reach, attend, attend_beside
from clipflow_jax.models.layers import Linear, RMSNorm, scaled_init
from clipflow_jax.models.rotary import Rotation, turn
from clipflow_jax.parallel.sharding import shard


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


def sight(kernel: str, segments: jax.Array, order: jax.Array) -> Mask:
  """`visible` among the slots of a row, segments and order i32[B,S], in the form that the kernel takes."""
  return Reach.of(segments, order) if kernel in ("flash", "splash") else visible(segments, order, segments, order)


def looks(
  q: jax.Array,
  k: jax.Array,
  mask: jax.Array | None,
  past: tuple[jax.Array, jax.Array] | None = None,
  causal: bool = False,
) -> jax.Array:
  """How much of each key every query takes, f[B,Q,h,K], those of the past first; arguments as of `attend_beside`.

  It is what attention makes of values that each point in a direction of their own.
  """
  before = 0 if past is None else past[0].shape[1]
  ways = jnp.eye(before + k.shape[1])
  v = jnp.broadcast_to(ways[before:, None], (*k.shape[:3], len(ways)))
  if past is None:
    out = attend(q, k, v, mask)
  else:
    beside = jnp.broadcast_to(ways[:before, None], (*past[0].shape[:3], len(ways)))
    out = attend_beside(q, k, v, (past[0], beside), mask, causal=causal)
  return out.reshape(*q.shape[:3], len(ways))


class Attention(nn.Module):
  """Grouped-query attention with rotary positions (Ainslie et al. 2023).

  x f[B,S,D], rotation of its slots, mask as `kernels.attend` -> (f[B,S,D], (keys, values) f[B,K,g,k]).

  past: keys and values seen besides x's own. Without `write_at` x is M blocks for each of B rows of the past,
    f[B,P,g,k], and mask is bool[B,M,P] (`attend_beside`). With write_at, (layer, slot), they are the buffers of all
    layers, f[L,B,K,g,k], in which x's own overwrite that layer's S slots from there on, and the buffers are returned:
    decoding with static shapes, few queries and no kernel.

  Whoever asks `apply` for intermediates finds `looks` among them.
  """

  heads: int
  kv_heads: int
  head_dim: int
  qk_norm: bool = True
  qkv_bias: bool = False
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  out_bias: bool = False
  axes: tuple[str, str | None] = ("batch", "sequence")  # where x's rows and slots lie
  kernel: str = "xla"  # of `kernels.attend`
  out_scale: float = 1.0  # of `layers.scaled_init`

  @nn.compact
  def __call__(self, x, rotation: Rotation, mask, past=None, write_at=None, causal=False):
    def project(name, heads):
      y = Linear(heads * self.head_dim, self.qkv_bias, dtype=self.dtype, name=name)(x)
      return shard(y.reshape(*x.shape[:2], heads, self.head_dim), *self.axes, "heads")

    q, k, v = project("query", self.heads), project("key", self.kv_heads), project("value", self.kv_heads)
    if self.qk_norm:
      q = RMSNorm(self.norm_eps, self.dtype, name="query_norm")(q)
      k = RMSNorm(self.norm_eps, self.dtype, name="key_norm")(k)
    q, k = turn(q, rotation, halves=True), turn(k, rotation, halves=True)
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

    # Context parallelism: a chip's queries see the keys and values of all slots, gathered here (few heads, so little).
    def gather(*each):
      return tuple(shard(a, "batch" if past is not None else self.axes[0], None, "heads") for a in each)

    kept: tuple[jax.Array, ...] = (k, v)
    if past is None:
      all_k, all_v = gather(k, v)
      out = attend(q, all_k, all_v, mask, self.kernel, self.axes)
    elif write_at is None:
      out = attend_beside(q, k, v, gather(*past), mask, self.kernel, causal)
    else:
      layer, slot = write_at
      kept = tuple(
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (layer, 0, slot, 0, 0))
        for old, new in zip(past, (k, v), strict=True)
      )
      k, v = (jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False) for buffer in kept)
      out = attend(q, k, v, mask)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "looks", looks(q, k, mask, past if write_at is None else None, causal))
    out = checkpoint_name(out, "attention")
    init = scaled_init(self.out_scale)
    return Linear(x.shape[-1], self.out_bias, init, dtype=self.dtype, name="out")(out), kept

"""The encoder of CLIP's towers: LayerNorm, biases, GELU (Dosovitskiy et al. 2021; Radford et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from clipflow_jax.models.kernels import attend
from clipflow_jax.models.layers import Linear, RMSNorm, standardise
from clipflow_jax.models.remat import remat
from clipflow_jax.parallel.sharding import shard


class EncoderAttention(nn.Module):
  """x f[B,S,D], mask bool[B,S or 1,S] or None -> f[B,S,D]. qk_norm: as in ViT-22B (Dehghani et al. 2023)."""

  heads: int
  qk_norm: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask):
    def project(name):
      y = Linear(x.shape[-1], True, dtype=self.dtype, name=name)(x)
      return shard(y.reshape(*x.shape[:2], self.heads, -1), "rows", None, "heads")

    q, k = project("query"), project("key")
    if self.qk_norm:
      q, k = RMSNorm(dtype=self.dtype, name="query_norm")(q), RMSNorm(dtype=self.dtype, name="key_norm")(k)
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(project("value"), "value")
    out = checkpoint_name(attend(q, k, v, mask, self.kernel), "attention")
    return Linear(x.shape[-1], True, dtype=self.dtype, name="out")(out)


class EncoderBlock(nn.Module):
  """Pre-norm attention and GELU network, residual. x f[B,S,D], mask as `EncoderAttention` -> f[B,S,D]."""

  heads: int
  mlp: int
  qk_norm: bool = False
  norm_eps: float = 1e-6
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask):
    def norm(name):
      return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)

    attention = EncoderAttention(self.heads, self.qk_norm, self.kernel, self.dtype, name="attention")
    x = shard(x + attention(norm("attention_norm")(x), mask), "rows")
    y = nn.gelu(Linear(self.mlp, True, dtype=self.dtype, name="up")(norm("mlp_norm")(x)))
    return shard(x + Linear(x.shape[-1], True, dtype=self.dtype, name="down")(y), "rows")


class Encoder(nn.Module):
  """`layers` EncoderBlocks, scanned (`remat` and `unroll` as in `transformer.Stack`).

  x f[B,S,D], mask as `EncoderAttention`, layer_weights f32[layers]
  -> (f[B,S,D], f32[B,S,D]: the weighted sum of each layer's output under an affine-free LayerNorm, or None).
  """

  layers: int
  heads: int
  mlp: int
  qk_norm: bool = False
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None, layer_weights=None):
    def body(block, carry, weight):
      x, total = carry
      x = block(x, mask)
      # Summed in the carry: no layer's output outlives its layer.
      return (x, None if weight is None else total + weight * standardise(x)), None

    scan = nn.scan(
      remat(body, self.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
      unroll=self.unroll,
    )
    block = EncoderBlock(self.heads, self.mlp, self.qk_norm, self.norm_eps, self.kernel, self.dtype, name="layers")
    total = None if layer_weights is None else jnp.zeros(x.shape, jnp.float32)
    (x, total), _ = scan(block, (x, total), layer_weights)
    return x, total

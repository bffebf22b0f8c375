"""The encoder of CLIP's towers: LayerNorm, biases, GELU (Dosovitskiy et al. 2021; Radford et al. 2021)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from clipflow_jax.models.kernels import attend, mask_at
from clipflow_jax.models.layers import Linear, RMSNorm, SwiGLU, at_slot, layer_norm
from clipflow_jax.models.remat import remat, scan
from clipflow_jax.models.rotary import turn
from clipflow_jax.parallel.sharding import shard


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


# "gelu" is by the error function, "gelu_tanh" its usual approximation, "quick_gelu" that of the first CLIP models.
ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": nn.gelu,
  "quick_gelu": _quick_gelu,
}


class EncoderAttention(nn.Module):
  """x f[B,S,D], mask bool[B,S or 1,S] or None -> f[B,S,D]. qk_norm: as in ViT-22B (Dehghani et al. 2023).

  sub_norm: a norm before the last matrix (Wang et al. 2022). rotation: of queries and keys, or None. read: the one slot
  of `at_slot` that is asked for, f[B,1,D].
  """

  heads: int
  qk_norm: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32
  key_bias: bool = True
  sub_norm: bool = False

  @nn.compact
  def __call__(self, x, mask, rotation=None, read=None):
    def project(name, x=x):
      y = Linear(x.shape[-1], self.key_bias or name != "key", dtype=self.dtype, name=name)(x)
      return shard(y.reshape(*x.shape[:2], self.heads, -1), "rows", None, "heads")

    q, k = project("query", x if read is None else at_slot(x, read)), project("key")
    if self.qk_norm:
      q, k = RMSNorm(dtype=self.dtype, name="query_norm")(q), RMSNorm(dtype=self.dtype, name="key_norm")(k)
    if rotation is not None:
      of_query = rotation if read is None else jax.tree.map(lambda part: at_slot(part[None], read), rotation)
      q, k = turn(q, of_query), turn(k, rotation)
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(project("value"), "value")
    # The kernels are for many queries.
    seen = (mask, self.kernel) if read is None else (mask_at(mask, read), "xla")
    out = checkpoint_name(attend(q, k, v, *seen), "attention")
    if self.sub_norm:
      out = nn.LayerNorm(1e-6, dtype=self.dtype, name="inner_norm")(out)
    return Linear(x.shape[-1], True, dtype=self.dtype, name="out")(out)


class CrossAttention(nn.Module):
  """Queries f[B,Q,D] read x f[B,S,D] -> f[B,Q,D]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, queries, x):
    def project(name, of):
      return Linear(x.shape[-1], True, dtype=self.dtype, name=name)(of).reshape(*of.shape[:2], self.heads, -1)

    out = attend(project("query", queries), project("key", x), project("value", x), None)
    return Linear(x.shape[-1], True, dtype=self.dtype, name="out")(out)


class EncoderBlock(nn.Module):
  """Attention and GELU network, residual. x f[B,S,D], mask, rotation and read as `EncoderAttention` -> f[B,S or 1,D].

  activation: a name of ACTIVATIONS. layer_scale: what is added is weighted by channel (Touvron et al. 2021, CaiT).
  post_norm: what is added is normed, not what is read. gated: SwiGLU in place of the GELU network. sub_norm, key_bias:
  as `EncoderAttention`, the norm also within SwiGLU (EVA-02, Fang et al. 2023).
  """

  heads: int
  mlp: int
  qk_norm: bool = False
  norm_eps: float = 1e-6
  kernel: str = "xla"
  dtype: Any = jnp.float32
  activation: str = "gelu_tanh"
  layer_scale: bool = False
  post_norm: bool = False
  gated: bool = False
  sub_norm: bool = False
  key_bias: bool = True

  @nn.compact
  def __call__(self, x, mask, rotation=None, read=None):
    def norm(name):
      return nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)

    def weighted(name, y):
      if not self.layer_scale:
        return y
      return y * self.param(name, nn.initializers.ones, y.shape[-1:], jnp.float32).astype(self.dtype)

    def network(y):
      if self.gated:
        return SwiGLU(self.mlp, self.dtype, True, self.sub_norm, name="mlp")(y)
      y = ACTIVATIONS[self.activation](Linear(self.mlp, True, dtype=self.dtype, name="up")(y))
      return Linear(x.shape[-1], True, dtype=self.dtype, name="down")(y)

    def added(name, of, y):
      y = norm(f"{name}_norm")(of(y)) if self.post_norm else of(norm(f"{name}_norm")(y))
      return weighted(f"{name}_scale", y)

    own = dict(key_bias=self.key_bias, sub_norm=self.sub_norm)
    attention = EncoderAttention(self.heads, self.qk_norm, self.kernel, self.dtype, **own, name="attention")
    attended = added("attention", lambda y: attention(y, mask, rotation, read), x)
    x = shard((x if read is None else at_slot(x, read)) + attended, "rows")
    return shard(x + added("mlp", network, x), "rows")


class Encoder(nn.Module):
  """`layers` EncoderBlocks, scanned (`remat` and `unroll` as in `transformer.Stack`).

  x f[B,S,D], mask and rotation as `EncoderAttention`, layer_weights f32[layers]
  -> (f[B,S,D], f32[B,S,D]: the weighted sum of each layer's output, with `feature_norm` under an affine-free LayerNorm,
  or None).

  read: the one slot that is asked for, as of `at_slot`, in place of layer_weights -> (f[B,1,D], None). The last layer
  then makes no other: of 24 layers this spares some 3.5 %.
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
  activation: str = "gelu_tanh"
  layer_scale: bool = False
  feature_norm: bool = True
  post_norm: bool = False
  gated: bool = False
  sub_norm: bool = False
  key_bias: bool = True

  @nn.compact
  def __call__(self, x, mask=None, layer_weights=None, rotation=None, read=None):
    def body(block, carry, weight):
      x, total = carry
      x = block(x, mask, rotation)
      # Summed in the carry: no layer's output outlives its layer.
      if weight is not None:
        total = total + weight * (layer_norm(x) if self.feature_norm else x.astype(jnp.float32))
      return (x, total), None

    if self.kernel == "flash":
      # For the gradient of places, a sum over rows, XLA would lay rows innermost on GPUs: each layer then turns what it
      # multiplies round and back.
      x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))
    own = dict(activation=self.activation, layer_scale=self.layer_scale, post_norm=self.post_norm, gated=self.gated)
    own |= dict(sub_norm=self.sub_norm, key_bias=self.key_bias)
    block = EncoderBlock(
      self.heads, self.mlp, self.qk_norm, self.norm_eps, self.kernel, self.dtype, **own, name="layers"
    )
    if read is None or self.is_initializing():  # then for the stack of parameters, whatever is read
      total = None if layer_weights is None else jnp.zeros(x.shape, jnp.float32)
      (x, total), _ = scan(body, self.layers, self.remat, self.unroll)(block, (x, total), layer_weights)
      return x, total

    def of(some, body):  # by these layers of the stack
      return nn.map_variables(body, "params", lambda params: jax.tree.map(lambda stacked: stacked[some], params))

    (x, _), _ = of(slice(-1), scan(body, self.layers - 1, self.remat, self.unroll))(block, (x, None), None)
    last = remat(lambda block, x: block(x, mask, rotation, read), self.remat, unroll=True)
    return of(-1, last)(block, x), None

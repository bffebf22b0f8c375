"""The vision tower: pictures to features and one embedding."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipflow_jax.models.encoder import Encoder
from clipflow_jax.models.layers import Linear, to_patches, to_unit
from clipflow_jax.parallel.sharding import shard


@flax.struct.dataclass
class Seen:
  """What the tower makes of a picture."""

  tokens: jax.Array  # f[B,T,C] the last layer's tokens
  embedding: jax.Array  # f32[B,E] unit norm
  features: jax.Array | None  # f32[B,T,C] mean over chosen layers' affine-free LayerNorms, where asked for


class VisionTower(nn.Module):
  """A ViT whose features are drawn from several layers (RAEv2, 2026: shallow layers carry what pixels need).

  feature_layers: 1-based layers that the features average; empty means all.
  images u8[B,H,W,3] -> Seen. with_features costs a norm a layer, and a contrastive loss wants none.
  """

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp: int
  embedding: int
  feature_layers: tuple[int, ...] = ()
  qk_norm: bool = False
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @property
  def tokens(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @nn.compact
  def __call__(self, images: jax.Array, with_features: bool = True) -> Seen:
    x = Linear(self.width, True, dtype=self.dtype, name="patches")(to_patches(to_unit(images), self.patch_size))
    init = nn.initializers.normal(0.1)
    x = x + self.param("place_positions", init, (self.tokens, self.width), jnp.float32)
    encoder = Encoder(
      self.layers,
      self.heads,
      self.mlp,
      self.qk_norm,
      self.norm_eps,
      self.remat,
      self.unroll,
      self.kernel,
      self.dtype,
      name="encoder",
    )
    x = shard(x.astype(self.dtype), "rows")
    tokens, features = encoder(x, None, self._layer_weights() if with_features else None)
    pooled = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="out_norm")(tokens).mean(axis=1)
    embedding = Linear(self.embedding, name="projection")(pooled)
    return Seen(tokens, unit(embedding), features)

  def _layer_weights(self) -> jax.Array:
    chosen = self.feature_layers or tuple(range(1, self.layers + 1))
    weights = np.zeros(self.layers, np.float32)
    weights[[layer - 1 for layer in chosen]] = 1 / len(chosen)
    return jnp.asarray(weights)


def unit(x: jax.Array) -> jax.Array:
  """x f[..., E] in float32 at unit norm."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)

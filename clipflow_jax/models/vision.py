"""The vision tower: pictures to features and one embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.models.encoder import ACTIVATIONS, CrossAttention, Encoder
from clipflow_jax.models.layers import Linear, to_patches, to_unit
from clipflow_jax.models.rotary import Rotation, grid_angles
from clipflow_jax.parallel.sharding import shard


@flax.struct.dataclass
class Seen:
  """What the tower makes of a picture, as far as it was asked for."""

  embedding: jax.Array  # f32[B,E] unit norm
  tokens: jax.Array | None  # f[B,T,C] the last layer's tokens
  features: jax.Array | None  # f32[B,T,C] mean over chosen layers' tokens


Want = Literal["features", "tokens", "embedding"]
HALF = (0.5, 0.5, 0.5)


class AttentionPool(nn.Module):
  """One learned query reads all tokens, then a residual network: f[B,T,D] -> f[B,D]."""

  heads: int
  mlp: int
  activation: str
  norm_eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    probe = self.param("probe", nn.initializers.normal(0.02), (1, x.shape[-1]), jnp.float32)
    probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], *probe.shape))
    x = CrossAttention(self.heads, self.dtype, name="attention")(probe, x)
    y = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="mlp_norm")(x)
    y = ACTIVATIONS[self.activation](Linear(self.mlp, True, dtype=self.dtype, name="up")(y))
    return (x + Linear(x.shape[-1], True, dtype=self.dtype, name="down")(y))[:, 0]


class VisionTower(nn.Module):
  """A ViT whose features are drawn from several layers (RAEv2, 2026: shallow layers carry what pixels need).

  feature_layers: 1-based layers that the features average; empty means all. feature_norm: each under an affine-free
  LayerNorm, else as it is. feature_pool: squares of so many tokens a side are averaged into one feature.
  pooling: "mean" of the tokens, the "class" token, or "attention" by one learned query (Zhai et al. 2022).
  embedding 0: what was pooled is the embedding. mean, std: of the pixels in 0..1, by channel. in_norm: a norm before
  the first layer (CLIP). has_mask: DINOv2 has trained a token for hidden patches; it is kept for those who train it
  further. post_norm, gated, sub_norm, key_bias: as `EncoderBlock`. rope_span: queries and keys of patches are turned by
  row and column too, as on a grid of so many a side (0: they are not).
  images u8[B,H,W,3] -> Seen. want: the first of its fields that is asked for, in the order "features", "tokens",
  "embedding"; it has those behind. Features cost a norm a layer; of the last layer a class token needs itself alone.
  """

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp: int
  embedding: int
  feature_layers: tuple[int, ...] = ()
  feature_norm: bool = True
  feature_pool: int = 1
  qk_norm: bool = False
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32
  activation: str = "gelu_tanh"
  layer_scale: bool = False
  has_class: bool = False
  has_mask: bool = False
  patch_bias: bool = True
  in_norm: bool = False
  pooling: str = "mean"
  projection_bias: bool = False
  post_norm: bool = False
  gated: bool = False
  sub_norm: bool = False
  key_bias: bool = True
  rope_span: int = 0
  mean: tuple[float, ...] = HALF
  std: tuple[float, ...] = HALF

  @property
  def tokens(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @nn.compact
  def __call__(self, images: jax.Array, want: Want = "features") -> Seen:
    if self.width % self.heads:  # not before: of an imported drawer's features the tower may be a size alone
      raise UserError(
        f"model.clip.vision.width {self.width} is no multiple of heads {self.heads}; change one of the two"
      )
    seen = self.image_size // self.patch_size * self.patch_size  # a margin that no patch covers is left out
    patches = to_patches(self._normalise(images[:, :seen, :seen]), self.patch_size)
    x = Linear(self.width, self.patch_bias, dtype=self.dtype, name="patches")(patches)
    init = nn.initializers.normal(0.1)
    first = int(self.has_class)
    token = self.param("class_token", init, (self.width,), jnp.float32) if first else None
    if self.has_mask:
      self.param("mask_token", nn.initializers.zeros, (self.width,), jnp.float32)
    places = self.param("place_positions", init, (first + self.tokens, self.width), jnp.float32)
    if first:
      x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
      places = places + jnp.pad(token[None], ((0, self.tokens), (0, 0)))
    x = x + places
    if self.in_norm:
      x = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="in_norm")(x)
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
      self.activation,
      self.layer_scale,
      self.feature_norm,
      self.post_norm,
      self.gated,
      self.sub_norm,
      self.key_bias,
      name="encoder",
    )
    weights = self._layer_weights() if want == "features" else None
    read = 0 if want == "embedding" and self.pooling == "class" else None
    tokens, features = encoder(shard(x.astype(self.dtype), "rows"), None, weights, self._rotation(first), read)
    pooled = tokens[:, :1] if self.pooling == "class" else tokens
    embedding = self._pool(nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="out_norm")(pooled))
    if self.embedding:
      embedding = Linear(self.embedding, self.projection_bias, name="projection")(embedding)
    if features is not None:
      features = self._pool_features(features[:, first:])
    return Seen(unit(embedding), None if want == "embedding" else tokens[:, first:], features)

  def _normalise(self, images: jax.Array) -> jax.Array:
    if self.mean == self.std == HALF:
      return to_unit(images)
    return (images.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)

  def _pool(self, x: jax.Array) -> jax.Array:
    if self.pooling == "class":
      return x[:, 0]
    if self.pooling == "attention":
      return AttentionPool(self.heads, self.mlp, self.activation, self.norm_eps, name="pool")(x)
    return x.mean(axis=1)

  def _rotation(self, first: int) -> Rotation | None:
    if not self.rope_span:
      return None
    side = self.image_size // self.patch_size
    angles = grid_angles(side, side, self.width // self.heads, self.rope_span / side, in_turn=False)
    return Rotation.by(jnp.pad(angles, ((first, 0), (0, 0))))  # the class token stands nowhere

  def _pool_features(self, features: jax.Array) -> jax.Array:
    if self.feature_pool == 1:
      return features
    side = self.image_size // self.patch_size // self.feature_pool
    squares = features.reshape(-1, side, self.feature_pool, side, self.feature_pool, self.width)
    return squares.mean(axis=(2, 4)).reshape(-1, side**2, self.width)

  def _layer_weights(self) -> jax.Array:
    chosen = self.feature_layers or tuple(range(1, self.layers + 1))
    weights = np.zeros(self.layers, np.float32)
    weights[[layer - 1 for layer in chosen]] = 1 / len(chosen)
    return jnp.asarray(weights)


def unit(x: jax.Array) -> jax.Array:
  """x f[..., E] in float32 at unit norm."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


class Standardise(nn.Module):
  """Raw features f32[...,T,C] standardised by what was measured on data (`data.feature_statistics`).

  whiten: whether channels, and a picture's tokens, are made to differ too.
  """

  whiten: bool = False

  @nn.compact
  def __call__(self, raw: jax.Array) -> jax.Array:
    shape, channels = raw.shape[-2:], raw.shape[-1]
    mean = self.param("mean", nn.initializers.zeros, shape, jnp.float32)
    features = (raw - mean) / self.param("std", nn.initializers.ones, shape, jnp.float32)
    if self.whiten:
      matrix = self.param("whitening", lambda key, *how: jnp.eye(*how), channels, channels)
      features = jnp.matmul(features, matrix, precision="highest")
      common = self.param("common", nn.initializers.ones, (), jnp.float32)
      features -= (1 - common) * features.mean(axis=-2, keepdims=True)
    return features


def raw_features(features: jax.Array, statistics: Mapping[str, jax.Array]) -> jax.Array:
  """Standardised features f32[N,T,C] as they were before `Standardise`, whose parameters the statistics are."""
  if "whitening" in statistics:  # which is symmetric
    features = features + (1 / statistics["common"] - 1) * features.mean(axis=-2, keepdims=True)
    features = jnp.linalg.solve(statistics["whitening"], features.swapaxes(1, 2)).swapaxes(1, 2)
  return features * statistics["std"] + statistics["mean"]

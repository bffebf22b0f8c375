"""CLIP's text tower: a caption to one embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.attention import sight
from clipflow_jax.models.encoder import Encoder
from clipflow_jax.models.kernels import Mask
from clipflow_jax.models.layers import Embed, Linear
from clipflow_jax.models.vision import unit
from clipflow_jax.parallel.sharding import shard


class TextTower(nn.Module):
  """tokens i32[B,S], mask bool[B,S] (True: a word) -> f32[B,E], unit norm.

  pooling: which of the last layer's tokens are the text. "mean": all words (bidirectional, the choice here). "end":
  the first token that is `end`, or the one of the highest id where `end` is None (causal: CLIP). It sees all before it,
  what begins a text too, and no padding. "last": the last of the row, which sees padding too and was trained to
  (SigLIP). The mask is of "mean" alone.
  """

  vocabulary: int
  length: int
  width: int
  layers: int
  heads: int
  mlp: int
  embedding: int
  qk_norm: bool = False
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32
  activation: str = "gelu_tanh"
  pooling: str = "mean"
  end: int | None = None
  projection_bias: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    x = Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embed")(tokens)
    places = self.param("place_positions", init, (self.length, self.width), jnp.float32)
    x = x + places[: tokens.shape[1]].astype(self.dtype)
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
      name="encoder",
    )
    seen: Mask = None
    read: jax.Array | int | None = None
    if self.pooling == "mean":
      together = self.kernel == "flash"  # which sees slots that lie together, and a caption's words do
      seen = sight(self.kernel, mask.astype(jnp.int32), jnp.zeros_like(tokens)) if together else mask[:, None, :]
    if self.pooling == "end":
      order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
      seen = sight(self.kernel, jnp.ones_like(order), order)
      read = jnp.argmax(tokens if self.end is None else tokens == self.end, axis=1)
    if self.pooling == "last":
      read = tokens.shape[1] - 1
    x, _ = encoder(shard(x, "rows"), seen, read=read)
    x = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="out_norm")(x)
    if read is None:
      words = mask[..., None].astype(jnp.float32)
      x = (x * words).sum(axis=1) / jnp.maximum(words.sum(axis=1), 1)
    else:
      x = x[:, 0]
    return unit(Linear(self.embedding, self.projection_bias, name="projection")(x))

"""CLIP's text tower: a caption to one embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.encoder import Encoder
from clipflow_jax.models.layers import Linear
from clipflow_jax.models.vision import unit
from clipflow_jax.parallel.sharding import shard


class TextTower(nn.Module):
  """tokens i32[B,S], mask bool[B,S] (True: a word) -> f32[B,E], unit norm. Bidirectional, mean over words."""

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

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embed")(tokens)
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
      name="encoder",
    )
    x, _ = encoder(shard(x, "rows"), mask[:, None, :])
    x = nn.LayerNorm(self.norm_eps, dtype=jnp.float32, name="out_norm")(x)
    words = mask[..., None].astype(jnp.float32)
    pooled = (x * words).sum(axis=1) / jnp.maximum(words.sum(axis=1), 1)
    return unit(Linear(self.embedding, name="projection")(pooled))

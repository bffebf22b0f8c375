"""Features to pixels: a bidirectional stack of the same block, as a flow over patches or as one pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.layers import (
  GridPositions,
  Linear,
  RMSNorm,
  from_patches,
  grid_positions,
  to_patches,
)
from clipflow_jax.models.time import TimeTokens
from clipflow_jax.models.transformer import Stack
from clipflow_jax.parallel.sharding import shard


class PixelDecoder(nn.Module):
  """features f[B,T,C] (a flow: and noisy pictures f32[B,H,W,3], t f32[B]) -> pictures f32[B,H,W,3] in -1..1.

  flow: predict the clean picture from a noisy one (x-prediction on pixel patches, Li & He 2025) with the
  features added at their grid cells: samples what the features leave open. Otherwise one deterministic pass:
  the fast choice. patch_size is per feature token: pixel patches and feature tokens share one grid.
  """

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp: int
  flow: bool = False
  qk_norm: bool = True
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, noisy: jax.Array | None = None, t: jax.Array | None = None) -> jax.Array:
    side = self.image_size // self.patch_size
    head_dim = self.width // self.heads
    x = Linear(self.width, True, dtype=self.dtype, name="connector")(features)
    x = x + GridPositions(side, side, self.width, 0.7, name="grid")().astype(self.dtype)
    if self.flow:
      x = x + Linear(self.width, True, dtype=self.dtype, name="patches")(to_patches(noisy, self.patch_size))
      x = jnp.concatenate([TimeTokens(self.width, dtype=self.dtype, rows="rows", name="time")(t), x], axis=1)
    # Time tokens, where there are any, stand at the grid's origin.
    grid = jnp.pad(grid_positions(side, side), ((x.shape[1] - side**2, 0), (0, 0)))
    positions = jnp.broadcast_to(grid, (*x.shape[:2], 3))
    sections = (0, head_dim // 4, head_dim // 4)
    block = dict(mlp=self.mlp, heads=self.heads, kv_heads=self.heads, head_dim=head_dim, dtype=self.dtype)
    block |= dict(qk_norm=self.qk_norm, axes=("rows", None), kernel=self.kernel)
    stack = Stack(self.layers, block, self.remat, self.unroll, keep_kv=False, rope_sections=sections, name="stack")
    x, _ = stack(shard(x, "rows"), positions, None)
    x = RMSNorm(dtype=jnp.float32, name="out_norm")(x[:, -(side**2) :])
    x = Linear(self.patch_size**2 * 3, True, name="head")(x)
    return from_patches(x, self.patch_size, side, side)

"""Qwen2.5-VL's vision tower: pictures of any size, attention mostly within windows, four patches made one token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.models.kernels import attend
from clipflow_jax.models.layers import Linear, RMSNorm, SwiGLU, to_patches
from clipflow_jax.models.remat import scan
from clipflow_jax.models.rotary import Rotation, grid_angles, turn
from clipflow_jax.parallel.sharding import shard

FRAMES = 2  # a picture is a film of two equal frames


class WindowAttention(nn.Module):
  """x f[B,P,D], mask bool[1,P,P], rotation of P places -> f[B,P,D]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask, rotation):
    def project(name):
      y = Linear(x.shape[-1], True, dtype=self.dtype, name=name)(x)
      return shard(y.reshape(*y.shape[:2], self.heads, -1), "rows", None, "heads")

    q, k = (turn(project(name), rotation, halves=True) for name in ("query", "key"))
    y = attend(q, k, project("value"), jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])))
    return Linear(x.shape[-1], True, dtype=self.dtype, name="out")(y)


class QwenBlock(nn.Module):
  """Pre-norm attention and SwiGLU, residual. Arguments and result as `WindowAttention`."""

  heads: int
  mlp: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask, rotation):
    y = RMSNorm(dtype=self.dtype, name="attention_norm")(x)
    x = shard(x + WindowAttention(self.heads, self.dtype, name="attention")(y, mask, rotation), "rows")
    y = RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
    return shard(x + SwiGLU(self.mlp, self.dtype, True, name="mlp")(y), "rows")


class Merger(nn.Module):
  """Squares of patches f[B,T,D] -> tokens f[B,T,features]."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(Linear(x.shape[-1], True, dtype=self.dtype, name="up")(x), approximate=False)
    return Linear(self.features, True, dtype=self.dtype, name="down")(x)


class QwenVision(nn.Module):
  """images u8[B,H,W,3], H and W multiples of patch_size * merge -> f[B, H W / (patch_size merge)^2, out_width].

  Tokens go row by row. window: pixels a side within which patches see each other; layers of `whole` see all of the
  picture. The windows are a mask here: what it hides is computed all the same. UserError for another size.
  Source: Bai et al. 2025.
  """

  width: int
  layers: int
  heads: int
  mlp: int
  out_width: int
  patch_size: int = 14
  merge: int = 2
  window: int = 112
  whole: tuple[int, ...] = (7, 15, 23, 31)
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    b, height, width = images.shape[:3]
    cell = self.patch_size * self.merge
    if height % cell or width % cell:
      raise UserError(f"pictures of {height} x {width} pixels: this tower takes multiples of {cell}; resize them")
    rows, columns = height // self.patch_size, width // self.patch_size
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)
    patches = jnp.tile(to_patches(pixels, self.patch_size), FRAMES)
    x = shard(Linear(self.width, dtype=self.dtype, name="patches")(patches), "rows")
    rotation = Rotation.by(grid_angles(rows, columns, self.width // self.heads, in_turn=False))
    near = self._windows(rows, columns)

    def body(block, x, sees_all):
      return block(x, near | sees_all, rotation), None

    layers = scan(body, self.layers, self.remat)
    sees_all = jnp.asarray(np.isin(np.arange(self.layers), self.whole))
    x, _ = layers(QwenBlock(self.heads, self.mlp, self.dtype, name="layers"), x, sees_all)
    x = RMSNorm(dtype=self.dtype, name="out_norm")(x)
    x = x.reshape(b, rows // self.merge, self.merge, columns // self.merge, self.merge, self.width)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, self.merge**2 * self.width)
    return Merger(self.out_width, self.dtype, name="merger")(x)

  def _windows(self, rows: int, columns: int) -> jax.Array:
    """bool[1,P,P]: which patches are in one window."""
    side = self.window // self.patch_size // self.merge * self.merge
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = row // side * columns + column // side
    return jnp.asarray(window[:, None] == window)[None]

"""The small parts that every tower is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.parallel.sharding import on_mesh, shard

Dtype = Any


class Linear(nn.Module):
  """x f[..., D] -> f[..., features]. A kernel of whole numbers comes with each feature's scale (inference.weights)."""

  features: int
  use_bias: bool = False
  kernel_init: Callable = nn.initializers.lecun_normal()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    # By these names, not by @ and astype: adapters put functions of theirs in their place (training.adapters).
    y = jnp.dot(flat_rows(x.astype(self.dtype)), jnp.asarray(kernel, self.dtype))
    if self.has_variable("params", "kernel_scale"):
      y = (y * self.get_variable("params", "kernel_scale")).astype(self.dtype)
    y = y.reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      # Cast where it is added, not before: its gradient, a sum over all rows, is then added up in float32.
      y = y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)
    return y


def scaled_init(scale: float) -> Callable:
  """The initial kernel of what a layer adds to its stream, of variance scale / inputs: 1 is Linear's own, 0 is none."""
  return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


def flat_rows(x: jax.Array) -> jax.Array:
  """x f[..., D] as f[rows, D] for one matrix product: with two leading axes XLA on CPU takes twice as long.

  On a mesh as it is: rows and slots may lie on mesh axes of their own, and no axis that holds both could say so.
  """
  return x if on_mesh() else x.reshape(-1, x.shape[-1])


def at_slot(x: jax.Array, slot: int | jax.Array) -> jax.Array:
  """x f[B,S,...] at one slot, the same of every row or of each its own, i32[B] -> f[B,1,...]."""
  if isinstance(slot, int):
    return jax.lax.slice_in_dim(x, slot, slot + 1, axis=1)
  return jnp.take_along_axis(x, slot.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


class Embed(nn.Embed):
  """ids i32[B,S] -> f[B,S,D] of `dtype`; the gradient of the table f32[V,D] is added up in float32.

  In bfloat16 a sum of 256 takes no more of what is near 1: of a word that stands often most would be lost.
  slots: the logical axis on which S lies.
  """

  slots: str | None = None

  def __call__(self, ids: jax.Array) -> jax.Array:
    return _look_up(self.dtype, self.slots, self.embedding, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(dtype: Dtype, slots: str | None, table: jax.Array, ids: jax.Array) -> jax.Array:
  # Cast before it is taken: on a mesh rows travel as they are taken.
  return jnp.take(table.astype(dtype), ids, axis=0)


def _look_up_forward(dtype, slots, table, ids):
  return _look_up(dtype, slots, table, ids), (table, ids)


def _look_up_backward(dtype, slots, kept, gradient):
  table, ids = kept
  # The table's columns lie on axes that rows of the batch lie on too. Unless told that those change places, the
  # partitioner gathers what all chips have on each.
  gradient = shard(gradient, "replicas", slots, "embed").astype(jnp.float32)
  return jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, statistics in float32 (Zhang & Sennrich 2019)."""

  epsilon: float = 1e-6
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


def layer_norm(x: jax.Array) -> jax.Array:
  """LayerNorm without affine, in float32: every token f[..., C] to mean 0, variance 1."""
  x = x.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class SwiGLU(nn.Module):
  """Gated feed-forward network (Shazeer 2020). x f[..., D] -> f[..., D].

  sub_norm: a LayerNorm before the last matrix (Fang et al. 2023, EVA-02). out_scale: of `scaled_init`.
  """

  hidden: int
  dtype: Dtype = jnp.float32
  use_bias: bool = False
  sub_norm: bool = False
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gate = Linear(self.hidden, self.use_bias, dtype=self.dtype, name="gate")(x)
    up = Linear(self.hidden, self.use_bias, dtype=self.dtype, name="up")(x)
    y = nn.silu(gate) * up
    if self.sub_norm:
      y = nn.LayerNorm(1e-6, dtype=self.dtype, name="inner_norm")(y)
    return Linear(x.shape[-1], self.use_bias, scaled_init(self.out_scale), dtype=self.dtype, name="down")(y)


class GridPositions(nn.Module):
  """Learned row + column embeddings of a grid -> f32[rows*columns, D], each begun with deviation `std`."""

  rows: int
  columns: int
  width: int
  std: float

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.normal(self.std)
    row = self.param("row_positions", init, (self.rows, self.width), jnp.float32)
    column = self.param("column_positions", init, (self.columns, self.width), jnp.float32)
    return (row[:, None] + column[None]).reshape(-1, self.width)


def grid_positions(rows: int, columns: int) -> jax.Array:
  """Rotary positions i32[rows*columns, 3] of a picture's tokens: (0, row, column)."""
  row, column = jnp.divmod(jnp.arange(rows * columns), columns)
  return jnp.stack([jnp.zeros_like(row), row, column], axis=-1)


def to_patches(images: jax.Array, patch: int) -> jax.Array:
  """images [B,H,W,3] -> [B, (H/p)*(W/p), p*p*3], rows of patches first."""
  b, h, w, c = images.shape
  x = images.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def from_patches(patches: jax.Array, patch: int, rows: int, columns: int) -> jax.Array:
  """Inverse of `to_patches`: [B, rows*columns, p*p*3] -> [B,H,W,3]."""
  b = patches.shape[0]
  x = patches.reshape(b, rows, columns, patch, patch, 3)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * patch, columns * patch, 3)


def to_unit(images: jax.Array) -> jax.Array:
  """Pixels u8 in 0..255 -> f32 in -1..1, the range of every model here."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: jax.Array) -> jax.Array:
  """Inverse of `to_unit`, clipped: f -> u8."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def fourier(t: jax.Array, features: int) -> jax.Array:
  """Times f[...] in 0..1 -> f32[..., features], cosines and sines (Vaswani et al. 2017)."""
  frequencies = 1000.0 * jnp.exp(-jnp.log(10000.0) * jnp.arange(features // 2) / (features // 2))
  angles = t[..., None].astype(jnp.float32) * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

"""Inception-v3 as FID is defined by it: the network of 2015 with the quirks of its first release.

Source: Szegedy et al. 2016; Heusel et al. 2017; the weights and names are those of pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

SIZE = 299  # height and width of the pictures it takes
Kernel = tuple[int, int]


@flax.struct.dataclass
class Inception:
  """What the metrics are made of; f64 and the others are means over places, named by their channels."""

  f64: jax.Array  # f32[B,64] after the first pooling
  f192: jax.Array  # f32[B,192] after the second
  f768: jax.Array  # f32[B,768] before the last reduction
  f2048: jax.Array  # f32[B,2048] the features of FID
  logits: jax.Array  # f32[B,1008] without the bias, as the Inception Score takes them


class Conv(nn.Module):
  """Convolution, batch norm by stored statistics, ReLU. x f[B,H,W,C] -> f[B,H',W',features]."""

  features: int
  kernel: Kernel = (1, 1)
  stride: int = 1
  padded: bool = True  # so that stride 1 keeps the size

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.lecun_normal()
    weight = self.param("kernel", init, (*self.kernel, x.shape[-1], self.features), jnp.float32)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale, bias = (self.param(n, i, (self.features,), jnp.float32) for n, i in (("scale", ones), ("bias", zeros)))
    mean, var = (self.param(n, i, (self.features,), jnp.float32) for n, i in (("mean", zeros), ("var", ones)))
    gain = scale * jax.lax.rsqrt(var + 1e-3)  # in the weights it costs nothing, and GPUs add and clip as they convolve
    padding = [(k // 2, k // 2) if self.padded else (0, 0) for k in self.kernel]
    strides, letters = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, weight * gain, strides, padding, dimension_numbers=letters)
    return nn.relu(x + (bias - mean * gain))


class Mixed(nn.Module):
  """Branches side by side, then a pooled one. x f[B,H,W,C] -> f[B,H',W',channels of all branches].

  branches: of each, its steps (name, features, kernel). A step with several names is several convolutions of the same
  input, joined. stride: of each branch's last step and of the pooling. pool: "average" counts no padding, "max" does
  not either. pooled: features of the 1 x 1 convolution after pooling, 0 for none.
  """

  branches: tuple[tuple[tuple[tuple[str, ...], int, tuple[Kernel, ...]], ...], ...]
  pool: str
  pooled: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outs = []
    for steps in self.branches:
      y = x
      for number, (names, features, kernels) in enumerate(steps):
        stride = self.stride if number == len(steps) - 1 else 1
        sides = [
          Conv(features, kernel, stride, padded=stride == 1, name=name)(y)
          for name, kernel in zip(names, kernels, strict=True)
        ]
        y = jnp.concatenate(sides, axis=-1)
      outs.append(y)
    padding = "SAME" if self.stride == 1 else "VALID"
    pool = {"average": average, "max": maximum}[self.pool]
    y = pool(x, self.stride, padding)
    outs.append(Conv(self.pooled, name="branch_pool")(y) if self.pooled else y)
    return jnp.concatenate(outs, axis=-1)


def average(x: jax.Array, stride: int, padding: str) -> jax.Array:
  return nn.avg_pool(x, (3, 3), (stride, stride), padding, count_include_pad=False)


def maximum(x: jax.Array, stride: int, padding: str) -> jax.Array:
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def chain(name: str, *steps: tuple[int, Kernel]):
  """A branch of convolutions name_1, name_2, ...; a single one is just `name`."""
  names = [name] if len(steps) == 1 else [f"{name}_{i + 1}" for i in range(len(steps))]
  return tuple(((own,), features, (kernel,)) for own, (features, kernel) in zip(names, steps, strict=True))


def fork(name: str, number: int, features: int):
  """A step of two convolutions, along rows and along columns."""
  return (f"{name}_{number}a", f"{name}_{number}b"), features, ((1, 3), (3, 1))


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _a(pooled: int) -> dict[str, Any]:
  branches = (
    chain("branch1x1", (64, ONE)),
    chain("branch5x5", (48, ONE), (64, FIVE)),
    chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
  )
  return dict(branches=branches, pool="average", pooled=pooled)


def _b() -> dict[str, Any]:
  branches = chain("branch3x3", (384, THREE)), chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE))
  return dict(branches=branches, pool="max", pooled=0, stride=2)


def _c(c: int) -> dict[str, Any]:
  branches = (
    chain("branch1x1", (192, ONE)),
    chain("branch7x7", (c, ONE), (c, ROW), (192, COLUMN)),
    chain("branch7x7dbl", (c, ONE), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)),
  )
  return dict(branches=branches, pool="average", pooled=192)


def _d() -> dict[str, Any]:
  branches = (
    chain("branch3x3", (192, ONE), (320, THREE)),
    chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, THREE)),
  )
  return dict(branches=branches, pool="max", pooled=0, stride=2)


def _e(pool: str) -> dict[str, Any]:
  branches = (
    chain("branch1x1", (320, ONE)),
    ((("branch3x3_1",), 384, (ONE,)), fork("branch3x3", 2, 384)),
    ((("branch3x3dbl_1",), 448, (ONE,)), (("branch3x3dbl_2",), 384, (THREE,)), fork("branch3x3dbl", 3, 384)),
  )
  return dict(branches=branches, pool=pool, pooled=192)


class InceptionV3(nn.Module):
  """images f32[B,299,299,3] in 0..255 -> Inception. The last block pools by maximum: the first release did."""

  @nn.compact
  def __call__(self, images: jax.Array) -> Inception:
    x = (images - 128) / 128
    x = Conv(32, THREE, 2, padded=False, name="Conv2d_1a_3x3")(x)
    x = Conv(32, THREE, padded=False, name="Conv2d_2a_3x3")(x)
    x = Conv(64, THREE, name="Conv2d_2b_3x3")(x)
    x = f64 = maximum(x, 2, "VALID")
    x = Conv(80, name="Conv2d_3b_1x1")(x)
    x = Conv(192, THREE, padded=False, name="Conv2d_4a_3x3")(x)
    x = f192 = maximum(x, 2, "VALID")
    blocks = {"5b": _a(32), "5c": _a(64), "5d": _a(64), "6a": _b(), "6b": _c(128), "6c": _c(160), "6d": _c(160)}
    blocks |= {"6e": _c(192)}
    for name, block in blocks.items():
      x = Mixed(**block, name=f"Mixed_{name}")(x)
    f768 = x
    for name, block in {"7a": _d(), "7b": _e("average"), "7c": _e("max")}.items():
      x = Mixed(**block, name=f"Mixed_{name}")(x)
    f64, f192, f768, f2048 = (y.mean(axis=(1, 2)) for y in (f64, f192, f768, x))
    kernel = self.param("fc", nn.initializers.lecun_normal(), (2048, 1008), jnp.float32)
    self.param("fc_bias", nn.initializers.zeros, (1008,), jnp.float32)  # in every file, in no metric
    return Inception(f64, f192, f768, f2048, f2048 @ kernel)

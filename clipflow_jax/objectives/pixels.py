"""The pixel decoder's losses: features to pictures."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from clipflow_jax.flow import path
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.models.layers import to_unit


def edge_weights(images: jax.Array, strength: float, radius: int = 2) -> jax.Array:
  """f32[B,H,W,1]: 1, and 1 + strength within `radius` of an edge, so wherever something small is.

  images f32[B,H,W,3] in -1..1. A plain mean over pixels is won by flat areas and loses small shapes.
  """

  def reach(x, pick, axis):  # the running maximum or minimum along one axis; a window is two of them
    padded = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode="edge")
    shifted = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(2 * radius + 1))
    return functools.reduce(pick, shifted)

  high, low = (reach(reach(images, pick, 1), pick, 2) for pick in (jnp.maximum, jnp.minimum))
  return 1 + strength * ((high - low).max(axis=-1, keepdims=True) > 0.1)


def losses(
  model: ClipFlow,
  images: jax.Array,
  features: jax.Array,
  there: jax.Array,
  keys: jax.Array,
  *,
  noise: float,
  edges: float,
) -> dict[str, jax.Array]:
  """Sums over those pictures u8[B,H,W,3] that are there bool[B], with standardised features f32[B,T,C]; keys key[B].

  noise: features are noised by sigma ~ U(0, noise), so that the decoder takes drawn features too (RAE).
  edges: extra weight of pixels near edges. Deterministic: weighted L1. As a flow: weighted MSE on velocity.
  """
  truth = to_unit(images)
  splits = jnp.unstack(jax.vmap(lambda key: jax.random.split(key, 4))(keys), axis=1)
  sigma = jax.vmap(lambda key: jax.random.uniform(key, (1, 1), maxval=noise))(splits[0])
  features += sigma * jax.vmap(lambda key: jax.random.normal(key, features.shape[1:]))(splits[1])
  weights = edge_weights(truth, edges)
  weights = weights / weights.mean(axis=(1, 2, 3), keepdims=True)
  if model.pixel_decoder.get("flow"):
    pixel_noise = jax.vmap(lambda key: jax.random.normal(key, truth.shape[1:]))(splits[2])
    t = jax.vmap(lambda key: path.sample_times(key, (), 1.0))(splits[3])
    wide = t[:, None, None, None]
    noisy = (1 - wide) * truth + wide * pixel_noise
    guess = model.decode(features, noisy, t)
    error = jnp.square((guess - truth) / jnp.maximum(wide, path.MIN_T))
  else:
    guess = model.decode(features)
    error = jnp.abs(guess - truth)
  squared = jnp.square(jnp.clip(guess, -1, 1) - truth).mean(axis=(1, 2, 3)) / 4
  sums = {"pixels": (weights * error).mean(axis=(1, 2, 3)), "pixels_psnr": -10 * jnp.log10(squared + 1e-8)}
  return {name: jnp.where(there, each, 0.0).sum() for name, each in sums.items()}

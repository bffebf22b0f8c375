"""The probability path from data (t=0) to noise (t=1), its time law, and what a network may predict of it.

x_t = (1-t) x + t eps, velocity v = eps - x.
Source: Lipman et al. 2022; Liu et al. 2022; Albergo & Vanden-Eijnden 2022.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# x-prediction divides by t; below this noise level the division is capped (Li & He 2025, "Back to Basics").
MIN_T = 0.05


def interpolate(x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """x_t of x, noise f[..., T, C] at t f[...]."""
  t = t[..., None, None]
  return (1 - t) * x + t * noise


def velocity(x: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """The velocity at x_t f[..., T, C], t f[...] that leads to the clean x (exact for t >= MIN_T)."""
  return (x_t - x) / jnp.maximum(t, MIN_T)[..., None, None]


def clean(v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """The clean x that v at x_t f[..., T, C], t f[...] leads to: the inverse of `velocity`, capped as it is."""
  return x_t - jnp.maximum(t, MIN_T)[..., None, None] * v


def shift_for(tokens: int, channels: int, scale: float = 1.0) -> float:
  """Strength of the time shift for T x C features: scale * sqrt(T*C/4096), at least 1.

  High-dimensional data need more noise to hide the same structure (Esser et al. 2024; Zheng et al. 2025,
  RAE). The law counts dimensions, not redundancy: `scale` corrects it for features of low rank, and is best
  swept by looking at pixels.
  """
  return max(1.0, scale * math.sqrt(tokens * channels / 4096))


def shift(t: jax.Array, alpha: float) -> jax.Array:
  """Moves times in [0,1] towards noise: alpha t / (1 + (alpha-1) t). Keeps 0 and 1; monotone."""
  return t / (t + (1 - t) / alpha)  # so written it ends at 1 in float32 too: what is guided up to 1 begins there


def sample_times(key: jax.Array, shape: tuple[int, ...], alpha: float) -> jax.Array:
  """Training times f32[shape]: logit-normal(0, 1), shifted (Esser et al. 2024)."""
  return shift(jax.nn.sigmoid(jax.random.normal(key, shape)), alpha)


def grid(steps: int, alpha: float) -> jax.Array:
  """Sampling times f32[steps+1] from 1 down to 0, evenly spaced before the shift."""
  return shift(jnp.linspace(1.0, 0.0, steps + 1), alpha)

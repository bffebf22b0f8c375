"""Guidance: pushing the velocity away from a weaker prediction.

x may stand for v everywhere: the one is affine in the other.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clipflow_jax.flow.solvers import Velocity


def push(strong: jax.Array, weak: jax.Array, scale: jax.Array | float) -> jax.Array:
  """weak + scale (strong - weak). scale 1 is no guidance, 0 the weak prediction."""
  return weak + scale * (strong - weak)


def _scale_at(t: jax.Array, scale: jax.Array | float, interval: tuple[float, float]) -> jax.Array:
  low, high = interval
  return jnp.where((t >= low) & (t <= high), scale, 1.0)[..., None, None]


def classifier_free(
  pair: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  scale: jax.Array | float,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
  """Guides by the unconditional prediction (Ho & Salimans 2022).

  pair(x_t, t) -> (conditional, unconditional) velocities f[..., T, C], best computed as one batch. interval:
  of the times at which it guides (Kynkäänniemi et al. 2024).
  """

  def guided(x_t: jax.Array, t: jax.Array) -> jax.Array:
    conditional, unconditional = pair(x_t, t)
    return push(conditional, unconditional, _scale_at(t, scale, interval))

  return guided


def internal(
  pair: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  scale: jax.Array | float,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
  """Guides by the network's early head: one pass a step (RAEv2, 2026). pair(x_t, t) -> (full, early)."""
  return classifier_free(pair, scale, interval)

"""Rotary positions: frequencies, plain or stretched to longer texts, and how vectors are turned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.errors import UserError


def frequencies(half: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[jax.Array, float]:
  """(radians per position f32[half], factor on the cosines and sines).

  scaling: None, or how a model was stretched, in the words of its config.json: `rope_type` "linear" (Chen et al. 2023),
  "yarn" (Peng et al. 2023) or "llama3" (Dubey et al. 2024) and that type's numbers. UserError names an unknown type.
  """
  plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is None:
    return plain, 1.0
  if scaling["rope_type"] not in STRETCHES:
    raise UserError(f"rope_type {scaling['rope_type']!r} is unknown; there are {', '.join(STRETCHES)}")
  return STRETCHES[scaling["rope_type"]](plain, theta, scaling)


def grid_angles(rows: int, columns: int, dim: int, step: float = 1.0, *, in_turn: bool) -> jax.Array:
  """Angles f32[rows*columns, dim/2] of a grid's tokens, `step` from one to the next.

  The rows' and columns' come in turn (Lumina-Next, Zhuo et al. 2024), or all rows' first (EVA-02, Fang et al. 2023).
  """
  places = jnp.stack(jnp.divmod(jnp.arange(rows * columns), columns), axis=1) * step
  angles = places[:, :, None] * frequencies(dim // 4, 10_000.0)[0]  # [T,2,dim/4]
  return (angles.swapaxes(1, 2) if in_turn else angles).reshape(rows * columns, dim // 2)


class Rotation(flax.struct.PyTreeNode):
  """How far the pairs of channels are turned: cosines and sines, f32[S,k/2] or f32[B,S,k/2].

  Made once for all layers that turn by it.
  """

  cos: jax.Array
  sin: jax.Array

  @classmethod
  def by(cls, angles: jax.Array, factor: float = 1.0) -> Rotation:
    """By angles in radians; factor: on all that is turned."""
    # In a loop of two, for XLA makes them anew in whatever they are multiplied with, unless a loop lies between: of a
    # tiny model's step on a CPU that was 7 %.
    sines = jnp.array([False, True])
    return cls(*jax.lax.map(lambda sine: factor * jnp.where(sine, jnp.sin(angles), jnp.cos(angles)), sines))


def at_positions(
  positions: jax.Array, dim: int, theta: float, sections: tuple[int, ...] = (), scaling: Mapping[str, Any] | None = None
) -> Rotation:
  """Of vectors of this dim at positions i32[B,S,3] (time, row, column), frequencies split by axis as in Qwen2-VL.

  sections: how many of the dim/2 frequencies turn with each axis; (): all by time. Positions equal on all three axes
  are ordinary RoPE. scaling: as in `frequencies`. UserError for sections that do not add up, or of more axes.
  """
  half = dim // 2
  sections = sections or (half,)
  if 2 * sum(sections) != dim or len(sections) > positions.shape[-1]:
    raise UserError(f"rope_sections {tuple(sections)} must be at most 3 that add up to half the head dim, {dim / 2:g}")
  speeds, factor = frequencies(half, theta, scaling)
  axis = jnp.repeat(jnp.arange(len(sections)), jnp.array(sections), total_repeat_length=half)
  return Rotation.by(jnp.take(positions, axis, axis=-1).astype(jnp.float32) * speeds, factor)


def turn(x: jax.Array, rotation: Rotation, *, halves: bool = False) -> jax.Array:
  """x f[B,S,h,k] with pairs of channels turned (Su et al. 2021).

  A pair is two neighbours, as it was written, or with `halves` one of each half, as in Llama.
  """
  axis = -2 if halves else -1
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((2, -1) if halves else (-1, 2)))
  cos, sin = (jnp.expand_dims(part[..., None, :], axis) for part in (rotation.cos, rotation.sin))
  sign = jnp.expand_dims(jnp.array([-1.0, 1.0]), -3 - axis)
  # (a cos - b sin, b cos + a sin), as what a compiler makes into one pass: nothing is taken apart and put together.
  turned = pairs * cos + jnp.flip(pairs, axis) * (sin * sign)
  return turned.reshape(x.shape).astype(x.dtype)


def _linear(plain: jax.Array, theta: float, scaling: Mapping[str, Any]) -> tuple[jax.Array, float]:
  return plain / scaling["factor"], 1.0


def _llama3(plain: jax.Array, theta: float, scaling: Mapping[str, Any]) -> tuple[jax.Array, float]:
  """Slow frequencies are divided by the factor, fast ones kept, those between mixed."""
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original length
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return plain * (kept + (1 - kept) / scaling["factor"]), 1.0


def _yarn(plain: jax.Array, theta: float, scaling: Mapping[str, Any]) -> tuple[jax.Array, float]:
  """As `_llama3`, mixed along the frequency's index; attention is sharpened by the length's logarithm."""
  half, factor = len(plain), scaling["factor"]

  def index(turns: float) -> float:  # of the frequency that turns this often within the original length
    length = scaling["original_max_position_embeddings"]
    return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

  low, high = index(scaling.get("beta_fast") or 32), index(scaling.get("beta_slow") or 1)
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  divided = jnp.clip((jnp.arange(half) - low) / max(high - low, 1e-3), 0, 1)

  def sharpness(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

  attention = scaling.get("attention_factor")
  if attention is None:
    both = scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention = sharpness(both[0]) / sharpness(both[1]) if all(both) else sharpness(1.0)
  return plain * (1 - divided + divided / factor), float(attention)


STRETCHES = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}

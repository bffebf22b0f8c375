"""Solvers of dx/dt = v(x, t) from noise (t=1) to data (t=0), with one knob from ODE to fresh noise.

A whole trajectory is one `lax.scan`, so it compiles once whatever the number of steps. States are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t f[..., T, C], t f[...]) -> v f[..., T, C]
METHODS = ("euler", "heun", "midpoint")


def _euler(v: Velocity, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
  return x + (s - t) * v(x, _everywhere(t, x))


def _heun(v: Velocity, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
  first = v(x, _everywhere(t, x))
  second = v(x + (s - t) * first, _everywhere(s, x))
  return x + (s - t) * (first + second) / 2


def _midpoint(v: Velocity, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
  half = (t + s) / 2
  x_half = x + (half - t) * v(x, _everywhere(t, x))
  return x + (s - t) * v(x_half, _everywhere(half, x))


_STEPS = {"euler": _euler, "heun": _heun, "midpoint": _midpoint}


def _everywhere(t: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.full(x.shape[:-2], t, jnp.float32)


def solve(
  v: Velocity,
  noise: jax.Array,
  times: jax.Array,
  *,
  method: str = "euler",
  eta: float = 0.0,
  keys: jax.Array | None = None,
) -> jax.Array:
  """Where `walk` ends. Compiled, it keeps nothing of the way there."""
  return walk(v, noise, times, method=method, eta=eta, keys=keys)[0]


def walk(
  v: Velocity,
  noise: jax.Array,
  times: jax.Array,
  *,
  method: str = "euler",
  eta: float = 0.0,
  keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Walks `noise` f[B, M, T, C] along `times` f32[n+1] (decreasing, from 1 to 0): (x at times[-1], x at those before).

  The second is f32[n, B, M, T, C].

  eta: 0 solves the ODE by `method`. Above 0 each step is instead: predict x, then re-noise to the next level
    with noise that keeps sqrt(1-eta^2) of the present one and takes eta fresh; at 1 all of it is fresh, which
    repairs errors of layout that an ODE carries to the end. `keys` key[B], one per row, are then needed.
  The last step is always Euler: a second evaluation at t=0 has nothing to say about an x-prediction.

  Raises ValueError for an unknown method or eta without keys.
  """
  step = _step(v, times, method, eta, keys)
  x, way = jax.lax.scan(lambda x, i: (step(i, x), x), noise.astype(jnp.float32), jnp.arange(len(times) - 2))
  return _euler(v, x, times[-2], times[-1]), jnp.concatenate([way, x[None]])


def advance(
  v: Velocity,
  x: jax.Array,
  times: jax.Array,
  first: jax.Array | int,
  last: jax.Array | int,
  *,
  method: str = "euler",
  eta: float = 0.0,
  keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """A stretch of a `walk`, for those who look on: from x at times[first] to (x at times[last], clean x as seen there).

  first and last may be traced: one program then serves every stretch of every walk as long as `times`. From the last
  time above 0 the clean x is where the walk ends.
  """
  x = jax.lax.fori_loop(first, last, _step(v, times, method, eta, keys), x.astype(jnp.float32))
  return x, _euler(v, x, times[last], jnp.zeros_like(times[last]))


def _step(
  v: Velocity, times: jax.Array, method: str, eta: float, keys: jax.Array | None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(index, x at its time) -> x at the next one."""
  if method not in _STEPS:
    raise ValueError(f"solver method {method!r} is unknown; choose one of {', '.join(METHODS)}")
  if eta and keys is None:
    raise ValueError("eta > 0 draws fresh noise at each step: pass keys, one per row")

  def ode(index, x):
    return _STEPS[method](v, x, times[index], times[index + 1])

  def renoise(index, x):
    t, s = times[index], times[index + 1]
    velocity = v(x, _everywhere(t, x))
    clean = x - t * velocity
    kept = clean + velocity
    drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys)
    fresh = jnp.sqrt(1 - eta**2) * kept + eta * drawn
    return (1 - s) * clean + s * fresh

  return renoise if eta else ode


def start(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Noise f32[B, *shape], row b from keys[b] alone: the same picture whatever batch it is drawn in."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

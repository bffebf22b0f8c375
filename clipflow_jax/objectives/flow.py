"""Flow matching on features: several noise levels for each picture from one pass over its text."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.batch import TARGET, Batch
from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.transformer import Context


def losses(
  model: ClipFlow,
  batch: Batch,
  features: jax.Array,
  context: Context,
  keys: jax.Array,
  *,
  levels: int,
  early: float,
  targets: int = 0,
  drop: float = 0.0,
) -> dict[str, jax.Array]:
  """Sums over target pictures of the MSE on the velocity, in float32 whatever the network predicts.

  features f32[B,N,T,C], keys key[B] (noise is a function of the row's key alone), levels: noise levels per
  picture, early: weight of the early head's loss within "flow" (0: none). The sums count each picture once:
  levels are averaged. Sums named flow_low and flow_high tell the two halves of the time law apart.
  targets: noise only the first so many targets of a row, so that pictures that are only read cost nothing here
  (0: all of a row's pictures). `count` says how many pictures that makes.
  drop: how often a separate drawer's condition is all zeros, to learn what guidance pushes away from.
  """
  chosen, is_target = _choose(batch, targets)
  b, n = chosen.shape
  tokens, channels = features.shape[2:]
  m = n * levels

  def per_level(x):
    return jnp.repeat(jnp.take_along_axis(x, chosen.reshape(b, n, *[1] * (x.ndim - 2)), axis=1), levels, axis=1)

  x = per_level(features)
  noise_keys, time_keys = jnp.unstack(jax.vmap(lambda key: jax.random.split(key, 2))(keys), axis=1)
  noise = jax.vmap(lambda key: jax.random.normal(key, (m, tokens, channels)))(noise_keys)
  t = jax.vmap(lambda key: path.sample_times(key, (m,), model.alpha))(time_keys)
  place = Place.of(batch, chosen)
  is_target = jnp.repeat(is_target, levels, axis=1)
  given = model.conditioning(context, place, levels)
  if drop:
    if isinstance(given, tuple):
      raise UserError("objective.drop_condition is of a separate drawer; without model.drawer use data.drop_text")
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2), 1 - drop, (m,)))(keys)
    given = jnp.where(kept[..., None, None], given, 0)
  full, first = model.predict(path.interpolate(x, noise, t), t, given)
  truth = noise - x
  if model.prediction == "x":  # the network's velocity is capped at MIN_T: so must the truth be
    truth = path.velocity(x, path.interpolate(x, noise, t), t)

  def mse(v):
    return jnp.where(is_target, jnp.square(v - truth).mean(axis=(2, 3)), 0.0) / levels

  error = mse(full)
  middle = path.shift(jnp.float32(0.5), model.alpha)
  sums = {
    "flow": error.sum(),
    "flow_low": jnp.where(t < middle, 2 * error, 0.0).sum(),
    "flow_high": jnp.where(t < middle, 0.0, 2 * error).sum(),
  }
  if first is not None:
    sums["flow_early"] = mse(first).sum()
    sums["flow"] += early * sums["flow_early"]
  return sums


def count(batch: Batch, targets: int) -> jax.Array:
  """How many pictures `losses` sums over."""
  return _choose(batch, targets)[1].sum()


def _choose(batch: Batch, targets: int) -> tuple[jax.Array, jax.Array]:
  """(which pictures of each row i32[B,n], whether each is a target bool[B,n]), targets first."""
  is_target = (batch.image_roles & TARGET) > 0
  chosen = jnp.argsort(~is_target, axis=1, stable=True)[:, : targets or None]
  return chosen, jnp.take_along_axis(is_target, chosen, axis=1)

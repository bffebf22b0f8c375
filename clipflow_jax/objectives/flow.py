"""Flow matching on features: several noise levels for each picture from one pass over its text."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.batch import TARGET, Batch
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
) -> dict[str, jax.Array]:
  """Sums over target pictures of the MSE on the velocity, in float32 whatever the network predicts.

  features f32[B,N,T,C], keys key[B] (noise is a function of the row's key alone), levels: noise levels per
  picture, early: weight of the early head's loss within "flow" (0: none). The sums count each picture once:
  levels are averaged. Sums named flow_low and flow_high tell the two halves of the time law apart.
  """
  _, n, tokens, channels = features.shape
  m = n * levels
  x = jnp.repeat(features, levels, axis=1)
  noise_keys, time_keys = jnp.unstack(jax.vmap(lambda key: jax.random.split(key, 2))(keys), axis=1)
  noise = jax.vmap(lambda key: jax.random.normal(key, (m, tokens, channels)))(noise_keys)
  t = jax.vmap(lambda key: path.sample_times(key, (m,), model.alpha))(time_keys)
  place = Place(
    *(jnp.repeat(a, levels, axis=1) for a in (batch.image_segments, batch.image_order, batch.image_positions))
  )
  # A picture that is no target is of segment 0: its block sees nothing, and its loss counts nothing.
  is_target = jnp.repeat((batch.image_roles & TARGET) > 0, levels, axis=1)
  full, first = model.predict(path.interpolate(x, noise, t), t, context, place)
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

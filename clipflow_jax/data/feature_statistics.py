"""What standardises a tower's features, measured on pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Raw features become (raw - mean) / std, and where channels are whitened, that @ whitening."""

  mean: np.ndarray  # f32[T,C]
  std: np.ndarray  # f32[T,C]
  whitening: np.ndarray | None = None  # f32[C,C], symmetric

  def arrays(self) -> dict[str, np.ndarray]:
    """Those that are there, by name."""
    return {name: array for name, array in vars(self).items() if array is not None}


Sums = dict[str, np.ndarray]  # by name: first, second f64[T,C], and where channels are whitened products f64[C,C]


def sums(raw: jax.Array, whiten: float) -> dict[str, jax.Array]:
  """What `statistics` needs of raw features f32[N,T,C]: sums over N, those of several batches to be `add`ed. Pure."""
  found = {"first": raw.sum(0), "second": jnp.square(raw).sum(0)}
  if whiten:
    flat = raw.reshape(-1, raw.shape[-1])
    found["products"] = jnp.matmul(flat.T, flat, precision="highest")
  return found


def add(total: Sums, found: Mapping[str, jax.Array]) -> Sums:
  """The sums of all batches so far, {} before the first, and of one more."""
  return {name: total.get(name, 0.0) + np.asarray(array, np.float64) for name, array in found.items()}


def statistics(total: Sums, pictures: int, whiten: float) -> Statistics:
  """Mean and deviation per (token, channel) of so many pictures; with `whiten`, what takes correlations away.

  A tower's channels say much the same: a few directions hold nearly all of the variance (background and colours of a
  picture), so that a flow's noise and loss are about little else, and what makes a shape comes last. Where whiten > 0,
  a direction of variance v among the channels, all of which have variance 1, is scaled to v / (v + whiten), and all
  together to a mean of 1 again: ZCA (Kessy et al. 2018), that leaves small directions, which are mostly noise, small.
  Tokens keep what they have in common; a channel's deviation is then the same for all of them.
  """
  mean = total["first"] / pictures
  variance = np.maximum(total["second"] / pictures - np.square(mean), 1e-4)
  whitening = None
  if whiten:
    tokens = len(mean)
    variance = np.broadcast_to(variance.mean(axis=0), variance.shape)
    deviation = np.sqrt(variance[0])
    correlation = (total["products"] / pictures - mean.T @ mean) / tokens / np.outer(deviation, deviation)
    values, directions = np.linalg.eigh(correlation)
    values = np.maximum(values, 0.0)
    gains = np.sqrt(1 / (values + whiten) / (values / (values + whiten)).mean())
    whitening = ((directions * gains) @ directions.T).astype(np.float32)
  return Statistics(mean.astype(np.float32), np.sqrt(variance).astype(np.float32), whitening)

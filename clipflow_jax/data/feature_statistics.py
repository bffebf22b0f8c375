"""What standardises a tower's features, measured on pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Raw features become (raw - mean) / std; whitened, that @ whitening less 1 - common of its mean over tokens."""

  mean: np.ndarray  # f32[T,C]
  std: np.ndarray  # f32[T,C]
  whitening: np.ndarray | None = None  # f32[C,C], symmetric
  common: np.ndarray | None = None  # f32[]

  def arrays(self) -> dict[str, np.ndarray]:
    """Those that are there, by name."""
    return {name: array for name, array in vars(self).items() if array is not None}


# By name: first, second f64[T,C]; to whiten also products f64[C,C] of tokens, common f64[C,C] of their means.
Sums = dict[str, np.ndarray]


def sums(raw: jax.Array, whiten: float) -> dict[str, jax.Array]:
  """What `statistics` needs of raw features f32[N,T,C]: sums over N, those of several batches to be `add`ed. Pure."""
  found = {"first": raw.sum(0), "second": jnp.square(raw).sum(0)}
  if whiten:
    for name, each in dict(products=raw.reshape(-1, raw.shape[-1]), common=raw.mean(1)).items():
      found[name] = jnp.matmul(each.T, each, precision="highest")
  return found


def add(total: Sums, found: Mapping[str, jax.Array]) -> Sums:
  """The sums of all batches so far, {} before the first, and of one more."""
  return {name: total.get(name, 0.0) + np.asarray(array, np.float64) for name, array in found.items()}


def statistics(total: Sums, pictures: int, whiten: float) -> Statistics:
  """Mean and deviation per (token, channel) of so many pictures; with `whiten`, what takes correlations away.

  whiten: a direction of variance v is scaled to v / (v + whiten), and all together to a mean of 1 again: ZCA (Kessy et
  al. 2018) that leaves small directions, which are mostly noise, small.

  A tower's channels say much the same: a few directions hold nearly all of the variance (background and colours of a
  picture), so that a flow's noise and loss are about little else, and what makes a shape comes last. So do its tokens:
  what all of a picture's have in common is half of the variance of whitened features. Any two tokens are taken to have
  equally much in common, so that there are two variances: of the common part, and of what each has of its own.
  A channel's deviation is the same for all tokens where features are whitened.
  """
  mean = total["first"] / pictures
  variance = np.maximum(total["second"] / pictures - np.square(mean), 1e-4)
  if not whiten:
    return Statistics(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))
  tokens, channels = mean.shape
  variance = np.broadcast_to(variance.mean(axis=0), variance.shape)
  deviation = np.sqrt(variance[0])
  scales = np.outer(deviation, deviation)
  values, directions = np.linalg.eigh((total["products"] / pictures - mean.T @ mean) / tokens / scales)
  values = np.maximum(values, 0.0)
  gains = np.sqrt(1 / (values + whiten) / (values / (values + whiten)).mean())
  matrix = (directions * gains) @ directions.T
  # Of `tokens` equal to each other but for their own parts, one direction is common and all others have one variance.
  average = mean.mean(axis=0)
  means = (total["common"] / pictures - np.outer(average, average)) / scales
  common = np.clip(tokens * np.trace(matrix @ means @ matrix) / channels, 0.0, tokens)
  own = (tokens - common) / max(tokens - 1, 1)
  kept = np.sqrt((own + whiten) / (common + whiten)) if tokens > 1 else 1.0
  matrix /= np.sqrt((kept**2 * common + (tokens - 1) * own) / tokens)
  arrays = mean, np.sqrt(variance), matrix, np.array(kept)
  return Statistics(*(array.astype(np.float32) for array in arrays))

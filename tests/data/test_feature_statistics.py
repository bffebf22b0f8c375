import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.data.feature_statistics import Statistics, add, statistics, sums
from clipflow_jax.models.vision import Standardise

N, T, C = 300, 3, 6


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
  """f32[N,T,C] of channels that say much the same, around means and with deviations of their own."""
  rng = np.random.default_rng(0)
  same = rng.normal(size=(N, T, 2)) @ rng.normal(size=(2, C))
  return ((same + 0.3 * rng.normal(size=(N, T, C))) * np.exp(rng.normal(size=C)) + rng.normal(size=(T, C))).astype("f")


def measured(raw: np.ndarray, whiten: float) -> Statistics:
  """In batches, as both who measure do."""
  total = {}
  for part in np.array_split(raw, 4):
    total = add(total, sums(jnp.asarray(part), whiten))
  return statistics(total, len(raw), whiten)


def standardised(raw: np.ndarray, found: Statistics) -> np.ndarray:
  arrays = found.arrays()
  return np.asarray(Standardise("whitening" in arrays).apply({"params": arrays}, raw))


def test_unwhitened_each_channel_of_each_token_has_mean_0_and_deviation_1(raw):
  found = measured(raw, 0.0)
  assert found.whitening is None
  features = standardised(raw, found)
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(features.std(0), 1, atol=1e-4)


@pytest.mark.parametrize("whiten", [1e-6, 0.1, 1.0])
def test_whitened_each_direction_of_variance_v_has_v_by_v_plus_whiten(raw, whiten):
  found = measured(raw, whiten)
  centred = raw - raw.mean(0)
  deviation = np.sqrt(np.square(centred).mean((0, 1)))
  np.testing.assert_allclose(found.std, np.broadcast_to(deviation, (T, C)), rtol=1e-4)
  correlation = np.einsum("ntc,ntd->cd", centred / deviation, centred / deviation) / (N * T)
  values = np.linalg.eigvalsh(correlation)
  features = standardised(raw, found)
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
  assert np.square(features).mean() == pytest.approx(1, abs=1e-3)
  here = np.linalg.eigvalsh(np.einsum("ntc,ntd->cd", features, features) / (N * T))
  wanted = values / (values + whiten)
  np.testing.assert_allclose(here, wanted / wanted.mean(), rtol=2e-3)
  np.testing.assert_array_equal(found.whitening, found.whitening.T)


def test_channels_that_say_nothing_stay_small(raw):
  dull = raw.copy()
  dull[..., 0] = 0.5
  features = standardised(dull, measured(dull, 0.1))
  assert np.isfinite(features).all() and np.abs(features[..., 0]).max() < 1e-2

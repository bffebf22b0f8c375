import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.data.feature_statistics import Statistics, add, statistics, sums
from clipflow_jax.models.vision import Standardise, raw_features

N, T, C = 300, 3, 6


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
  """f32[N,T,C] of channels, and tokens, that say much the same, around means and with deviations of their own."""
  rng = np.random.default_rng(0)
  same = (rng.normal(size=(N, T, 2)) + rng.normal(size=(N, 1, 2))) @ rng.normal(size=(2, C))
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
  """Of channels first, then of tokens, which have a common direction and their own."""
  found = measured(raw, whiten)
  centred = raw - raw.mean(0)
  deviation = np.sqrt(np.square(centred).mean((0, 1)))
  np.testing.assert_allclose(found.std, np.broadcast_to(deviation, (T, C)), rtol=1e-4)
  np.testing.assert_array_equal(found.whitening, found.whitening.T)
  features = standardised(raw, found)
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
  assert np.square(features).mean() == pytest.approx(1, abs=1e-3)

  def channels(x: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh(np.einsum("ntc,ntd->cd", x, x) / (N * T))

  plain = centred / deviation
  by_channel = plain @ found.whitening
  wanted, here = channels(plain) / (channels(plain) + whiten), channels(by_channel)
  np.testing.assert_allclose(here / here.mean(), wanted / wanted.mean(), rtol=2e-3)

  def tokens(x: np.ndarray) -> np.ndarray:
    common = T * np.square(x.mean(1)).mean()
    return np.array([common, (T * np.square(x).mean() - common) / (T - 1)])

  wanted = tokens(by_channel / np.sqrt(np.square(by_channel).mean()))
  wanted, here = wanted / (wanted + whiten), tokens(features)
  np.testing.assert_allclose(here[0] / here[1], wanted[0] / wanted[1], rtol=2e-3)


@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_standardised_features_lead_back_to_raw_ones(raw, whiten):
  found = measured(raw, whiten)
  np.testing.assert_allclose(raw_features(standardised(raw, found), found.arrays()), raw, atol=1e-3)


def test_channels_that_say_nothing_stay_small(raw):
  dull = raw.copy()
  dull[..., 0] = 0.5
  features = standardised(dull, measured(dull, 0.1))
  assert np.isfinite(features).all() and np.abs(features[..., 0]).max() < 1e-2

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.flow import path

MEAN, STD = 1.5, 0.4  # of the toy data
TIMES = st.floats(0.0, 1.0)
ALPHAS = st.floats(1.0, 20.0)
RULES = settings(derandomize=True, deadline=None, max_examples=100)


def exact_velocity(x_t, t):
  """E[noise - x | x_t] where x ~ N(MEAN, STD^2): linear in x_t."""
  variance = (1 - t) ** 2 * STD**2 + t**2
  return -MEAN + (t - (1 - t) * STD**2) / variance * (x_t - (1 - t) * MEAN)


@pytest.fixture(scope="module")
def toy() -> tuple[np.ndarray, np.ndarray]:
  """Data and noise f64[n,1,1]."""
  rng = np.random.default_rng(0)
  return rng.normal(MEAN, STD, (200_000, 1, 1)), rng.normal(size=(200_000, 1, 1))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_regression_on_the_path_recovers_the_exact_velocity(toy, t: float, prediction: str):
  x, noise = toy
  times = np.full(len(x), t)
  x_t = np.asarray(path.interpolate(x, noise, times))
  design = np.stack([x_t.ravel(), np.ones(len(x))], axis=1)
  target = noise - x if prediction == "v" else x
  weights = np.linalg.lstsq(design, target.ravel(), rcond=None)[0]
  at = np.linspace(x_t.min(), x_t.max(), 5)
  fitted = weights[0] * at + weights[1]
  if prediction == "x":
    fitted = np.asarray(path.velocity(fitted[:, None, None], at[:, None, None], np.full(5, t))).ravel()
  np.testing.assert_allclose(fitted, exact_velocity(at, t), atol=0.05 / t)


def test_the_path_goes_from_data_to_noise():
  x, noise = np.full((2, 3, 4), 2.0), np.full((2, 3, 4), -1.0)
  np.testing.assert_array_equal(path.interpolate(x, noise, np.zeros(2)), x)
  np.testing.assert_array_equal(path.interpolate(x, noise, np.ones(2)), noise)
  np.testing.assert_allclose(path.interpolate(x, noise, np.array([0.25, 0.5]))[:, 0, 0], [1.25, 0.5])


@RULES
@given(t=st.floats(path.MIN_T, 1.0), x=st.floats(-3, 3), noise=st.floats(-3, 3))
def test_the_velocity_that_leads_to_x_is_noise_minus_x(t: float, x: float, noise: float):
  x, noise, t = np.full((1, 1), x), np.full((1, 1), noise), np.float64(t)
  np.testing.assert_allclose(path.velocity(x, path.interpolate(x, noise, t), t), noise - x, atol=2e-5)


@RULES
@given(t=TIMES, x=st.floats(-3, 3), x_t=st.floats(-3, 3))
def test_velocity_and_clean_are_inverse(t: float, x: float, x_t: float):
  x, x_t, t = np.full((2, 2), x), np.full((2, 2), x_t), np.float64(t)
  np.testing.assert_allclose(path.clean(path.velocity(x, x_t, t), x_t, t), x, atol=1e-5)


def test_the_velocity_stays_finite_at_the_data():
  v = path.velocity(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.float32(0.0))
  np.testing.assert_allclose(v, 1 / path.MIN_T)


@RULES
@given(alpha=ALPHAS)
def test_the_shift_keeps_both_ends(alpha: float):
  assert path.shift(0.0, alpha) == 0.0 and path.shift(1.0, alpha) == pytest.approx(1.0)


@RULES
@given(one=TIMES, other=TIMES, alpha=ALPHAS)
def test_the_shift_is_monotone_and_goes_towards_noise(one: float, other: float, alpha: float):
  low, high = sorted((one, other))
  assert path.shift(low, alpha) <= path.shift(high, alpha) + 1e-12
  assert low <= path.shift(low, alpha) + 1e-12


@RULES
@given(t=st.floats(0.001, 0.999), alpha=ALPHAS)
def test_the_shift_adds_its_logarithm_to_the_logit(t: float, alpha: float):
  def logit(p: float) -> float:
    return np.log(p / (1 - p))

  assert logit(path.shift(t, alpha)) == pytest.approx(logit(t) + np.log(alpha), abs=1e-9)


def test_the_strength_of_the_shift_grows_with_the_root_of_the_dimensions():
  assert path.shift_for(64, 64) == 1.0
  assert path.shift_for(64, 256) == 2.0
  assert path.shift_for(64, 256, scale=3.0) == 6.0
  assert path.shift_for(4, 8) == 1.0  # never towards data


def test_training_times_are_a_shifted_logit_normal():
  t = np.asarray(path.sample_times(jax.random.key(0), (20_000,), 4.0))
  assert 0 < t.min() and t.max() < 1
  logits = np.log(t / (1 - t)) - np.log(4.0)
  assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03


@pytest.mark.parametrize("alpha", [1.0, 5.0, 6**0.5])  # the last one's noise would be at 1.0000001 as it is printed
def test_the_sampling_grid_falls_from_noise_to_data(alpha: float):
  times = np.asarray(path.grid(8, alpha))
  assert times.shape == (9,) and times[0] == 1 and times[-1] == 0
  assert (np.diff(times) < 0).all()
  np.testing.assert_allclose(times, path.shift(np.linspace(1, 0, 9), alpha), atol=1e-6)

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.flow import guidance

STRONG = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
WEAK = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
RULES = [guidance.classifier_free, guidance.internal]


def pair(x_t, t):
  return jnp.asarray(STRONG), jnp.asarray(WEAK)


def guided(rule, t, *args):
  return np.asarray(rule(pair, *args)(jnp.zeros(STRONG.shape), jnp.broadcast_to(jnp.float32(t), (2, 3))))


@pytest.mark.parametrize("rule", RULES)
def test_scale_one_is_the_strong_prediction_and_zero_the_weak(rule):
  np.testing.assert_allclose(guided(rule, 0.5, 1.0), STRONG, atol=1e-6)
  np.testing.assert_allclose(guided(rule, 0.5, 0.0), WEAK, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_larger_scale_goes_on_along_the_difference(rule):
  np.testing.assert_allclose(guided(rule, 0.5, 3.0), STRONG + 2 * (STRONG - WEAK), atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_outside_its_interval_guidance_does_nothing(rule):
  t = np.array([[0.1, 0.3, 0.5], [0.7, 0.7001, 0.9]], np.float32)
  result = guided(rule, t, 3.0, (0.3, 0.7))
  inside = np.array([[False, True, True], [True, False, False]])
  np.testing.assert_allclose(result[~inside], STRONG[~inside], atol=1e-6)
  np.testing.assert_allclose(result[inside], (STRONG + 2 * (STRONG - WEAK))[inside], atol=1e-5)


def test_pushing_velocities_is_pushing_clean_predictions():
  x_t, t = np.float32(0.3), np.float32(0.8)
  of_clean = guidance.push(STRONG, WEAK, 2.5)
  of_velocity = guidance.push((x_t - STRONG) / t, (x_t - WEAK) / t, 2.5)
  np.testing.assert_allclose(x_t - t * of_velocity, of_clean, atol=1e-5)

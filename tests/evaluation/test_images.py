from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.evaluation import images


def _covariance(rng, dimensions, rank=None):
  samples = rng.normal(size=(rank or 4 * dimensions, dimensions))
  return samples.T @ samples / len(samples)


def test_frechet_distance_of_gaussians_with_diagonal_covariances_is_the_closed_form():
  mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 0.0, 3.0])
  std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 2.0, 0.0])
  expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
  found = images.frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
  assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_the_definition_by_the_matrix_square_root():
  rng = np.random.default_rng(0)
  mean_a, mean_b = rng.normal(size=(2, 12))
  a, b = _covariance(rng, 12), 3 * _covariance(rng, 12)
  root = scipy.linalg.sqrtm(a @ b)
  expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root.real)
  assert images.frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_to_itself_even_with_fewer_samples_than_dimensions():
  samples = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
  assert images.frechet_distance_of(samples, samples) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_moved_sample_is_the_squared_length_of_the_move():
  samples, move = np.random.default_rng(2).normal(size=(50, 8)), np.arange(8.0)
  assert images.frechet_distance_of(samples, samples + move) == pytest.approx(move @ move, rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 15), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_frechet_distance_is_symmetric_not_negative_and_scales_with_the_square(seed, dimensions, n, scale):
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(n, dimensions)), 1 + 2 * rng.normal(size=(n + 3, dimensions))
  there, back = images.frechet_distance_of(a, b), images.frechet_distance_of(b, a)
  assert there >= 0
  assert there == pytest.approx(back, rel=1e-6, abs=1e-9)
  assert images.frechet_distance_of(scale * a, scale * b) == pytest.approx(scale**2 * there, rel=1e-6, abs=1e-7)


def test_frechet_distance_of_one_sample_is_an_error():
  with pytest.raises(ValueError, match="two samples"):
    images.frechet_distance_of(np.zeros((1, 3)), np.zeros((9, 3)))


def test_psnr_of_a_known_error():
  a = np.full((2, 4, 4, 3), 100, np.uint8)
  assert images.psnr(a, a + 10) == pytest.approx(10 * np.log10(255**2 / 100))


def test_psnr_is_the_mean_over_pictures_and_not_of_the_errors():
  a = np.zeros((2, 4, 4, 3), np.uint8)
  b = np.stack([a[0] + 1, a[1] + 100])
  each = [images.psnr(a[i : i + 1], b[i : i + 1]) for i in range(2)]
  assert images.psnr(a, b) == pytest.approx(np.mean(each))
  assert images.psnr(a, b) > 10 * np.log10(255**2 / np.mean(np.square(b.astype(float))))


@given(hnp.arrays(np.uint8, (2, 3, 3, 3)), hnp.arrays(np.uint8, (2, 3, 3, 3)))
def test_psnr_is_symmetric_and_finite_and_perfect_only_for_equal_pictures(a, b):
  assert images.psnr(a, b) == images.psnr(b, a)
  assert images.psnr(a, a) == pytest.approx(10 * np.log10(255**2 * 12))
  assert images.psnr(a, b) <= images.psnr(a, a)


def test_psnr_refuses_pictures_that_would_broadcast():
  with pytest.raises(ValueError, match="shapes"):
    images.psnr(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))


def test_clip_score_counts_opposite_pairs_as_zero():
  one = np.eye(3)
  assert images.clip_score(one, one) == pytest.approx(100)
  assert images.clip_score(one, -one) == 0
  assert images.clip_score(one, np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1.0]])) == pytest.approx(200 / 3)

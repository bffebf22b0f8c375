from __future__ import annotations

import tracemalloc

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import folders, images


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


def test_an_eigenvalue_below_zero_counts_as_none():
  a, b = np.diag([1.0, -0.01]), np.diag([4.0, 0.04])  # as rounding leaves them, here large
  assert images.frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(np.trace(a + b) - 2 * 2.0)


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
  assert images.clip_score_of(one, one) == pytest.approx(100)
  assert images.clip_score_of(one, -one) == 0
  assert images.clip_score_of(one, np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1.0]])) == pytest.approx(200 / 3)


# Sets of pictures, in arrays of uneven length. The features are their pixels.


def flat(pictures):
  return pictures.reshape(len(pictures), -1) / 64


def stream(seed, n, parts=(1, 5, 30)):
  pictures = np.random.default_rng(seed).integers(0, 200 + seed, (n, 2, 2, 3), dtype=np.uint8)
  return np.split(pictures, [part for part in parts if part < n])


def distance(a, b):
  return folders._distance(images.moments(a, flat), images.moments(b, flat))


def test_moments_of_a_stream_are_those_of_all_of_it_however_it_is_cut():
  features = np.random.default_rng(0).normal(1e6, 1, size=(100, 5))  # far from zero, where sums of squares fail
  found = images.Moments()
  for part in np.split(features, [1, 2, 50, 50, 93]):
    found.add(part)
  assert found.count == 100
  np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
  np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-8)


def test_moments_are_saved_as_pytorch_fid_does_and_read_back(tmp_path):
  features = np.random.default_rng(0).normal(size=(9, 4))
  images.Moments().add(features).save(tmp_path / "a.npz")
  np.savez(tmp_path / "b.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))  # without our count
  for name in ("a.npz", "b.npz"):
    found = images.Moments.load(tmp_path / name)
    np.testing.assert_allclose(found.mean, features.mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False))
  np.savez(tmp_path / "c.npz", mean=features)
  np.savez(tmp_path / "d.npz", mu=np.zeros(3), sigma=np.eye(4))
  np.savez(tmp_path / "e.npz", mu=np.zeros(3), sigma=1.0)
  (tmp_path / "f.npz").write_bytes(b"")
  (tmp_path / "g.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
  np.save(tmp_path / "h.npy", np.zeros(3))
  (tmp_path / "h.npy").rename(tmp_path / "h.npz")
  for name in "cdefgh":
    with pytest.raises(UserError, match=rf"{name}.npz holds no statistics: .* mu and sigma"):
      images.Moments.load(tmp_path / f"{name}.npz")


def test_fid_is_the_frechet_distance_of_all_features_and_reads_each_picture_once():
  a, b = stream(0, 40), stream(9, 45)
  expected = images.frechet_distance_of(flat(np.concatenate(a)), flat(np.concatenate(b)))
  assert distance(iter(a), iter(b)) == pytest.approx(expected, rel=1e-9)


def test_memory_of_fid_does_not_grow_with_the_number_of_pictures():
  rng = np.random.default_rng(0)

  def pictures(n):
    return (rng.integers(0, 256, (64, 2, 2, 3), dtype=np.uint8) for _ in range(n))

  def peak(n):
    tracemalloc.start()
    distance(pictures(n), pictures(n))
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found

  peak(2)
  few, many = peak(4), peak(200)
  assert many < 1.5 * few + 4096
  assert many < 200 * 64 * 12 * 8 / 4  # a quarter of what all features would take


def test_too_few_pictures_for_a_metric_are_told():
  one, many = (flat(np.concatenate(stream(0, n))) for n in (1, 20))
  with pytest.raises(UserError, match="two pictures or more, got 1"):
    distance(stream(0, 1), stream(0, 20))
  with pytest.raises(UserError, match="subsets of 1000 needs .* got 20 and 20"):
    images.kid_of(many, many)
  with pytest.raises(UserError, match="10 splits needs as many pictures, got 1"):
    images.inception_score_of(one)
  with pytest.raises(UserError, match="more than 3 pictures in each set, got 20 and 3"):
    images.precision_recall_of(many, many[:3])


def test_just_enough_pictures_are_enough():
  four = flat(np.concatenate(stream(0, 20)))[:4]
  assert images.precision_recall_of(four, four) == (1.0, 1.0)
  assert images.kid_of(four, four, subsets=2, size=4)[1] == pytest.approx(0)
  assert images.inception_score_of(four, splits=4) == (1.0, 0.0)  # each alone tells nothing


def test_the_inception_score_leaves_out_no_picture_where_splits_are_uneven_and_takes_any_size_of_logits():
  logits = np.array([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0]])
  alone, pair = 1.0, images.inception_score_of(logits[1:], splits=1)[0]
  assert pair > 1.5
  found = images.inception_score_of(logits, splits=2, seed=None)
  assert found == pytest.approx((np.mean([alone, pair]), np.std([alone, pair])))
  assert images.inception_score_of(logits + 1000, splits=2, seed=None) == pytest.approx(found)


@pytest.fixture(scope="module")
def two_sets():
  """What torch-fidelity 0.4.0 was given for the numbers below."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) * 1.5 + 0.3


def test_kid_and_inception_score_and_fid_are_torch_fidelitys(two_sets):
  a, b = two_sets
  assert images.kid_of(a, b, subsets=10, size=30) == pytest.approx((0.6052088732482661, 0.23106709394804437))
  assert images.inception_score_of(a) == pytest.approx((1.341505349247074, 0.09015620277933054))
  assert images.frechet_distance_of(a, b) == pytest.approx(2.9126887808957562)


def test_precision_and_recall_are_torch_fidelitys(two_sets):
  a, b = two_sets
  assert images.precision_recall_of(b, a) == pytest.approx((0.95, 0.5))


def test_precision_falls_for_fakes_off_the_manifold_and_recall_for_modes_that_are_missing():
  rng = np.random.default_rng(1)
  left, right, far = (rng.normal((place, 0), size=(50, 2)) for place in (-20, 20, 500))
  both = np.concatenate([left, right])
  precision, recall = images.precision_recall_of(both, rng.normal((-20, 0), size=(50, 2)))
  assert precision > 0.8 and 0.3 < recall < 0.55
  precision, recall = images.precision_recall_of(both, np.concatenate([both + 0.01, far, far + 0.01]))
  assert precision == pytest.approx(0.5, abs=0.02) and recall > 0.9


def test_what_lies_at_the_edge_of_a_manifold_is_within_it():
  real, fake = np.arange(4.0)[:, None], np.array([[4.0], [4.5], [-1.0], [9.0]])  # balls that reach to the next
  assert images.precision_recall_of(real, fake, k=1)[0] == 0.5


def test_distances_in_blocks_are_those_of_the_whole(two_sets, monkeypatch):
  a, b = two_sets
  whole = images.precision_recall_of(a, b), images.cmmd_of(a, b)
  monkeypatch.setattr(images, "_ROWS", 7)
  assert images.precision_recall_of(a, b) == whole[0]
  assert images.cmmd_of(a, b) == pytest.approx(whole[1], rel=1e-12)


def test_cmmd_is_the_definition_on_unit_features(two_sets):
  x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in two_sets)

  def kernel(p, q):
    return np.exp(-np.square(p[:, None] - q[None]).sum(-1) / 200).mean()

  expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
  assert images.cmmd_of(*two_sets) == pytest.approx(expected, rel=1e-9)
  assert images.cmmd_of(two_sets[0], 3 * two_sets[0]) == pytest.approx(0, abs=1e-9)

"""How near are two sets of pictures? Fréchet distance, PSNR, CLIP score."""

from __future__ import annotations

import numpy as np

# Rounding to eight bits: the mean squared error below which PSNR says nothing.
_ROUNDING_MSE = 1 / 12


def frechet_distance(
  mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
  """Squared 2-Wasserstein distance of two Gaussians, in float64; of Inception features it is called FID.

  |mean_a - mean_b|² + tr(A + B - 2 (A B)^½). means: f[D], covariances: f[D,D], symmetric, of any rank.

  With A = F Fᵀ and B = G Gᵀ, tr (A B)^½ is the sum of the singular values of Fᵀ G. So no square root of a
  non-symmetric matrix is taken, and fewer samples than dimensions do no harm.
  Source: Dowson and Landau 1982; Heusel et al. 2017.
  """
  difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
  cross = _factor(covariance_a).T @ _factor(covariance_b)
  overlap = np.linalg.svd(cross, compute_uv=False).sum()
  spread = np.trace(np.asarray(covariance_a, np.float64)) + np.trace(np.asarray(covariance_b, np.float64))
  return max(0.0, float(difference @ difference + spread - 2 * overlap))


def frechet_distance_of(a: np.ndarray, b: np.ndarray) -> float:
  """Fréchet distance of the Gaussians fitted to two samples. a: f[N,D], b: f[M,D], N, M >= 2.

  Biased upwards for few samples; compare only at equal N and M, best beside the distance of two real sets.
  """
  if min(len(a), len(b)) < 2:
    raise ValueError(f"a covariance needs two samples or more, got {len(a)} and {len(b)}")
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return frechet_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB: the mean over pictures of each picture's own PSNR. a, b: u8[N,H,W,3].

  A perfect picture counts as the rounding error of eight bits, 58.9 dB, so that the mean stays finite.
  """
  if a.shape != b.shape:
    raise ValueError(f"pictures of different shapes: {a.shape} and {b.shape}")
  difference = a.astype(np.float32) - b.astype(np.float32)
  error = np.mean(np.square(difference), axis=(1, 2, 3), dtype=np.float64)
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, _ROUNDING_MSE))))


def clip_score(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
  """100 x the mean of max(cosine, 0) of pictures and their texts. Both f[N,E], unit norm, row i with row i.

  Source: Hessel et al. 2021, with the factor 100 that is in common use.
  """
  return float(100 * np.mean(np.maximum(np.sum(image_embeddings * text_embeddings, axis=-1), 0)))


def _covariance(samples: np.ndarray) -> np.ndarray:
  return np.atleast_2d(np.cov(samples, rowvar=False))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """F with F Fᵀ = covariance; eigenvalues below zero are rounding and become zero."""
  values, vectors = np.linalg.eigh(np.atleast_2d(np.asarray(covariance, np.float64)))
  return vectors * np.sqrt(np.maximum(values, 0))

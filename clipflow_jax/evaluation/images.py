"""How near are two sets of pictures? FID, KID, Inception Score, precision and recall, CMMD, CLIP score, PSNR.

`..._of` takes features; `moments` makes them, of pictures that are an iterable of u8[n,H,W,3], read once: n and the
size may change from one array to the next.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from clipflow_jax.errors import UserError

Pictures = Iterable[np.ndarray]  # of u8[n,H,W,3]
Features = Callable[[np.ndarray], np.ndarray]  # u8[n,H,W,3] -> f[n,D]

SEED = 2020  # torch-fidelity's, whose draws are repeated so that numbers can be compared digit by digit
# Rounding to eight bits: the mean squared error below which PSNR says nothing.
_ROUNDING_MSE = 1 / 12
_ROWS = 1024  # of a matrix of distances that is there at once


# Fréchet distance.


class Moments:
  """Mean and covariance of a stream of features f[n,D], in float64: memory D², however many there are.

  Source: Chan, Golub and LeVeque 1979, whose update loses no digits where the mean is far from zero.
  """

  def __init__(self) -> None:
    self.count = 0
    self.mean: np.ndarray = np.zeros(())
    self.scatter: np.ndarray = np.zeros(())

  def add(self, features: np.ndarray) -> Moments:
    """Takes in features f[n,D]; returns itself."""
    features = np.asarray(features, np.float64)
    n = len(features)
    if not n:
      return self
    mean = features.mean(axis=0)
    centred = features - mean
    move = mean - self.mean
    total = self.count + n
    self.scatter = self.scatter + centred.T @ centred + np.outer(move, move) * (self.count * n / total)
    self.mean = self.mean + move * (n / total)
    self.count = total
    return self

  @property
  def covariance(self) -> np.ndarray:
    """f64[D,D], unbiased. UserError for fewer than two features."""
    if self.count < 2:
      raise UserError(f"a covariance needs two pictures or more, got {self.count}")
    return self.scatter / (self.count - 1)

  def save(self, file: Path) -> None:
    """As pytorch-fid writes them: an .npz of `mu` and `sigma`, and our `count` beside them."""
    np.savez(file, mu=self.mean, sigma=self.covariance, count=self.count)

  @classmethod
  def load(cls, file: Path) -> Moments:
    """Reads what `save` or pytorch-fid wrote. UserError for anything else."""
    made = cls()
    try:
      with np.load(file, allow_pickle=False) as held:
        made.count = int(held["count"]) if "count" in held else 2
        made.mean = held["mu"].astype(np.float64)
        made.scatter = held["sigma"].astype(np.float64) * (made.count - 1)
      if made.mean.ndim != 1 or made.scatter.shape != 2 * made.mean.shape:
        raise ValueError(f"mu is {made.mean.shape}, sigma {made.scatter.shape}")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:  # TypeError: an .npy
      raise UserError(f"{file} holds no statistics: an .npz of mu and sigma is needed ({error})") from error
    return made


def moments(pictures: Pictures, features: Features) -> Moments:
  """The moments of the features of all pictures."""
  made = Moments()
  for batch in pictures:
    made.add(features(batch))
  return made


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


# Distances that need every feature.


def kid_of(
  a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
  """(mean, deviation) over `subsets` draws of `size` features of the unbiased MMD² under (x·y/D + 1)³.

  a: f[N,D], b: f[M,D]. UserError where a set has fewer than `size`. Source: Bińkowski et al. 2018; torch-fidelity.
  """
  if min(len(a), len(b)) < size:
    raise UserError(f"KID over subsets of {size} needs so many pictures in each set, got {len(a)} and {len(b)}")
  random = np.random.RandomState(seed)  # torch-fidelity's, hence the old generator
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  found = []
  for _ in range(subsets):
    x = a[random.choice(len(a), size, replace=False)]
    y = b[random.choice(len(b), size, replace=False)]
    found.append(_polynomial_mmd(x, y))
  return float(np.mean(found)), float(np.std(found))


def _polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
  def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p @ q.T / p.shape[1] + 1) ** 3

  n, xx, yy = len(x), kernel(x, x), kernel(y, y)
  within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
  return float(within - 2 * kernel(x, y).mean())


def cmmd_of(a: np.ndarray, b: np.ndarray) -> float:
  """1000 x the biased MMD² under a Gaussian kernel of deviation 10, of features a: f[N,D], b: f[M,D] at unit norm.

  In print they are CLIP ViT-L/14@336's. Source: Jayasumana et al. 2024.
  """
  x, y = (np.asarray(f, np.float64) / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))

  def similarity(p: np.ndarray, q: np.ndarray) -> float:
    total = sum(np.exp(distances / (-2 * 10.0**2)).sum() for distances in _squared_distances(p, q))
    return float(total) / (len(p) * len(q))

  return 1000 * (similarity(x, x) + similarity(y, y) - 2 * similarity(x, y))


def precision_recall_of(real: np.ndarray, fake: np.ndarray, *, k: int = 3) -> tuple[float, float]:
  """Share of fakes within the real manifold, and of reals within the fake one. f[N,D], f[M,D], N, M > k.

  A manifold is the balls about its points that reach to the k-th nearest other. Source: Kynkäänniemi et al. 2019.
  """
  if min(len(real), len(fake)) <= k:
    raise UserError(f"precision and recall need more than {k} pictures in each set, got {len(real)} and {len(fake)}")
  real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
  return _inside(fake, real, k), _inside(real, fake, k)


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
  own = [np.partition(rows, k, axis=1)[:, k] for rows in _squared_distances(manifold, manifold)]  # itself is the 0th
  radii = np.concatenate(own)
  return float(np.concatenate([(rows <= radii).any(axis=1) for rows in _squared_distances(points, manifold)]).mean())


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
  """f64[rows,M] of successive rows of a, so that N x M numbers are never there at once."""
  lengths = np.square(b).sum(axis=1)
  for start in range(0, len(a), _ROWS):
    part = a[start : start + _ROWS]
    yield np.maximum(np.square(part).sum(axis=1)[:, None] + lengths - 2 * part @ b.T, 0)


# Scores of one set.


def inception_score_of(logits: np.ndarray, *, splits: int = 10, seed: int | None = SEED) -> tuple[float, float]:
  """(mean, deviation) over splits of exp E KL(p(y|x) | p(y)). logits: f[N,K]; seed None: in the order given.

  Source: Salimans et al. 2016; torch-fidelity.
  """
  n = len(logits)
  if n < splits:
    raise UserError(f"an Inception Score of {splits} splits needs as many pictures, got {n}")
  if seed is not None:
    logits = logits[np.random.RandomState(seed).permutation(n)]  # torch-fidelity's
  scores = []
  for i in range(splits):
    part = np.asarray(logits[i * n // splits : (i + 1) * n // splits], np.float64)
    part = part - part.max(axis=1, keepdims=True)
    log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    scores.append(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def clip_score_of(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
  """100 x the mean of max(cosine, 0) of pictures and their texts. Both f[N,E], unit norm, row i with row i.

  Source: Hessel et al. 2021, with the factor 100 that is in common use.
  """
  return float(100 * np.mean(np.maximum(np.sum(image_embeddings * text_embeddings, axis=-1), 0)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB: the mean over pictures of each picture's own PSNR. a, b: u8[N,H,W,3].

  A perfect picture counts as the rounding error of eight bits, 58.9 dB, so that the mean stays finite.
  """
  if a.shape != b.shape:
    raise ValueError(f"pictures of different shapes: {a.shape} and {b.shape}")
  difference = a.astype(np.float32) - b.astype(np.float32)
  error = np.mean(np.square(difference), axis=(1, 2, 3), dtype=np.float64)
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, _ROUNDING_MSE))))


def _covariance(samples: np.ndarray) -> np.ndarray:
  return np.atleast_2d(np.cov(samples, rowvar=False))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """F with F Fᵀ = covariance; eigenvalues below zero are rounding and become zero."""
  values, vectors = np.linalg.eigh(np.atleast_2d(np.asarray(covariance, np.float64)))
  return vectors * np.sqrt(np.maximum(values, 0))

"""Pictures that look the same, by their difference hashes."""

from __future__ import annotations

import array
import collections

import numpy as np

BITS = 3  # of 64 that may differ: what was resized or compressed anew keeps the rest
BANDS = BITS + 1  # so that hashes that differ in BITS bits agree in one band at least
TINT = 2 / 255  # by which the mean colours may differ: a hash of brightness tells no red heart from a blue one


def find(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
  """i64[k], ascending: the records that look like an earlier one, which is itself none of these.

  hashes: u64[n]. colours: f32[n,3], the pictures' mean colours in [0, 1].
  """
  bands = hashes[:, None] >> np.arange(BANDS, dtype=np.uint64) * (64 // BANDS) & 2 ** (64 // BANDS) - 1
  seen: collections.defaultdict[tuple[int, int], array.array] = collections.defaultdict(lambda: array.array("q"))
  found = []
  for i, keys in enumerate(bands.tolist()):
    buckets = [seen[band] for band in enumerate(keys)]
    if any(_alike(i, np.frombuffer(bucket, np.int64), hashes, colours) for bucket in buckets if bucket):
      found.append(i)
      continue
    for bucket in buckets:
      bucket.append(i)
  return np.array(found, np.int64)


def _alike(i: int, others: np.ndarray, hashes: np.ndarray, colours: np.ndarray) -> bool:
  near = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= BITS]
  return bool((np.abs(colours[near] - colours[i]).max(-1) <= TINT).any())

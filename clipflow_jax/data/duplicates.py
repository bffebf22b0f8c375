"""Pictures that look the same: by their difference hashes, and for certain by their looks."""

from __future__ import annotations

import array
import collections

import numpy as np

BITS = 3  # of 64 that may differ: what was resized or compressed anew keeps the rest
BANDS = BITS + 1  # so that hashes that differ in BITS bits agree in one band at least
# By how much of 255 the looks may differ anywhere. Of 750 copies of clip art, compressed by JPEG at qualities 95 and 60
# or halved in size, the worst differed by 16, one in ten by more than 7; of flat art, hashes alone agree by chance.
LOOK = 20


def find(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
  """i64[k], ascending: the records that look like an earlier one, which is itself none of these.

  hashes: u64[n]. looks: u8[n,k], the pictures made small.
  """
  bands = hashes[:, None] >> np.arange(BANDS, dtype=np.uint64) * (64 // BANDS) & 2 ** (64 // BANDS) - 1
  seen: collections.defaultdict[tuple[int, int], array.array] = collections.defaultdict(lambda: array.array("q"))
  found = []
  for i, keys in enumerate(bands.tolist()):
    buckets = [seen[band] for band in enumerate(keys)]
    if any(_alike(i, np.frombuffer(bucket, np.int64), hashes, looks) for bucket in buckets if bucket):
      found.append(i)
      continue
    for bucket in buckets:
      bucket.append(i)
  return np.array(found, np.int64)


def _alike(i: int, others: np.ndarray, hashes: np.ndarray, looks: np.ndarray) -> bool:
  near = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= BITS]
  return bool((np.abs(looks[near].astype(np.int16) - looks[i]).max(axis=1) <= LOOK).any())

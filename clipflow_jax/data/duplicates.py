"""Pictures that look the same, by their difference hashes."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

BITS = 3  # of 64 that may differ: what was resized or compressed anew keeps the rest
BANDS = BITS + 1  # so that hashes that differ in BITS bits agree in one band at least
TINT = 2 / 255  # by which the mean colours may differ: a hash of brightness tells no red heart from a blue one


def find(hashes: Sequence[int], colours: np.ndarray) -> np.ndarray:
  """i64[k], ascending: the records that look like an earlier one, which is itself none of these.

  hashes: of 64 bits. colours: f32[n,3], the pictures' mean colours in [0, 1].
  """
  width = 64 // BANDS
  seen: list[dict[int, list[int]]] = [collections.defaultdict(list) for _ in range(BANDS)]
  found = []
  for i, value in enumerate(hashes):
    keys = [value >> band * width & (1 << width) - 1 for band in range(BANDS)]
    candidates = {j for band, key in zip(seen, keys, strict=True) for j in band[key]}
    if any(
      (value ^ hashes[j]).bit_count() <= BITS and np.abs(colours[i] - colours[j]).max() <= TINT for j in candidates
    ):
      found.append(i)
      continue
    for band, key in zip(seen, keys, strict=True):
      band[key].append(i)
  return np.array(found, np.int64)

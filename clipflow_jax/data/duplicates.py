"""Pictures that look the same: by their difference hashes, and for certain by their looks."""

from __future__ import annotations

import array
import collections
from collections.abc import Iterator, Sequence

import numpy as np

BITS = 3  # of 64 that may differ: what was resized or compressed anew keeps the rest
BANDS = BITS + 1  # so that hashes that differ in BITS bits agree in one band at least
# By how much of 255 the looks may differ anywhere. Of 750 copies of clip art, compressed by JPEG at qualities 95 and 60
# or halved in size, the worst differed by 16, one in ten by more than 7; of flat art, hashes alone agree by chance.
LOOK = 20
LEAF = 64  # records that are compared one by one sooner than told apart
SURE = 0.1  # share of a leaf's records that at least lies on either side of a border, further than LOOK from it


def find(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
  """i64[k], ascending: the records that look like an earlier one, which is itself none of these.

  hashes: u64[n]. looks: u8[n,k], the pictures made small.
  """
  bands = hashes[:, None] >> np.arange(BANDS, dtype=np.uint64) * (64 // BANDS) & 2 ** (64 // BANDS) - 1
  # Of flat art a band is often the same: a third of all records may share one, and their looks tell them apart.
  seen: collections.defaultdict[tuple[int, int], _Tree] = collections.defaultdict(_Tree)
  found = []
  for i, keys in enumerate(bands.tolist()):
    trees, look = [seen[band] for band in enumerate(keys)], looks[i].tolist()
    leaves = [np.frombuffer(leaf, np.int64) for tree in trees for leaf in tree.near(look)]
    if leaves and _alike(i, np.concatenate(leaves), hashes, looks):
      found.append(i)
      continue
    del leaves  # an array does not grow while another looks into it
    for tree in trees:
      tree.add(i, look, looks)
  return np.array(found, np.int64)


def _alike(i: int, others: np.ndarray, hashes: np.ndarray, looks: np.ndarray) -> bool:
  near = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= BITS]
  return bool((np.abs(looks[near].astype(np.int16) - looks[i]).max(axis=1) <= LOOK).any())


class _Tree:
  """Records by their looks, in leaves of a k-d tree: the ones within LOOK of a look lie in few of them."""

  __slots__ = ("border", "halves", "ids", "place", "room")

  def __init__(self, ids: Sequence[int] = ()):
    self.ids, self.room = array.array("q", ids), LEAF
    self.halves: tuple[_Tree, _Tree] | None = None  # of which the second has what reaches the border at the place
    self.place = self.border = 0

  def near(self, look: list[int]) -> Iterator[array.array]:
    """The records of all leaves in which one may be that differs from the look by no more than LOOK."""
    nodes = [self]
    while nodes:
      node = nodes.pop()
      if node.halves is None:
        if node.ids:
          yield node.ids
        continue
      if look[node.place] - LOOK < node.border:
        nodes.append(node.halves[0])
      if look[node.place] + LOOK >= node.border:
        nodes.append(node.halves[1])

  def add(self, i: int, look: list[int], looks: np.ndarray) -> None:
    node = self
    while node.halves is not None:
      node = node.halves[look[node.place] >= node.border]
    node.ids.append(i)
    if len(node.ids) > node.room:
      node._split(looks)

  def _split(self, looks: np.ndarray) -> None:
    """In two halves, at the place where most are surely of one; where few are, not before there are twice as many."""
    ids = np.array(self.ids)
    found = looks[ids].astype(np.int16)
    borders = np.ceil(found.mean(axis=0))
    sure = np.minimum((found + LOOK < borders).mean(axis=0), (found >= borders + LOOK).mean(axis=0))
    self.place = int(sure.argmax())
    if sure[self.place] < SURE:
      self.room = 2 * len(ids)
      return
    self.border = int(borders[self.place])
    above = found[:, self.place] >= self.border
    self.halves = _Tree(ids[~above].tolist()), _Tree(ids[above].tolist())
    self.ids = array.array("q")

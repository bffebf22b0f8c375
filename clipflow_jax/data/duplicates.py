"""Pictures that look the same: by their difference hashes, and for certain by their looks."""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence

import numpy as np

BITS = 3  # of 64 that may differ: what was resized or compressed anew keeps the rest
BANDS = BITS + 1  # so that hashes that differ in BITS bits agree in one band at least
# By how much of 255 the looks may differ anywhere. Of 750 copies of clip art, compressed by JPEG at qualities 95 and 60
# or halved in size, the worst differed by 16, one in ten by more than 7; of flat art, hashes alone agree by chance.
LOOK = 20
LEAF = 64  # records that are compared one by one sooner than told apart
SURE = 0.1  # share of a leaf's records that at least lies on either side of a border, further than LOOK from it
CROWDED = 1024  # records that are told apart by more of their hashes where their looks do not
FEWER = 0.5  # share of them that is then compared at most, in the mean


def find(hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
  """i64[n]: the first record that each looks like, of those that are like none before them; itself where it is one.

  hashes: u64[n]. looks: u8[n,k], the pictures made small.
  """
  # Of flat art a band is often the same: a third of all records may share one, and their looks tell them apart.
  root = _Tree()
  root.bands = _bands(np.arange(64).reshape(BANDS, -1).T.ravel().tolist())  # neighbouring bits together
  first = np.arange(len(hashes))
  for i, hash in enumerate(hashes.tolist()):
    look = looks[i].tolist()
    leaves = [np.frombuffer(leaf, np.int64) for leaf in root.near(hash, look)]
    same = _alike(i, np.concatenate(leaves), hashes, looks) if leaves else ()
    del leaves  # an array does not grow while another looks into it
    if len(same):
      first[i] = min(same)
    else:
      root.add(i, hash, look, hashes, looks)
  return first


def _alike(i: int, others: np.ndarray, hashes: np.ndarray, looks: np.ndarray) -> np.ndarray:
  near = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= BITS]
  return near[np.abs(looks[near].astype(np.int16) - looks[i]).max(axis=1) <= LOOK]


def _bands(bits: Sequence[int]) -> list[tuple[int, dict[int, _Tree]]]:
  """The bits as BANDS masks, each with the trees of what records have there."""
  return [(sum(1 << bit for bit in bits[band::BANDS]), {}) for band in range(BANDS)]


class _Tree:
  """Records by their looks, in leaves of a k-d tree: the ones within LOOK of a look lie in few of them.

  Scans of blank pages all look alike: a leaf of many such is parted by bands of their hashes, of the bits in which
  they differ most evenly, and has each record once in each band.
  """

  __slots__ = ("bands", "border", "halves", "ids", "place", "room")

  def __init__(self, ids: Sequence[int] = ()):
    self.ids, self.room = array.array("q", ids), LEAF
    self.halves: tuple[_Tree, _Tree] | None = None  # of which the second has what reaches the border at the place
    self.place = self.border = 0
    self.bands: list[tuple[int, dict[int, _Tree]]] = []  # (mask, {hash in it: its records})

  def near(self, hash: int, look: list[int]) -> Iterator[array.array]:
    """The records of all leaves in which one may be that differs from hash and look by no more than BITS and LOOK."""
    nodes = [self]
    while nodes:
      node = nodes.pop()
      if node.bands:
        nodes += [trees[hash & mask] for mask, trees in node.bands if hash & mask in trees]
      elif node.halves is None:
        if node.ids:
          yield node.ids
      else:
        if look[node.place] - LOOK < node.border:
          nodes.append(node.halves[0])
        if look[node.place] + LOOK >= node.border:
          nodes.append(node.halves[1])

  def add(self, i: int, hash: int, look: list[int], hashes: np.ndarray, looks: np.ndarray) -> None:
    nodes = [self]
    while nodes:
      node = nodes.pop()
      while node.halves is not None:
        node = node.halves[look[node.place] >= node.border]
      if node.bands:
        nodes += [trees.setdefault(hash & mask, _Tree()) for mask, trees in node.bands]
        continue
      node.ids.append(i)
      if len(node.ids) > node.room:
        node._split(hashes, looks)

  def _split(self, hashes: np.ndarray, looks: np.ndarray) -> None:
    """In two halves, at the place where most are surely of one; else by hashes; else not before twice as many come."""
    ids = np.array(self.ids)
    found = looks[ids].astype(np.int16)
    borders = np.ceil(found.mean(axis=0))
    sure = np.minimum((found + LOOK < borders).mean(axis=0), (found >= borders + LOOK).mean(axis=0))
    self.place = int(sure.argmax())
    if sure[self.place] >= SURE:
      self.border = int(borders[self.place])
      above = found[:, self.place] >= self.border
      self.halves = _Tree(ids[~above].tolist()), _Tree(ids[above].tolist())
    elif len(ids) < CROWDED or not self._part(ids, hashes[ids]):
      self.room = 2 * len(ids)
      return
    self.ids = array.array("q")

  def _part(self, ids: np.ndarray, hashes: np.ndarray) -> bool:
    """By bands of the hashes, where few enough agree in one."""
    share = np.array([(hashes >> np.uint64(bit) & 1).mean() for bit in range(64)])
    even = np.argsort(np.abs(share - 0.5), kind="stable")
    bands, compared = _bands(even[np.minimum(share, 1 - share)[even] > 0].tolist()), 0.0
    for mask, trees in bands:
      values, which, counts = np.unique(hashes & np.uint64(mask), return_inverse=True, return_counts=True)
      compared += float(((counts / len(ids)) ** 2).sum())
      members = np.split(ids[np.argsort(which, kind="stable")], counts.cumsum()[:-1])
      trees |= {value: _Tree(own.tolist()) for value, own in zip(values.tolist(), members, strict=True)}
    if compared > FEWER:
      return False
    self.bands = bands
    return True

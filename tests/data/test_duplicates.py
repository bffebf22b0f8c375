from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data import duplicates
from clipflow_jax.data.duplicates import LOOK
from clipflow_jax.data.shard import difference_hash, look
from tests import tiny_data


def by_all_pairs(hashes: np.ndarray, looks: np.ndarray) -> list[int]:
  """What `duplicates.find` says, by comparing each record with all before it that are kept."""
  first = np.arange(len(hashes))
  for i in range(len(hashes)):
    kept = np.flatnonzero(first[:i] == np.arange(i))
    near = np.bitwise_count(hashes[kept] ^ hashes[i]) <= duplicates.BITS
    same = near & (np.abs(looks[kept].astype(int) - looks[i]).max(axis=1) <= LOOK)
    first[i] = kept[same][0] if same.any() else i
  return first.tolist()


def found(first: np.ndarray) -> int:
  return int((first != np.arange(len(first))).sum())


def test_it_finds_what_comparing_all_pairs_finds():
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, 300, np.uint64)
  for i in range(100, 300):  # up to six bits from an earlier one
    flips = rng.choice(64, rng.integers(0, 7), replace=False)
    hashes[i] = hashes[rng.integers(100)] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
  looks = rng.choice(np.array([100, 115, 130], np.uint8), (300, 3), p=[0.6, 0.3, 0.1])
  first = duplicates.find(hashes, looks)
  assert first.tolist() == by_all_pairs(hashes, looks) and 10 < found(first) < 200


def flat_art(records: int, copies: float) -> tuple[np.ndarray, np.ndarray]:
  """Hashes that are often the same, looks that are white but for some places, and copies that nearly agree."""
  rng = np.random.default_rng(1)
  hashes = rng.integers(0, 2**64, records, np.uint64) & np.uint64(0xFFFF0000FFFF)
  looks = np.where(rng.random((records, 48)) < 0.7, 255, rng.integers(0, 256, (records, 48))).astype(int)
  for i in np.flatnonzero(rng.random(records) < copies):
    of = rng.integers(records)
    hashes[i] = hashes[of] ^ np.uint64(1 << 40 | 1)  # they agree in the bands that all share, and in no other
    looks[i] = looks[of] + rng.integers(-LOOK, LOOK + 1, 48)
    looks[i, 0] = looks[of, 0] + rng.choice([0, LOOK, -LOOK - 1])
  return hashes, looks.clip(0, 255).astype(np.uint8)


def blank(records: int, copies: float) -> tuple[np.ndarray, np.ndarray]:
  """Hashes that differ in half of their bits, in two bands, looks that are nearly white, and copies of these."""
  rng = np.random.default_rng(2)
  hashes = rng.integers(0, 2**64, records, np.uint64) & np.uint64(2**32 - 1)
  for i in np.flatnonzero(rng.random(records) < copies):
    flips = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
    hashes[i] = hashes[rng.integers(records)] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
  return hashes, rng.integers(232, 255, (records, 48)).astype(np.uint8)


def test_of_flat_art_too_it_finds_what_comparing_all_pairs_finds():
  first = duplicates.find(*flat_art(1500, 0.5))
  assert first.tolist() == by_all_pairs(*flat_art(1500, 0.5)) and 300 < found(first) < 900


def test_of_blank_pages_too_it_finds_what_comparing_all_pairs_finds(monkeypatch):
  monkeypatch.setattr(duplicates, "CROWDED", 64)  # bands in bands
  first = duplicates.find(*blank(1500, 0.5))
  assert first.tolist() == by_all_pairs(*blank(1500, 0.5)) and 100 < found(first) < 900


@pytest.mark.parametrize(
  ("pictures", "most"),
  [(flat_art, 600), (blank, 400)],  # of the two bands that all share: of 2 x 6000
)
def test_few_of_those_whose_hashes_agree_in_part_are_compared(monkeypatch, pictures, most):
  compared, alike = [], duplicates._alike
  monkeypatch.setattr(
    duplicates, "_alike", lambda i, others, *how: compared.append(len(others)) or alike(i, others, *how)
  )
  duplicates.find(*pictures(6000, 0.0))
  assert np.sum(compared[-1000:]) < 1000 * most


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_resized_and_compressed_keeps_its_hash_and_its_look(seed):
  original = Image.open(io.BytesIO(tiny_data.noise(seed, (96, 96)))).convert("RGB")
  file = io.BytesIO()
  original.resize((64, 64), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
  again = Image.open(file).resize((96, 96), Image.Resampling.BICUBIC)
  pictures = [
    np.asarray(original),
    np.asarray(again),
    np.asarray(Image.open(io.BytesIO(tiny_data.noise(99, (96, 96))))),
  ]
  hashes = np.array([difference_hash(picture) for picture in pictures], np.uint64)
  looks = np.stack([look(picture) for picture in pictures])
  assert duplicates.find(hashes, looks).tolist() == [0, 0, 2]


def test_pictures_whose_hashes_and_mean_colours_agree_are_told_apart_by_their_looks():
  pictures = np.full((2, 96, 96, 3), 255, np.uint8)
  pictures[0, 36:44, 36:44] = (255, 0, 0)
  pictures[1, 36:44, 36:44] = (0, 0, 255)
  hashes = np.array([difference_hash(picture) for picture in pictures], np.uint64)
  assert hashes[0] == hashes[1]
  assert duplicates.find(hashes, np.stack([look(picture) for picture in pictures])).tolist() == [0, 1]

"""How fast data comes: pictures decoded and resized, cached features read, beside the most that this machine could."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipflow_jax.bench.frame import Work
from clipflow_jax.data import feature_cache, images
from clipflow_jax.data.example import Example
from clipflow_jax.data.feature_cache import FeatureSource
from clipflow_jax.data.feature_statistics import Statistics
from clipflow_jax.data.pipeline import ahead
from clipflow_jax.errors import UserError

STORED, WANTED = 256, 224  # pixels of the JPEGs, and of the pictures made of them
TOKENS, CHANNELS = 256, 1152  # of a picture's features: SigLIP So400m at 224


def work(told: dict[str, Any]) -> Work:
  """One pass over temporary files, by all cores. told: way, pictures, mebibytes (of features).

  "pipeline" makes pictures of JPEGs as training does, and "pillow" does the same by Pillow alone; "features" reads a
  feature cache, and "raw_read" the same file as mere bytes. UserError for another way.
  """
  cores = len(os.sched_getaffinity(0))
  scratch = tempfile.TemporaryDirectory()
  folder = Path(scratch.name)

  def done(run: Any, counts: dict[str, float], about: str, peer: dict[str, Any] | None = None) -> Work:
    def once() -> None:
      run()
      assert scratch  # lives as long as what reads it

    once()  # files are in the page cache, threads have started
    return Work(once, counts, f"{about}, {cores} threads", peer=peer)

  if told["way"] in ("pipeline", "pillow"):
    files = _write_pictures(folder, told["pictures"])
    counts = {"images": float(len(files))}
    about = f"{len(files)} JPEGs of {STORED} pixels to {WANTED}"
    if told["way"] == "pillow":
      return done(lambda: _pillow(files, cores), counts, about)
    peer = {"folder": str(folder), "side": WANTED, "workers": cores}
    return done(lambda: _pass(files, lambda file: images.decode(file, WANTED), cores), counts, about, peer)
  if told["way"] in ("features", "raw_read"):
    source = _write_features(folder / "features", told["mebibytes"])
    size = TOKENS * CHANNELS * 2
    counts = {"gigabytes": len(source) * size / 1e9, "images": float(len(source))}
    about = f"features of {len(source)} pictures, {TOKENS} x {CHANNELS} in bfloat16"
    if told["way"] == "features":
      return done(lambda: _pass(range(len(source)), source.__getitem__, cores), counts, about)
    (shard,) = (folder / "features").rglob(f"*{feature_cache.FEATURES}")
    return done(lambda: _raw_read(shard, size, cores), counts, about)
  raise UserError(f"bench data: way {told['way']!r} is unknown; there are pipeline, pillow, features, raw_read")


def _write_pictures(folder: Path, count: int) -> list[Path]:
  """JPEGs of smooth noise, about as hard to decode as photographs."""
  rng, files = np.random.default_rng(0), []
  for i in range(count):
    coarse = rng.integers(0, 256, (STORED // 8, STORED // 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((STORED, STORED), Image.Resampling.BICUBIC), np.int16)
    grainy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    files.append(folder / f"{i:05d}.jpg")
    Image.fromarray(grainy).save(files[-1], quality=90)
  return files


def _write_features(folder: Path, mebibytes: int) -> FeatureSource:
  """A cache of random features of about that size."""
  count = max(1, mebibytes * 2**20 // (TOKENS * CHANNELS * 2))
  rng = np.random.default_rng(0)
  few = rng.normal(size=(8, TOKENS, CHANNELS)).astype(jnp.bfloat16)
  statistics = Statistics(np.zeros((TOKENS, CHANNELS), np.float32), np.ones((TOKENS, CHANNELS), np.float32))
  examples = (([Example(str(i), few[0], ("a caption",), "a caption", ())], few[i % 8][None]) for i in range(count))
  folder.mkdir()
  feature_cache.write_statistics(folder, statistics)
  feature_cache.write_shard(folder / "data.source" / "00000.array_record", examples, "bfloat16")
  feature_cache.write_manifest(folder, {"dtype": "bfloat16"}, ["data.source"])
  return FeatureSource(folder, "data.source")


def _pillow(files: list[Path], cores: int) -> None:
  """The same work by Pillow alone, on as many threads: it lets others run while it decodes and resizes."""

  def work(file: Path) -> np.ndarray:
    with Image.open(file) as image:
      return np.asarray(image.convert("RGB").resize((WANTED, WANTED), Image.Resampling.BICUBIC))

  with ThreadPoolExecutor(cores) as pool:
    for _ in pool.map(work, files):
      pass


def _pass(items: Iterable, read: Any, cores: int) -> None:
  """All items once, as `Pipeline` reads: Grain's threads, in order, ahead of who takes."""
  for _ in ahead(grain.MapDataset.source(list(items)).map(read), cores, 64):
    pass


def _raw_read(file: Path, size: int, cores: int) -> None:
  """A file in pieces of `size` bytes, each into memory of its own, on as many threads."""

  def work(place: int) -> bytes:
    with file.open("rb", buffering=0) as raw:
      return os.pread(raw.fileno(), size, place)

  with ThreadPoolExecutor(cores) as pool:
    for _ in pool.map(work, range(0, file.stat().st_size, size)):
      pass

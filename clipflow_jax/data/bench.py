"""How fast data comes: pictures decoded and resized, cached features read, beside the most that this machine could."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from PIL import Image

import clipflow_jax
from clipflow_jax.data import feature_cache, images
from clipflow_jax.data.example import Example
from clipflow_jax.data.feature_cache import FeatureSource
from clipflow_jax.errors import UserError

STORED, WANTED = 256, 224  # pixels of the JPEGs, and of the pictures made of them
TOKENS, CHANNELS = 256, 1152  # of a picture's features: SigLIP So400m at 224
PICTURES, MEBIBYTES = 512, 512  # how many, and how much of features
PEERS = Path(clipflow_jax.__file__).parents[1] / "tests" / "benchmarks" / "peers"


def run(*, rounds: int = 5, peer: str = "") -> dict[str, Any]:
  """Measures on temporary files, on all cores this process may use; numbers by name.

  What is compared takes turns, and each number is the median of its `rounds`. On a machine that others use, the numbers
  a core-second (of processor time, not of the clock) tell more than those a second. peer: "torch", measured too, in a
  process of its own. UserError where there is no such peer.
  """
  cores = len(os.sched_getaffinity(0))
  script = PEERS / f"{peer}_loader.py"
  if peer and not script.is_file():
    raise UserError(
      f"there is no peer {peer!r} to measure: peers are the scripts in tests/benchmarks/peers of a checkout"
    )
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    files = _write_pictures(folder / "pictures", PICTURES)
    ways: dict[str, Callable[[], float]] = {
      "pillow": lambda: _pillow(files, cores),
      "pipeline": lambda: _count(_stream(files, lambda file: images.decode(file, WANTED), cores)),
    }
    found: dict[str, Any] = {"cores": cores, "load_before": os.getloadavg()[0]}
    found |= _measured(ways, rounds, "images")
    if peer:
      found[f"{peer}_images_per_second"] = _peer(script, folder / "pictures", cores, rounds)
    source = _write_features(folder / "features", MEBIBYTES)
    size = TOKENS * CHANNELS * 2
    (shard,) = (folder / "features").rglob(f"*{feature_cache.FEATURES}")
    ways = {
      "raw_read": lambda: size / 1e9 * _raw_read(shard, size, cores),
      "features": lambda: size / 1e9 * _count(_stream(range(len(source)), source.__getitem__, cores)),
    }
    found |= _measured(ways, rounds, "gigabytes")
  return found


def _measured(ways: dict[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, float]:
  """{"WAY_UNIT_per_second", "WAY_UNIT_per_core_second"} of each; a way does its work and says how much it was."""
  rates: dict[str, list[float]] = {}
  for way in ways.values():
    way()  # files are in the page cache, threads have started
  for _ in range(rounds):
    for name, way in ways.items():
      clock, processor = time.perf_counter(), time.process_time()
      done = way()
      rates.setdefault(f"{name}_{unit}_per_second", []).append(done / (time.perf_counter() - clock))
      rates.setdefault(f"{name}_{unit}_per_core_second", []).append(done / (time.process_time() - processor))
  return {name: float(np.median(values)) for name, values in rates.items()}


def _write_pictures(folder: Path, count: int) -> list[Path]:
  """JPEGs of smooth noise, about as hard to decode as photographs."""
  folder.mkdir()
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
  statistics = feature_cache.Statistics(
    np.zeros((TOKENS, CHANNELS), np.float32), np.ones((TOKENS, CHANNELS), np.float32)
  )
  examples = (([Example(str(i), few[0], ("a caption",), "a caption", ())], few[i % 8][None]) for i in range(count))
  folder.mkdir()
  feature_cache.write_statistics(folder, statistics)
  feature_cache.write_shard(folder / "data.source" / "00000.array_record", examples, "bfloat16")
  feature_cache.write_manifest(folder, {"dtype": "bfloat16"}, ["data.source"])
  return FeatureSource(folder, "data.source")


def _pillow(files: list[Path], cores: int) -> int:
  """The same work by Pillow alone, on as many threads: it lets others run while it decodes and resizes."""

  def work(file: Path) -> np.ndarray:
    with Image.open(file) as image:
      return np.asarray(image.convert("RGB").resize((WANTED, WANTED), Image.Resampling.BICUBIC))

  with ThreadPoolExecutor(cores) as pool:
    return sum(1 for _ in pool.map(work, files))


def _stream(items: Iterable, read: Callable, cores: int) -> grain.IterDataset:
  """As `Pipeline` reads: Grain's threads, in order, ahead of who takes."""
  options = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=64)
  return grain.MapDataset.source(list(items)).map(read).to_iter_dataset(options)


def _count(stream: Iterable) -> int:
  return sum(1 for _ in stream)


def _raw_read(file: Path, size: int, cores: int) -> int:
  """A file in pieces of `size` bytes, each into memory of its own, on as many threads: how many there are."""

  def work(place: int) -> bytes:
    with file.open("rb", buffering=0) as raw:
      return os.pread(raw.fileno(), size, place)

  with ThreadPoolExecutor(cores) as pool:
    return sum(1 for _ in pool.map(work, range(0, file.stat().st_size, size)))


def _peer(script: Path, folder: Path, cores: int, rounds: int) -> float:
  command = [sys.executable, str(script), str(folder), str(WANTED), str(cores), str(rounds)]
  ran = subprocess.run(command, capture_output=True, text=True, check=False)
  if ran.returncode:
    raise UserError(f"{script.name} failed: {(ran.stderr.strip().splitlines() or ['without a word'])[-1]}")
  return float(json.loads(ran.stdout.splitlines()[-1])["images_per_second"])

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

# For this process and for those that tests start, before anything imports jax. Nearly all the time of the suite goes
# into compiling programs that then run for milliseconds: each is compiled once, and in a hurry.
CACHE = "JAX_COMPILATION_CACHE_DIR"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know would end the process
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # a quarter of the time to compile
if CACHE not in os.environ:
  os.environ[CACHE] = tempfile.mkdtemp(prefix="clipflow_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
  """The folder of real inputs and golden values beside the checkout; tests are skipped where it is absent."""
  if not SHARED_DATA.is_dir():
    pytest.skip("the folder of real data, ../shared/data, is not beside this checkout")
  return SHARED_DATA


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The workdir of a whole tiny model after two steps. To be read, not written."""
  from clipflow_jax.training import loop
  from tests import tiny_runs

  workdir = tmp_path_factory.mktemp("trained")
  loop.train(tiny_runs.decoder_stage(model=tiny_runs.model(), steps=2), workdir)
  return workdir

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

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

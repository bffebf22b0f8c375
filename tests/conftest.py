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

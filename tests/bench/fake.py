"""Subjects that cost nothing, for tests of the frame."""

from __future__ import annotations

import time
from typing import Any

from clipflow_jax.bench.frame import Work


def sleep(told: dict[str, Any]) -> Work:
  """told: seconds, images."""
  print("libraries print what they like")
  return Work(lambda: time.sleep(told["seconds"]), {"images": told["images"]}, "sleep", peer={"times": 3})


def fail(told: dict[str, Any]) -> Work:
  raise SystemExit(f"no {told['what']}")

"""The picture of a stranger, for the page and the server alike."""

from __future__ import annotations

import numpy as np

from clipflow_jax.data import images
from clipflow_jax.data.example import BadRecord

MAX_PIXELS = 2**24  # 64 MiB when unpacked: less than what may be trained on, and a small file may claim any size


def see(data: bytes, size: int, name: str) -> np.ndarray:
  """The bytes of a picture file as the model sees it in training, u8[size,size,3]. Raises BadRecord(name, why)."""
  with images.opened(data, name) as opened:
    if opened.width * opened.height > MAX_PIXELS:
      raise BadRecord(name, f"too large: {opened.width} x {opened.height}, the limit is {MAX_PIXELS} pixels")
    images.lighten(opened, size)
    return images.square(opened, size)

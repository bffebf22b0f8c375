"""Pictures as a model's own image processor hands them to it, with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from clipflow_jax.errors import UserError


def prepare(picture: Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
  """An open picture as u8[H,W,3], resized and cropped as preprocessor_config.json says.

  What it says of mean and deviation is in the imported tower, which takes pixels as they are. settings: `size` with
  "shortest_edge", or with "height" and "width"; `resample`, Pillow's number; `crop_size` where `do_center_crop`.
  UserError for a size in other words (a longest edge, a number of pixels).
  """
  picture = picture.convert("RGB")
  size = settings["size"]
  if isinstance(size, int):  # of old files
    size = {"shortest_edge": size}
  if "shortest_edge" in size and "longest_edge" not in size:
    # The longer side is rounded down, as the processors do.
    width, height = (int(size["shortest_edge"] * side / min(picture.size)) for side in picture.size)
  elif {"height", "width"} <= set(size):
    width, height = size["width"], size["height"]
  else:
    raise UserError(
      f"preprocessor_config.json says size {dict(size)}; this package knows shortest_edge, or height and width"
    )
  if settings.get("do_resize", True):
    picture = picture.resize((width, height), Image.Resampling(settings["resample"]))
  if settings.get("do_center_crop"):
    crop = settings["crop_size"]
    across, down = (crop, crop) if isinstance(crop, int) else (crop["width"], crop["height"])
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    picture = picture.crop((left, top, left + across, top + down))
  return np.asarray(picture)

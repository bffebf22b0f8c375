"""What DINOv2 sees of a picture: Fréchet distances in it agree better with people than Inception's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation.inception import Sharded, bicubic, key_of
from clipflow_jax.interop import huggingface
from clipflow_jax.models.vision import VisionTower

SIZE = 224  # pixels, in print


class Extractor:
  """u8[n,H,W,3] -> f32[n,D]: DINOv2's class token after the last norm, of pictures that clean-fid's filter made 224 px.

  weights: a folder or hub id; FD in print is of facebook/dinov2-large. UserError for another tower than DINOv2.
  key: changes with whatever changes a feature. Source: Stein et al. 2023.
  """

  def __init__(self, weights: Path | str, *, batch_size: int = 32):
    module, params = huggingface.load(weights)
    if not isinstance(module, VisionTower) or module.pooling != "class" or module.embedding:
      raise UserError(f"{weights} is no DINOv2: give a folder or hub id such as facebook/dinov2-large")
    self.key = key_of(module, params)
    side = module.image_size // module.patch_size
    places = np.asarray(params["place_positions"], np.float32)
    params = {**params, "place_positions": resampled(places, side, SIZE // module.patch_size)}
    module = module.clone(image_size=SIZE)

    def see(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
      _, kept = module.apply(
        {"params": params}, x, False, capture_intermediates=lambda made, _: made.name == "out_norm"
      )
      return (kept["intermediates"]["out_norm"]["__call__"][0][:, 0],)

    self._run = Sharded(see, params, batch_size)

  def __call__(self, images: np.ndarray) -> np.ndarray:
    return self._run(bicubic(images, SIZE))[0]


def resampled(places: np.ndarray, side: int, to: int) -> np.ndarray:
  """Positions f32[1+side²,D], the class token's first, brought to a grid of `to` a side as PyTorch's bicubic does.

  As DINOv2's own code asks for it, by which published distances were measured: by the factor (to + 0.1) / side.
  """
  if side == to:
    return places
  weights = np.stack([_cubic(row, side) for row in (np.arange(to) + 0.5) * side / (to + 0.1) - 0.5]).astype(np.float32)
  grid = np.einsum("ai,bj,ijd->abd", weights, weights, places[1:].reshape(side, side, -1), optimize=True)
  return np.concatenate([places[:1], grid.reshape(to * to, -1)])


def _cubic(place: float, side: int) -> np.ndarray:
  """f64[side]: by what each of a row of values counts at `place`. Keys 1981 with -0.75, the ends repeated."""
  a, weights = -0.75, np.zeros(side)
  first = int(np.floor(place))
  for i in range(first - 1, first + 3):
    d = abs(place - i)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights[min(max(i, 0), side - 1)] += near if d <= 1 else far
  return weights

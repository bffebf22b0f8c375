"""What a stage begins with that other runs have learned: `config.init_from`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import distributed
from clipflow_jax.training import adapters, checkpoint, state
from clipflow_jax.training.state import Params

log = logging.getLogger(__name__)

# Learned positions that go on at another size of pictures: (regex of paths, axes of the grid that they are of).
PLACES = ((r"clip_model/vision_tower/place_positions", 2), (r".*/(row|column)_positions", 1))


def load(config: ConfigDict, names: tuple[str, ...] = ()) -> list[checkpoint.Restored]:
  """What `config.init_from` names, in its order: of each state the parts `names`, as `checkpoint.load`."""
  return [checkpoint.load(path.strip(), names) for path in config.init_from.split(",") if path.strip()]


def take(
  ours: Params, starts: Sequence[checkpoint.Restored], shardings: Params, scales: Mapping[str, float], measured: bool
) -> dict[str, jax.Array]:
  """{path: array} of the parameters that other runs have at our path and shape, of the first that has each.

  In the dtype in which they were kept: on the devices they take no more room than there. Learned positions of another
  grid are `resampled`. What was taken and left is logged. measured: whether the features' statistics are set anew
  besides. UserError where nothing is taken, where what shall stay frozen is there in another shape, and for statistics
  of another grid that are not set anew.
  """
  flat, places = state.flatten(ours), state.flatten(shardings)
  taken: dict[str, jax.Array] = {}
  others: dict[str, tuple[int, ...]] = {}  # {path: shape} of what is there in another shape
  for start in starts:
    theirs = state.flatten(adapters.plain(start))
    new, grids = {}, []
    for path in [path for path in flat if path in theirs and path not in taken]:
      leaf, shape = np.asarray(theirs[path]), flat[path].shape
      if leaf.shape != shape:
        others[path] = leaf.shape
        if path == "statistics/mean" and leaf.shape[1:] == shape[1:] and leaf.any() and not measured:
          raise UserError(
            f"init_from measured features of {len(leaf)} tokens a picture, here there are {shape[0]}: have them "
            "measured anew, config.measure_features=4096"
          )
        leaf, grid = resampled(path, leaf, shape)
        if leaf is None:
          continue
        grids.append(f"{path} from {grid}")
      new[path] = distributed.place(leaf, places[path])
    taken |= new
    log.info("init_from step %d: took %d parameters of %d", start.step, len(new), len(flat))
    if grids:
      log.info("  resampled for pictures of another size: %s", ", ".join(sorted(grids)))
    if left := sorted(theirs.keys() - new):
      log.info("  left there: %s", ", ".join(left))
  if not taken:
    raise UserError("config.init_from has no parameter of this model: none is of the same name and shape")
  unlike = sorted(path for path in others.keys() - taken.keys() if not path.startswith("statistics/"))
  for path in unlike:
    told = f"{path} has shape {flat[path].shape} here, {others[path]} in init_from"
    if not scales.get(path, 1.0):
      raise UserError(f"{told}, and stays as it begins: at random. Give the model the fields of init_from's")
    log.warning("%s: it begins anew", told)
  if fresh := sorted(flat.keys() - taken):
    log.info("  fresh here: %s", ", ".join(fresh))
  return taken


def resampled(path: str, places: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray | None, str]:
  """Learned positions f[(1 +) G^a, D] for another grid, f32 of `shape` [(1 +) H^a, D], and words for G and H.

  Bicubic, as pictures are resized; a class token's stays as it is. None for other parameters, another width, and a
  class token in one of the two alone.
  """
  axes = next((axes for pattern, axes in PLACES if re.fullmatch(pattern, path)), 0)
  if not axes or places.shape[1:] != shape[1:]:
    return None, ""
  old, new = (rows if axes == 1 else math.isqrt(rows) for rows in (len(places), shape[0]))
  first = len(places) - old**axes
  if first != shape[0] - new**axes:
    return None, ""
  places = places.astype(np.float32)
  grid = places[first:].reshape(*[old] * axes, -1)
  for _ in range(axes):  # rows, then columns: the first axis becomes the last of the grid's
    plane = Image.fromarray(grid.reshape(old, -1))
    plane = plane.resize((plane.width, new), Image.Resampling.BICUBIC)
    grid = np.moveaxis(np.asarray(plane).reshape(new, *grid.shape[1:]), 0, axes - 1)
  found = np.concatenate([places[:first], grid.reshape(new**axes, -1)])
  return found, " to ".join(" x ".join([str(side)] * axes) for side in (old, new))


def refuse_the_untaught(fresh: set[str], scales: Mapping[str, float], pipeline: Pipeline, objective: Objective) -> None:
  """UserError where what a stage learns beside is frozen and begins at random. fresh: the paths that begin so."""
  used = {
    "clip_model/vision_tower/": any(part.role != "text" for part in pipeline.parts),
    "language_model/text/": any(objective.weights.get(name) for name in ("language", "flow")),
  }
  found = [
    part[:-1]
    for part, needed in used.items()
    if needed and any(path.startswith(part) and not scales.get(path, 0.0) for path in fresh)
  ]
  if found:
    raise UserError(
      f"config.train freezes {' and '.join(found)}, which would begin at random: "
      "set init_from to the workdir of a run or an import that taught it, or frozen_at_random=True to learn from noise"
    )

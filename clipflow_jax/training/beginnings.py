"""What a stage begins with that other runs have learned: `config.init_from`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import distributed
from clipflow_jax.training import adapters, checkpoint, state
from clipflow_jax.training.state import Params

log = logging.getLogger(__name__)


def load(config: ConfigDict, names: tuple[str, ...] = ()) -> list[checkpoint.Restored]:
  """What `config.init_from` names, in its order: of each state the parts `names`, as `checkpoint.load`."""
  return [checkpoint.load(path.strip(), names) for path in config.init_from.split(",") if path.strip()]


def take(
  ours: Params, starts: Sequence[checkpoint.Restored], shardings: Params, scales: Mapping[str, float]
) -> dict[str, jax.Array]:
  """{path: array} of the parameters that other runs have at our path and shape, of the first that has each.

  In the dtype in which they were kept: on the devices they take no more room than there. What was taken and left is
  logged. UserError where it is nothing, or where what shall stay frozen is there in another shape.
  """
  flat, places = state.flatten(ours), state.flatten(shardings)
  taken: dict[str, jax.Array] = {}
  others: dict[str, tuple[int, ...]] = {}  # {path: shape} of what is there in another shape
  for start in starts:
    theirs = state.flatten(adapters.plain(start))
    new = {
      path: distributed.place(np.asarray(theirs[path]), places[path])
      for path, leaf in flat.items()
      if path in theirs and path not in taken and theirs[path].shape == leaf.shape
    }
    taken |= new
    others |= {path: np.shape(theirs[path]) for path in flat.keys() & theirs.keys() - taken.keys()}
    log.info("init_from step %d: took %d parameters of %d", start.step, len(new), len(flat))
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

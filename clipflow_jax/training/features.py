"""Cached features of a run's tower: where they meet the config, the checkpoint and the training state."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.data import feature_cache, mixture
from clipflow_jax.data.feature_cache import FeatureSource
from clipflow_jax.data.feature_statistics import Statistics
from clipflow_jax.errors import UserError
from clipflow_jax.models.vision import VisionTower
from clipflow_jax.training import checkpoint, stages, state
from clipflow_jax.training.state import Params

TOWER = "clip_model/vision_tower/"


def cache(
  config: ConfigDict, workdir: Path, output: Path, *, dtype: str = "bfloat16", count: int = 0, rows: int = 64
) -> dict[str, Any]:
  """Writes what the tower of the run in `workdir` sees of the pictures of `config.data` into `output`.

  Returns the manifest. The other arguments are those of `feature_cache.write`, as are the errors. All processes of a
  run call this, inside `distributed.joined`.
  """
  path = stages.newest(workdir)
  read = checkpoint.load(path, ("frozen", "averaged"))
  flat: Params = {name: leaf for part in read.state.values() for name, leaf in state.flatten(part or {}).items()}
  params = state.nest({name.removeprefix(TOWER): leaf for name, leaf in flat.items() if name.startswith(TOWER)})
  if not params:
    raise UserError(f"{workdir} has no vision tower: train one with configs/contrastive.py, or import one")
  measured = of_run(flat)
  fields = config.model.clip.vision.to_dict()
  return feature_cache.write(
    VisionTower(
      **fields, kernel=config.model.get("kernel", "xla"), dtype=jnp.dtype(config.model.get("dtype", "float32"))
    ),
    params,
    config.model.get("whiten", 0.0) if measured is None else measured,
    {part.name: part.source for part in mixture.make(config.data.source, "train")},
    output,
    of={"run": str(path), "step": read.step, "source": json.loads(config.data.to_json_best_effort())["source"]},
    dtype=dtype,
    count=count,
    rows=rows,
    max_bad_fraction=config.data.max_bad_fraction,
  )


def of_run(flat: Params) -> Statistics | None:
  """The statistics among a run's parameters by path; None where they were never measured."""
  names = {field.name for field in dataclasses.fields(Statistics)}
  found = {name: np.asarray(flat[f"statistics/{name}"]) for name in names if f"statistics/{name}" in flat}
  return Statistics(**found) if "mean" in found and found["mean"].any() else None


def check(features: FeatureSource, aside: Params, frozen: Params) -> None:
  """UserError unless the features are what a run would make of pictures itself.

  aside: the run's frozen parameters that the step does not use, on the host; frozen: all of them by path.
  """
  path, request = features.folder, features.manifest["request"]
  if "vision_tower" not in aside.get("clip_model", {}):
    raise UserError("config.train must freeze clip_model: with data.features the tower sees nothing to learn from")
  if feature_cache.fingerprint(aside["clip_model"]["vision_tower"]) != request["tower"]:
    raise UserError(f"the features in {path} are of another tower than this run's: set init_from={request['run']}")
  ours, theirs = of_run(frozen), features.statistics
  same = ours is None or all(np.array_equal(array, theirs.arrays().get(name)) for name, array in ours.arrays().items())
  if not same or (theirs.whitening is not None) != ("statistics/whitening" in frozen):
    raise UserError(f"the features in {path} are not standardised as this run's: cache them from what init_from names")

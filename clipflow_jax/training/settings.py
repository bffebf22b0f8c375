"""Which settings make a run, and in which the config of one that goes on differs from what it had."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import checkpoint
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.optimizer import Optimizer

log = logging.getLogger(__name__)

# The least that settings may be; 0 is never, but for a checkpoint at the last step.
LEAST = {
  "steps": 1,
  "accumulate": 1,
  "data.batch_size": 1,
  "keep": 1,
  "keep_every": 0,
  "log_every": 1,
  "checkpoint_every": 0,
  "sample_every": 0,
  "held_out.every": 0,
  "held_out.batches": 1,
  "measure_features": 0,
  "profile.first": 0,
  "profile.steps": 0,
  "hang_timeout": 0,
}


def check(config: ConfigDict) -> None:
  """UserError for settings that make no run, as far as they tell by themselves."""
  settings = dict(_leaves(config.to_dict()))
  for name, least in LEAST.items():
    if settings[name] < least:
      raise UserError(f"{name} is {settings[name]}: give {least} or more")
  if not 0 <= config.ema < 1:
    raise UserError(f"ema is {config.ema}: give the average's decay a step, from 0 for none to less than 1")
  if config.keep_every and not (config.checkpoint_every and config.keep_every % config.checkpoint_every == 0):
    raise UserError(
      f"keep_every is {config.keep_every}: give a multiple of checkpoint_every, which is {config.checkpoint_every}"
    )
  if config.held_out.every and config.data.get("features"):
    raise UserError("held_out.every: data.features holds no test split, only what is trained on; set held_out.every=0")
  Objective(**config.objective)
  Adapters(**config.adapters)
  Optimizer(steps=config.steps, **config.optimizer)


class Change(NamedTuple):
  """A setting of two configs that differs; "-" where one of the two has no such key."""

  key: str
  there: str
  here: str


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
  """The settings of two configs, as JSON, that differ, but for the file that they come from."""
  old, new = (dict(_leaves(fields)) for fields in (there, here))
  keys = [key for key in sorted(old | new) if key != "file" and old.get(key, "-") != new.get(key, "-")]
  return [Change(key, *(json.dumps(of[key]) if key in of else "-" for of in (old, new))) for key in keys]


def _leaves(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
  """("data.source.kind", value) of every leaf."""
  for key, value in fields.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{before}{key}.")
    else:
      yield f"{before}{key}", value


def compare(config: ConfigDict, workdir: Path) -> None:
  """Names what a run that goes on has been set otherwise than its checkpoint. UserError for another seed or stage."""
  found = changes(checkpoint.described(workdir)["config"], json.loads(config.to_json_best_effort()))
  for change in found:
    if change.key in ("seed", "name"):
      raise UserError(
        f"the run in {workdir} has {change.key} {change.there}, not {change.here}: keep it, or use another workdir"
      )
  if found:
    named = ", ".join(f"{change.key} {change.here} (there {change.there})" for change in found)
    log.warning("the config differs from the checkpoint's: %s", named)

"""Every config makes a model and a step: found by their shapes alone, nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import NAMES, Objective
from clipflow_jax.parallel import sharding
from clipflow_jax.training import optimizer, program, state, step
from tests import tiny

VOCABULARY = 1024
FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


def stages() -> dict[str, ConfigDict]:
  """Each config, and each stage of those that have several."""
  found = {}
  for name in FILES:
    module = importlib.import_module(f"configs.{name}")
    if not hasattr(module, "get_config"):  # what configs are made of
      continue
    config = module.get_config()
    if "tasks" in config or "ways" in config:  # what is measured or timed, not what is trained
      continue
    if "order" in config:
      found |= {f"{name}/{stage}": config.stages[stage] for stage in config.order}
    else:
      found[name] = config
  return dict(sorted(found.items()))


STAGES = stages()


@dataclasses.dataclass(frozen=True)
class Traced:
  """What one config makes, by shape."""

  params: Any
  before: state.TrainState
  after: state.TrainState
  metrics: dict[str, jax.ShapeDtypeStruct]


@functools.cache
def trace(name: str) -> Traced:
  config = STAGES[name]
  model = ClipFlow(**with_vocabulary(config.model.to_dict(), VOCABULARY))
  batch = program.abstract_batch(config, model)
  init = functools.partial(model.init, method="everything")
  params = jax.eval_shape(init, jax.random.key(0), batch)["params"]
  scales = state.multipliers(params, config.train)
  tx = optimizer.Optimizer(steps=config.steps, **config.optimizer).make(scales)
  create = functools.partial(state.create, scales=scales, tx=tx, ema=config.ema > 0)
  before = jax.eval_shape(create, params)
  pure = step.make(model, Objective(**config.objective), tx, seed=0, ema=config.ema, accumulate=config.accumulate)
  return Traced(params, before, *jax.eval_shape(pure, before, batch))


def traced(name: str) -> Traced:
  """Traced once for all configs that say the same."""
  text = STAGES[name].to_json_best_effort()
  first = next(other for other in STAGES if STAGES[other].to_json_best_effort() == text)
  return trace(first)


def test_there_are_configs():
  """Of every way to train, alone and in runs of several stages that learn all that a whole model can."""
  assert {"contrastive", "understanding", "decoder", "generation", "joint"} <= STAGES.keys()
  for run in ("quickstart", "folder"):
    weights = [config.objective.weights for name, config in STAGES.items() if name.startswith(f"{run}/")]
    assert len(weights) > 1
    learned = {name for of_stage in weights for name, weight in of_stage.items() if weight}
    assert {"contrastive", "language", "flow", "pixels"} <= learned <= set(NAMES)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_changes_no_shape_and_no_type(name: str):
  before, after = traced(name).before, traced(name).after
  assert jax.tree.structure(before) == jax.tree.structure(after)
  jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), before, after)


@pytest.mark.parametrize("name", STAGES)
def test_metrics_are_scalars_in_float32(name: str):
  metrics = traced(name).metrics
  weights = {key for key, weight in STAGES[name].objective.weights.items() if weight}
  assert {"loss", "gradient_norm", "skipped"} | weights <= metrics.keys()
  assert {(metric.shape, metric.dtype) for metric in metrics.values()} == {((), jnp.dtype(jnp.float32))}


@pytest.mark.parametrize("name", STAGES)
def test_something_is_trained_and_the_rest_is_frozen_without_moments(name: str):
  config, before = STAGES[name], traced(name).before
  trained, frozen = state.flatten(before.trained), state.flatten(before.frozen)
  assert trained and not trained.keys() & frozen.keys()
  assert trained.keys() | frozen.keys() == state.flatten(traced(name).params).keys()
  assert (before.ema is not None) == (config.ema > 0)
  moments = jax.tree_util.tree_flatten_with_path(before.opt_state)[0]
  paths = {"/".join(str(key.key) for key in path if hasattr(key, "key")) for path, _ in moments}
  assert not any(path.endswith(tuple(frozen)) for path in paths if path)


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_matches_one_row_of_each_table_and_no_row_of_train_is_dead(name: str):
  flat = state.flatten(traced(name).params)
  for path, leaf in flat.items():
    assert leaf.dtype == jnp.float32
    sharding.parameter_axes(path, leaf.ndim)
  rows = [pattern for pattern, _ in STAGES[name].train]
  hit = {sharding.match_once(path, rows, "train table") for path in flat}
  assert [pattern for i, pattern in enumerate(rows) if i not in hit] == []


def test_no_row_of_the_sharding_table_is_dead():
  """Every row has a parameter of some config, or of a model with every optional part."""
  tower = dict(has_class=True, has_mask=True, layer_scale=True, in_norm=True, pooling="attention")
  fields = tiny.FIELDS | dict(
    clip=tiny.FIELDS["clip"] | dict(vision=tiny.FIELDS["clip"]["vision"] | tower),
    transformer=tiny.FIELDS["transformer"] | dict(tie_embeddings=False),
    pixel_decoder=tiny.FIELDS["pixel_decoder"] | dict(flow=True),
  )
  init = functools.partial(ClipFlow(**fields).init, method="everything")
  optional = jax.eval_shape(init, jax.random.key(0), tiny.batch())["params"]
  paths = set(state.flatten(optional)).union(*(state.flatten(traced(name).params) for name in STAGES))
  rows = [pattern for pattern, _ in sharding.PARAMETERS]
  hit = {sharding.match_once(path, rows, "sharding table") for path in paths}
  assert [pattern for i, pattern in enumerate(rows) if i not in hit] == []

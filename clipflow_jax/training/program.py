"""The step that a config makes, by shape alone: traced, counted and compiled without a number in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from clipflow_jax.batch import Batch
from clipflow_jax.data import feature_cache
from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import sharding
from clipflow_jax.training import flops, optimizer, state, step
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.hardware import GIB

O0 = 9  # the least of XLA's effort levels, by its number


def abstract_batch(config: ConfigDict, model: ClipFlow) -> Batch:
  """The batch that the config's data makes of pictures, by shape."""
  size = model.clip["vision"]["image_size"]
  b, s, n = config.data.batch_size, config.data.length, config.data.images_per_row

  def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  return Batch(
    tokens=of(b, s),
    segments=of(b, s),
    order=of(b, s),
    positions=of(b, s, 3),
    loss_weights=of(b, s, dtype=jnp.float32),
    image_index=of(b, s),
    image_roles=of(b, n),
    image_segments=of(b, n),
    image_order=of(b, n),
    image_positions=of(b, n),
    images=of(b, n, size, size, 3, dtype=jnp.uint8),
  )


@dataclasses.dataclass(frozen=True)
class Program:
  """The step of a config on a mesh, by shape alone: what `training.loop` compiles."""

  pure: Callable
  state: state.TrainState  # of ShapeDtypeStructs with shardings
  batch: Batch  # likewise
  offload: str = ""  # of `optimizer.Optimizer`

  @classmethod
  def of(cls, config: ConfigDict, mesh: Any, learns: bool = True) -> Program:
    """mesh: concrete or abstract. learns False leaves the optimizer's work out. UserError without data.features."""
    model = ClipFlow(**with_vocabulary(config.model.to_dict(), config.tokenizer.vocabulary))
    batch = abstract_batch(config, model)
    objective = Objective(**config.objective)
    params = jax.eval_shape(lambda rows: model.init(jax.random.key(0), rows, method="everything"), batch)["params"]
    adapters = Adapters(**config.adapters)
    params = jax.eval_shape(functools.partial(adapters.fit, seed=config.seed), params)
    scales = state.multipliers(params, config.train)
    tx = optimizer.Optimizer(steps=config.steps, **config.optimizer).make(scales)
    tx = tx if learns else optimizer.skip_nonfinite(optax.set_to_zero())
    kept = dict(ema=config.ema > 0, frozen_dtype=config.frozen_dtype)
    shapes = jax.eval_shape(functools.partial(state.create, scales=scales, tx=tx, **kept), params)
    adapted = adapters.around(model)
    pure = step.make(adapted, objective, tx, seed=config.seed, ema=config.ema, accumulate=config.accumulate)
    if config.data.features:  # as the loop does: the tower waits in the host's memory
      feature_cache.manifest(Path(config.data.features))
      seen = (*batch.image_roles.shape, *model.feature_shape)
      batch = dataclasses.replace(batch, images=None, features=jax.ShapeDtypeStruct(seen, jnp.bfloat16))
      shapes, _ = state.set_aside(shapes, ("clip_model",))
    return cls(pure, shapes, batch, config.optimizer.get("offload", "")).on(mesh)

  def on(self, mesh: jax.sharding.Mesh) -> Program:
    """The same step with its state and batch on another mesh, traced no second time."""
    placed = (state.shardings(self.state, mesh, self.offload), sharding.of_batch(self.batch, mesh))

    def put(leaf, place):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    pairs = zip((self.state, self.batch), placed, strict=True)
    now, batch = (jax.tree.map(put, *pair) for pair in pairs)
    return dataclasses.replace(self, state=now, batch=batch)

  def flops(self) -> int:
    """Of the matrix products of all devices together, in one step."""
    return flops.count(self.pure, self.state, self.batch)

  def compile(self, quick: bool = False) -> jax.stages.Compiled:
    """quick: with the compiler's least effort, which takes a fifth of the time for a step that is somewhat slower."""
    places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    lowered = jax.jit(self.pure, out_shardings=(places, None), donate_argnums=0).lower(self.state, self.batch)
    effort: Any = {"optimization_level": O0} if quick else None
    return lowered.compile(effort)

  def memory(self) -> dict[str, float]:
    """Bytes per device of what lives in its memory from step to step, by kind."""
    now = self.state
    kinds = {"trained": now.trained, "average": now.ema, "moments": now.opt_state, "frozen": now.frozen}
    kinds["batch"] = self.batch
    return {
      kind: float(sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree) if not _in_host(leaf)))
      for kind, tree in kinds.items()
    }

  def host_memory(self) -> float:
    """Bytes per device of what lives in the host's memory, by optimizer.offload."""
    return float(sum(_local_bytes(leaf) for leaf in jax.tree.leaves(self.state) if _in_host(leaf)))

  def largest(self, count: int = 8) -> list[str]:
    """The largest arrays of the state on a device, as "GiB shape name"."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves_with_path(self.state) if not _in_host(leaf[1])]
    leaves = sorted(leaves, key=lambda leaf: -_local_bytes(leaf[1]))[:count]
    return [f"{_local_bytes(a) / GIB:.3f} GiB {a.dtype}{list(a.shape)} {jax.tree_util.keystr(k)}" for k, a in leaves]


def with_model(config: ConfigDict, **values: Any) -> ConfigDict:
  """A copy of a stage's config, its model `with_values`."""
  return ConfigDict(config.to_dict() | dict(model=with_values(config.model.to_dict(), **values)))


def with_values(fields: dict[str, Any], **values: Any) -> dict[str, Any]:
  """Model fields with every key of `values` that they have set to its value, at any depth."""
  return {
    key: with_values(value, **values) if isinstance(value, dict) else values.get(key, value)
    for key, value in fields.items()
  }


def _in_host(leaf: jax.ShapeDtypeStruct) -> bool:
  return leaf.sharding.memory_kind == state.HOST


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

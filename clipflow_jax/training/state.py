"""What a run is between two steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import sharding

Params = dict[str, Any]
HOST = "pinned_host"  # the host's memory that devices copy from and to by themselves


@flax.struct.dataclass
class TrainState:
  """Parameters are kept in two trees, together the model's: frozen ones have no moments, no average, no gradient."""

  step: Any  # i32[]; in a tree of shardings every field holds its sharding
  trained: Params
  frozen: Params
  ema: Params | None  # average of `trained`, or None
  opt_state: Any

  @property
  def params(self) -> Params:
    """All parameters, as trained."""
    return merge(self.trained, self.frozen)

  @property
  def averaged(self) -> Params:
    """All parameters, with the average in place of what is trained: what is evaluated and drawn with."""
    return merge(self.trained if self.ema is None else self.ema, self.frozen)


def flatten(params: Params) -> dict[str, Any]:
  """Nested parameters -> {"a/b/kernel": leaf}."""
  return flax.traverse_util.flatten_dict(params, sep="/")


def nest(flat: dict[str, Any]) -> Params:
  """Inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def merge(a: Params, b: Params) -> Params:
  """One tree of two that share no leaf."""
  return nest(flatten(a) | flatten(b))


def multipliers(params: Params, table: tuple[tuple[str, float], ...]) -> dict[str, float]:
  """{path: learning-rate multiplier} by a table of (regex, multiplier).

  UserError unless one row matches each path, and one path learns, and for a multiplier that is no number from 0.
  """
  for pattern, scale in table:
    if not (isinstance(scale, int | float) and 0 <= scale < math.inf):
      raise UserError(f"config.train gives {pattern!r} the multiplier {scale!r}: give a number from 0")
  patterns = [pattern for pattern, _ in table]
  scales = {path: table[sharding.match_once(path, patterns, "config.train")][1] for path in flatten(params)}
  if not any(scales.values()):
    raise UserError("config.train trains nothing: give a row that matches a parameter a multiplier other than 0")
  return scales


def split(params: Params, scales: dict[str, float]) -> tuple[Params, Params]:
  """(trained, frozen): a multiplier of 0 freezes."""
  flat = flatten(params)
  trained = {path: leaf for path, leaf in flat.items() if scales[path]}
  return nest(trained), nest({path: leaf for path, leaf in flat.items() if path not in trained})


def create(
  params: Params,
  scales: dict[str, float],
  tx: optax.GradientTransformation,
  *,
  ema: bool,
  frozen_dtype: str = "float32",
) -> TrainState:
  """The state at step 0. Pure: run it under jit with `shardings`' result as out_shardings.

  frozen_dtype: "float32" or "bfloat16", of frozen matrices and embeddings: what a model that computes in bfloat16 casts
  them to anyway. Norms, biases and measured statistics stay float32. UserError for another.
  """
  if frozen_dtype not in ("float32", "bfloat16"):
    raise UserError(f"frozen_dtype {frozen_dtype!r} is unknown; choose float32 or bfloat16")
  trained, frozen = split(params, scales)
  frozen = matrices_in(frozen, frozen_dtype)
  copy = jax.tree.map(jnp.copy, trained) if ema else None  # its own buffers: both are donated
  return TrainState(jnp.zeros((), jnp.int32), trained, frozen, copy, tx.init(trained))


def matrices_in(params: Params, dtype: str) -> Params:
  """The parameters with matrices and embeddings in that dtype; norms, biases and measured statistics as they are."""
  flat = flatten(params)
  return nest({p: leaf.astype(dtype) if p.endswith(("kernel", "embedding")) else leaf for p, leaf in flat.items()})


def set_aside(state: TrainState, parts: Iterable[str]) -> tuple[TrainState, Params]:
  """(the state without those frozen top-level parts, these): of arrays, of shapes or of shardings."""
  kept = {name: part for name, part in state.frozen.items() if name not in parts}
  return dataclasses.replace(state, frozen=kept), {k: v for k, v in state.frozen.items() if k not in kept}


def taken_back(state: TrainState, aside: Params) -> TrainState:
  """Inverse of `set_aside`."""
  return dataclasses.replace(state, frozen=state.frozen | aside)


def shardings(state: TrainState, mesh: jax.sharding.Mesh, offload: str = "") -> TrainState:
  """A NamedSharding for each leaf of an abstract state: moments and averages follow their parameter.

  offload: of `optimizer.Optimizer`: "host" puts moments into the host's memory. UserError where devices reach none.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  of_trained = flatten(sharding.of_parameters(state.trained, mesh))
  shapes = {path: leaf.shape for path, leaf in flatten(state.trained).items()}
  of_moments = of_trained
  if offload:
    if isinstance(mesh, jax.sharding.Mesh):  # an abstract one has no devices to ask
      kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
      if HOST not in kinds:
        raise UserError(f"optimizer.offload=host: these devices reach {', '.join(kinds)}, and no {HOST}; leave it out")
    of_moments = {path: place.with_memory_kind(HOST) for path, place in of_trained.items()}

  def moment(key_path, leaf):
    names = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
    names = names[names[:1] in (["muon"], ["adam"]) :]  # optax's Muon keeps what it leaves to Adam apart, by name
    path = "/".join(names)
    if path in shapes and leaf.shape != shapes[path]:
      raise UserError(f"a moment of {path!r} has shape {leaf.shape}, its parameter {shapes[path]}: no rule places it")
    return of_moments.get(path, replicated)

  return TrainState(
    step=replicated,
    trained=nest(of_trained),
    frozen=sharding.of_parameters(state.frozen, mesh),
    ema=None if state.ema is None else nest(of_trained),
    opt_state=jax.tree_util.tree_map_with_path(moment, state.opt_state),
  )

"""The two tables that say where all lives: parameter path -> logical axes, logical axis -> mesh axes."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import NamedSharding, PartitionSpec

from clipflow_jax.errors import UserError
from clipflow_jax.parallel.mesh import AXES

# Every parameter path must match exactly one row. Paths with a "layers" part are stacked by nn.scan: their
# first axis is the layer.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r".*/(query|key|value)/kernel", ("embed", "heads")),
  (r".*/(query|key|value)/bias", ("heads",)),
  (r".*/attention/out/kernel", ("heads", "embed")),
  (r".*/(gate|up)/kernel", ("embed", "mlp")),
  (r".*/(gate|up)/bias", ("mlp",)),
  (r".*/down/kernel", ("mlp", "embed")),
  (r".*/(attention/out|down)/bias", (None,)),
  (r".*/embedding", ("vocabulary", "embed")),
  (r"(.*_model/)?head/kernel", ("embed", "vocabulary")),
  (r".*(flow_head|drawer|decoder|readout)/(early_)?head/kernel", ("embed", None)),
  (r".*(flow_head|drawer|decoder|readout)/(early_)?head/bias", (None,)),
  (r"(.*/)?(patches|entry|time_[a-z]+|projection|(image_)?connector)/kernel", (None, "embed")),
  (r".*drawer/(.*/)?(condition_hidden|condition_out|(out_)?modulation)/kernel", (None, "embed")),
  (r"(.*/)?(patches|entry|time_[a-z]+|projection|(image_)?connector)/bias", (None,)),
  (r".*drawer/(.*/)?(condition_hidden|condition_out|(out_)?modulation)/bias", (None,)),
  (r"(.*/)?((row|column|place)_positions|queries)", (None, "embed")),
  (r"(.*/)?logit_(scale|bias)", ()),
  (r"(.*/)?(class_token|mask_token|attention_scale|mlp_scale|head_gates)", (None,)),
  (r".*/probe", (None, None)),
  (r"(.*/)?\w*norm/(scale|bias)", (None,)),
  (r"statistics/(mean|std|whitening)", (None, None)),
  (r"statistics/common", ()),
)

# What `training.adapters` makes of a kernel: which of the kernel's two axes are its own, too.
MADE: dict[str, tuple[bool, bool]] = {
  "_lora_a": (True, False),
  "_lora_b": (False, True),
  "/codes": (True, True),
  "/scale": (False, True),
}

LOGICAL: dict[str, tuple[str, ...]] = {
  "batch": ("slice", "data", "fsdp"),
  "rows": ("slice", "data", "fsdp", "context"),  # of short sequences, kept whole: pictures, captions, noisy blocks
  "sequence": ("context",),
  "replicas": ("slice", "data"),  # the batch's, of what has "embed" as well
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocabulary": ("tensor",),
  "layers": (),
}


def spec(*logical: str | None) -> PartitionSpec:
  """The PartitionSpec of logical axis names (None: not sharded).

  UserError names an unknown logical or mesh axis, and two logical axes of one array on one mesh axis.
  """
  owner: dict[str, str] = {}
  for name in logical:
    if name is None:
      continue
    if name not in LOGICAL:
      raise UserError(f"logical axis {name!r} is unknown; the axes are {', '.join(LOGICAL)}")
    for axis in LOGICAL[name]:
      if axis not in AXES:
        raise UserError(f"logical axis {name!r} lies on {axis!r}, which is no mesh axis; those are {', '.join(AXES)}")
      if axis in owner:
        raise UserError(f"logical axes {owner[axis]!r} and {name!r} of one array both lie on mesh axis {axis!r}")
      owner[axis] = name
  return PartitionSpec(*(LOGICAL[name] or None if name is not None else None for name in logical))


def check(what: str, shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: Any) -> None:
  """UserError unless `mesh` (concrete or abstract) divides every axis of an array of that shape."""
  for i, name in enumerate(logical):
    axes = [axis for axis in LOGICAL[name] if mesh.shape[axis] > 1] if name else []
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if shape[i] % parts:
      sizes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
      raise UserError(
        f"{what} has shape {shape}: its axis {i}, {name!r}, of {shape[i]} cannot be cut into {parts} equal parts "
        f"(mesh {sizes}); change that size or the mesh"
      )


def on_mesh() -> bool:
  """Whether a mesh of several devices is in force."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def shard(x: jax.Array, *logical: str | None) -> jax.Array:
  """Constrains x to its logical axes on the mesh in force (`jax.set_mesh`); a no-op on one device.

  Axes not named are not sharded. UserError as `spec` and `check`.
  """
  places = spec(*logical, *[None] * (x.ndim - len(logical)))  # a typo is an error on one device too
  if not on_mesh():
    return x
  check("an activation", x.shape, logical, jax.sharding.get_abstract_mesh())
  return jax.lax.with_sharding_constraint(x, places)


def unconstrained() -> contextlib.AbstractContextManager:
  """A scope where `shard` does nothing: arrays lie as their parameters make them, in whatever number they come."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def match_once(path: str, patterns: list[str], what: str) -> int:
  """The index of the one pattern that matches `path` fully. UserError when none or several do."""
  hits = [i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, path)]
  if len(hits) != 1:
    found = ", ".join(repr(patterns[i]) for i in hits) or "no row"
    raise UserError(f"{what}: parameter {path!r} must match exactly one row, but matches {found}")
  return hits[0]


def parameter_axes(path: str, ndim: int) -> tuple[str | None, ...]:
  """Logical axes of the parameter at `path` ("a/b/kernel") with ndim axes, from PARAMETERS."""
  made = next((ending for ending in MADE if path.endswith(f"/kernel{ending}")), "")
  axes = PARAMETERS[match_once(path.removesuffix(made), [p for p, _ in PARAMETERS], "sharding table")][1]
  if made:
    axes = tuple(axis if own else None for axis, own in zip(axes, MADE[made], strict=True))
  if "layers" in path:
    axes = ("layers", *axes)
  if len(axes) != ndim:
    raise UserError(f"sharding table: parameter {path!r} has {ndim} axes, its row has {len(axes)}: {axes}")
  return axes


def of_parameters(params: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of a nested dict of parameters (arrays or ShapeDtypeStructs)."""

  def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
    axes = parameter_axes(path, len(shape))
    check(f"parameter {path!r}", shape, axes, mesh)
    return NamedSharding(mesh, spec(*axes))

  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return flax.traverse_util.unflatten_dict({path: place(path, leaf.shape) for path, leaf in flat.items()}, sep="/")


def of_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of a Batch: rows over the batch axes."""
  check("data.batch_size: a batch's tokens", batch.tokens.shape, ("batch",), mesh)
  return jax.tree.map(lambda _: NamedSharding(mesh, spec("batch")), batch)

"""The two tables that say where all lives: parameter path -> logical axes, logical axis -> mesh axes."""

from __future__ import annotations

import re
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import NamedSharding, PartitionSpec

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
  (r".*(flow_head|decoder|readout)/(early_)?head/kernel", ("embed", None)),
  (r".*(flow_head|decoder|readout)/(early_)?head/bias", (None,)),
  (r"(.*/)?(patches|entry|time_[a-z]+|projection|(image_)?connector)/kernel", (None, "embed")),
  (r"(.*/)?(patches|entry|time_[a-z]+|projection|(image_)?connector)/bias", (None,)),
  (r"(.*/)?(row|column|place)_positions", (None, "embed")),
  (r"(.*/)?logit_scale", ()),
  (r"(.*/)?\w*norm/(scale|bias)", (None,)),
  (r"statistics/(mean|std)", (None, None)),
)

LOGICAL: dict[str, tuple[str, ...]] = {
  "batch": ("slice", "data", "fsdp"),
  "sequence": ("context",),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocabulary": ("tensor",),
  "layers": (),
}


def spec(*logical: str | None) -> PartitionSpec:
  """The PartitionSpec of logical axis names (None: not sharded). KeyError names an unknown one."""
  for name in logical:
    if name is not None and name not in LOGICAL:
      raise KeyError(f"logical axis {name!r} is unknown; the axes are {', '.join(LOGICAL)}")
  return PartitionSpec(*(LOGICAL[name] or None if name is not None else None for name in logical))


def shard(x: jax.Array, *logical: str | None) -> jax.Array:
  """Constrains x to its logical axes on the mesh in force (`jax.set_mesh`); a no-op on one device."""
  places = spec(*logical, *[None] * (x.ndim - len(logical)))  # a typo is an error on one device too
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, places)


def match_once(path: str, patterns: list[str], what: str) -> int:
  """The index of the one pattern that matches `path` fully. ValueError when none or several do."""
  hits = [i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, path)]
  if len(hits) != 1:
    found = ", ".join(repr(patterns[i]) for i in hits) or "no row"
    raise ValueError(f"{what}: parameter {path!r} must match exactly one row, but matches {found}")
  return hits[0]


def parameter_axes(path: str, ndim: int) -> tuple[str | None, ...]:
  """Logical axes of the parameter at `path` ("a/b/kernel") with ndim axes, from PARAMETERS."""
  axes = PARAMETERS[match_once(path, [p for p, _ in PARAMETERS], "sharding table")][1]
  if "layers" in path:
    axes = ("layers", *axes)
  if len(axes) != ndim:
    raise ValueError(f"sharding table: parameter {path!r} has {ndim} axes, its row has {len(axes)}: {axes}")
  return axes


def of_parameters(params: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of a nested dict of parameters (arrays or ShapeDtypeStructs)."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  shardings = {path: NamedSharding(mesh, spec(*parameter_axes(path, leaf.ndim))) for path, leaf in flat.items()}
  return flax.traverse_util.unflatten_dict(shardings, sep="/")


def of_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of a Batch: rows over the batch axes."""
  return jax.tree.map(lambda _: NamedSharding(mesh, spec("batch")), batch)

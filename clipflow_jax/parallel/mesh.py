"""The device mesh from a config: five axes, always all present."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from clipflow_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor")


def make(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
  """A mesh of all devices with `AXES` in order; an axis not named has size 1, one may be -1: what is left.

  Axes are Auto: linen's constraints are hints to the partitioner, which Explicit axes turn into assertions.
  """
  unknown = set(sizes) - set(AXES)
  if unknown:
    raise UserError(f"mesh axis {sorted(unknown)[0]!r} is unknown; the axes are {', '.join(AXES)}")
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  devices = jax.device_count()
  if shape.count(-1) == 1:
    rest = math.prod(s for s in shape if s != -1)
    shape[shape.index(-1)] = devices // max(rest, 1)  # a size of 0 is refused below
  if math.prod(shape) != devices or min(shape) < 1:
    wanted = ", ".join(f"{a}={s}" for a, s in zip(AXES, shape, strict=True))
    raise UserError(f"mesh ({wanted}) does not fit {devices} device(s); set one axis to -1 to take what is left")
  return jax.make_mesh(tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))

"""The device mesh from a config: five axes, always all present."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils

from clipflow_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor")
# Linen's constraints are hints to the partitioner, which Explicit axes turn into assertions.
TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)
SPLIT = True  # an axis of 64 on 16 x 16 x 16 chips takes 16 along one side and 4 along the next


def make(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh of `devices` (all of them by default) with `AXES` in order; an axis not named has size 1.

  One axis may be -1: what is left. `slice` is the one axis that crosses the network between TPU slices: each place on
  it is one of theirs. UserError when the sizes do not fit the devices.
  """
  sides = shape(sizes, jax.device_count() if devices is None else len(devices))
  devices = jax.devices() if devices is None else devices
  # Other devices say slice_index too, and mean their host.
  slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
  if len(slices) < 2:
    placed = mesh_utils.create_device_mesh(sides, devices, allow_split_physical_axes=SPLIT)
    return jax.sharding.Mesh(placed, AXES, axis_types=TYPES)
  if sides[0] != len(slices):
    raise UserError(f"the devices are {len(slices)} slices, but mesh axis slice is {sides[0]}; set mesh.slice to it")
  inside, across = [1, *sides[1:]], [sides[0], *[1] * (len(AXES) - 1)]
  placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=SPLIT)
  return jax.sharding.Mesh(placed, AXES, axis_types=TYPES)


def abstract(sizes: Mapping[str, int], count: int) -> jax.sharding.AbstractMesh:
  """The mesh of `count` devices that are not here; UserError as `make`."""
  return jax.sharding.AbstractMesh(shape(sizes, count), AXES, axis_types=TYPES)


def shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
  """How many of `count` devices lie along each of `AXES`; UserError as `make`."""
  unknown = set(sizes) - set(AXES)
  if unknown:
    raise UserError(f"mesh axis {sorted(unknown)[0]!r} is unknown; the axes are {', '.join(AXES)}")
  sides = [int(sizes.get(axis, 1)) for axis in AXES]
  if sides.count(-1) == 1:
    rest = math.prod(side for side in sides if side != -1)
    sides[sides.index(-1)] = count // max(rest, 1)  # a size of 0 is refused below
  if math.prod(sides) != count or min(sides) < 1:
    wanted = ", ".join(f"{a}={s}" for a, s in zip(AXES, sides, strict=True))
    raise UserError(f"mesh ({wanted}) does not fit {count} device(s); set one axis to -1 to take what is left")
  return tuple(sides)

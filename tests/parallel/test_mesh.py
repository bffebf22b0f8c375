from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import mesh
from clipflow_jax.training import plan
from configs import hardware

ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from clipflow_jax.parallel import mesh, sharding
made = mesh.make({"data": 2, "fsdp": -1, "tensor": 2})
assert made.shape == {"slice": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2}, made.shape
assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
with jax.set_mesh(made):
  placed = jax.jit(lambda x: sharding.shard(x, "batch", "sequence"))(jnp.ones((8, 4, 2)))
  assert placed.sharding.shard_shape(placed.shape) == (2, 4, 2), placed.sharding
kernel = sharding.of_parameters({"text": {"layers": {"query": {"kernel": jnp.ones((3, 8, 4))}}}}, made)
assert kernel["text"]["layers"]["query"]["kernel"].spec == P(None, ("fsdp",), ("tensor",))
"""


def test_every_axis_is_there_in_order():
  made = mesh.make({})
  assert made.axis_names == ("slice", "data", "fsdp", "context", "tensor")
  assert made.size == 1


def test_minus_one_takes_what_is_left():
  assert mesh.make({"fsdp": -1}).shape["fsdp"] == jax.device_count()


def test_an_unknown_axis_is_an_error():
  with pytest.raises(UserError, match="'model' is unknown; the axes are slice, data, fsdp, context, tensor"):
    mesh.make({"model": 1})


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 3},
    {"data": 16},
    {"tensor": 3, "fsdp": -1},
    {"tensor": 16, "fsdp": -1},
    {"data": -1, "fsdp": -1},
    {"data": -2, "fsdp": 4},
    {"data": 0, "fsdp": 8},
    {"data": 0, "fsdp": -1},
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_an_error(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  with pytest.raises(UserError, match=r"does not fit 8 device\(s\); set one axis to -1"):
    mesh.make(sizes)


def test_on_several_devices_arrays_are_cut_as_the_tables_say():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  root = Path(__file__).parents[2]
  command = [sys.executable, "-c", ON_EIGHT_DEVICES]
  result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


ON_SLICES = """
import sys
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import plan
from configs import hardware
for name in sys.argv[1:]:
  machine = hardware.make(name)
  made = meshes.make(machine.mesh, plan.devices(machine))
  assert [{chip.slice_index for chip in place.flat} for place in made.devices] == [{0}, {1}], name
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[plan]'")
def test_several_slices_hold_the_mesh_that_is_planned_for_them():
  machines = ["v4:4x4x8:2", "v5e:16x16:2", "v5p:4x4x4:2", "v6e:16x16:2", "tpu7x:4x4x4:2"]
  environment = os.environ | plan.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", ON_SLICES, *machines]
  root = Path(__file__).parents[2]
  result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


@dataclasses.dataclass(frozen=True)
class Chip:
  """What jax asks of a device to place it."""

  id: int
  coords: tuple[int, int, int] = (0, 0, 0)
  platform: str = "tpu"
  device_kind: str = "TPU v5"
  core_on_chip: int = 0
  process_index: int = 0
  slice_index: int = 0


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"data": 2, "fsdp": 8}])
def test_hosts_of_gpus_and_cpus_which_jax_calls_slices_are_none(platform: str, sizes: dict[str, int]):
  devices = [Chip(i, platform=platform, device_kind="", process_index=i // 8, slice_index=i // 8) for i in range(16)]
  made = mesh.make(sizes, devices)
  assert made.shape["slice"] == 1 and list(made.devices.flat) == devices


def test_chips_of_several_slices_want_an_axis_that_crosses_between_them():
  chips = [Chip(i, (i % 4, 0, 0), slice_index=i // 4) for i in range(8)]
  with pytest.raises(UserError, match="2 slices, but mesh axis slice is 1; set mesh.slice"):
    mesh.make({"fsdp": -1}, chips)
  made = mesh.make({"slice": 2, "fsdp": -1}, chips)
  assert [{chip.slice_index for chip in place.flat} for place in made.devices] == [{0}, {1}]


@pytest.mark.parametrize("name", ["v5p-64", "v5p-128", "v5p-512", "v5p-4096", "v5p-8192"])
def test_every_pod_holds_its_mesh_with_each_axis_in_a_box_of_neighbours(name: str):
  chips = hardware.make(name)
  places = itertools.product(*map(range, chips.topology))
  made = mesh.make(chips.mesh, [Chip(i, place) for i, place in enumerate(places)])
  assert made.size == chips.chips
  row = made.devices.reshape(-1, made.shape["fsdp"])[0]
  sides = np.ptp([chip.coords for chip in row], axis=0) + 1
  assert math.prod(sides) == len(row)

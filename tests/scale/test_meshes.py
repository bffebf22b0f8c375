"""The same step on one device and on eight, cut in every way that the mesh has."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipflow_jax.parallel import sharding
from tests.scale import stages
from tests.scale.eight_devices import MESHES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CUT = [name for name, sizes in MESHES.items() if sizes]
LARGE = 64 * 1024


def on_eight(module: str, *arguments: str) -> Any:
  """What the module prints in a process with eight devices."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  command = [sys.executable, "-m", f"tests.scale.{module}", *arguments]
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout)


@functools.cache
def report(stage: str) -> dict[str, Any]:
  """What was found of a stage on every mesh."""
  return on_eight("eight_devices", stage)[stage]


def parameter(place: str) -> str:
  """The parameter's path "a/b/kernel" in a leaf's place in the state, ".trained['a']['b']['kernel']"."""
  return "/".join(re.findall(r"\['(\w+)'\]", place))


@pytest.mark.parametrize("mesh", CUT)
@pytest.mark.parametrize("stage", stages.STAGES)
def test_the_losses_are_those_of_one_device(stage: str, mesh: str):
  alone, cut = report(stage)["alone"]["losses"], report(stage)[mesh]["losses"]
  assert len(alone) == stages.STEPS and abs(alone[0] - alone[-1]) > 1e-2  # something was learned
  assert cut == pytest.approx(alone, rel=0, abs=1e-5)


@pytest.mark.parametrize("mesh", CUT)
@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_large_leaf_of_the_state_lies_as_the_table_says(stage: str, mesh: str):
  sizes, large = MESHES[mesh], {"trained": 0, "frozen": 0, "ema": 0, "opt_state": 0}
  for place, (shape, part, size) in report(stage)[mesh]["leaves"].items():
    if size <= LARGE:
      continue
    axes = sharding.parameter_axes(parameter(place), len(shape))
    cuts = [math.prod(sizes.get(axis, 1) for axis in sharding.LOGICAL[name]) if name else 1 for name in axes]
    assert part == [length // cut for length, cut in zip(shape, cuts)], place
    assert math.prod(cuts) > 1 or sizes == dict(data=8), f"{place} is whole on every device"
    large[place.split("[")[0].split(".")[1]] += 1
  assert large["ema"] == large["trained"] > 0 and large["opt_state"] == 2 * large["trained"]  # two moments each


@pytest.mark.parametrize("mesh", CUT)
@pytest.mark.parametrize("stage", stages.STAGES)
def test_activations_are_constrained_in_the_program(stage: str, mesh: str):
  found = report(stage)[mesh]
  assert found["constraints"] >= 8 and report(stage)["alone"]["constraints"] == 0
  assert found["collectives"]["all-reduce"] > 0
  if "fsdp" in mesh:
    assert found["collectives"]["all-gather"] > 0


@pytest.mark.parametrize("stage", ["understanding", "joint"])
def test_the_context_axis_cuts_the_sequence_and_attention_gathers_keys_alone(stage: str):
  shapes = report(stage)["2 data 2 context 2 tensor"]["shapes"]
  rows, half, width, mlp = stages.ROWS // 2, stages.LENGTH // 2, stages.WIDTH, stages.MLP // 2
  assert f"f32[{rows},{half},{width}]" in shapes and f"f32[{rows},{half},{mlp}]" in shapes
  assert f"f32[{rows},{stages.LENGTH},{width}]" not in shapes and f"f32[{rows},{stages.LENGTH},{mlp}]" not in shapes
  head = stages.ATTENTION["head_dim"]
  assert f"f32[{rows},{stages.LENGTH},1,{head}]" in shapes  # keys and values of all slots, of a chip's own head


def test_flash_attention_is_the_same_where_rows_slots_and_heads_are_cut():
  assert max(on_eight("flash_attention")) < 1e-4

"""The memory of a step on GPUs that are not here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import memory, plan, plan_report, state
from clipflow_jax.training.memory import peak
from clipflow_jax.training.plan import Program
from configs import hardware, presets
from tests import tiny, tiny_runs

KIB = 1024 // 4  # float32 numbers in a KiB


def of(fn, *shapes: int) -> int:
  return peak(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct((size,), jnp.float32) for size in shapes)).jaxpr)


def test_what_is_needed_no_more_is_not_alive():
  assert of(lambda x: jnp.sin(jnp.cos(jnp.exp(x))), KIB) == 2 * 1024  # one is read while the next is written
  assert of(lambda x: (jnp.sin(x), jnp.cos(x)), KIB) == 2 * 1024


def test_a_call_holds_what_it_makes_and_a_loop_what_one_turn_makes():
  assert of(jax.jit(lambda x: jnp.sin(jnp.cos(x))), KIB) == 2 * 1024

  def loop(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(jnp.cos(carry)), carry), x, None, length=8)[1]

  assert of(loop, KIB) == 8 * 1024 + 2 * 1024  # what all turns leave, and one turn


@pytest.fixture(scope="module")
def config() -> ConfigDict:
  config = presets.stage("generation", model=tiny_runs.model(dtype="bfloat16", kernel="cudnn"), steps=10, ema=0.9)
  config.train = presets.trains(flow=1.0)
  config.data.update(tasks=dict(draw=1.0), length=64, batch_size=8)
  config.objective.update(weights=dict(flow=1.0), stop_text=True)
  config.optimizer = dict(name="adamw", learning_rate=1e-3, offload="host")
  config.frozen_dtype = "bfloat16"
  found = hardware.make("h200x8")
  config.hardware = dict(chip=found.chip, topology=found.topology, slices=found.slices)
  config.mesh = found.mesh
  return config


def test_what_lives_from_step_to_step_is_known_to_the_byte(config: ConfigDict):
  """On eight GPUs, although this machine has none; moments that wait in the host's memory are counted there."""
  assert memory.absent(config.hardware)
  report = memory.estimate(config)
  kinds = {name: size * 2**30 for name, size in report["memory_gib"].items()}
  assert report["mesh"]["fsdp"] == 8 and report["fits"] and report["hbm_limit_gib"] == 131.3
  trained = report["parameters"]["trained"]
  assert report["hardware_flops_per_step"] >= report["model_flops_per_step"] > 0  # attention's products among both
  assert 4 * trained / 8 <= kinds["trained"] < 4 * trained / 3  # small leaves lie on all
  assert kinds["average"] == kinds["gradients"] == kinds["trained"] and kinds["moments"] < 100  # counts of steps
  assert report["host_gib"] * 2**30 == pytest.approx(2 * kinds["trained"], rel=0.01)
  assert math.isclose(sum(kinds.values()), report["hbm_per_chip_gib"] * 2**30) and kinds["activations"] > 0
  said = plan_report.text(report)
  assert "not compiled: such GPUs are not here" in said and "  estimated" in said
  assert "  in the host's memory" in said
  assert np.all([line.endswith("exact") for line in said.splitlines() if line.startswith(("  trained", "  frozen"))])


def test_moments_that_are_offloaded_are_in_the_hosts_memory_for_a_compiler_too(config: ConfigDict):
  program = Program.of(plan.with_model(config, kernel="xla"), meshes.make(dict(fsdp=-1)))
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim}
  assert kinds == {state.HOST}
  assert program.memory()["moments"] < 100 and program.host_memory() == 2 * program.memory()["trained"]


def test_cached_features_spare_the_tower(config: ConfigDict, tmp_path: Path):
  seen = plan.with_model(config, kernel="xla")
  cached = seen.copy_and_resolve_references()
  cached.data.features = str(tmp_path)
  mesh = meshes.abstract(config.mesh, 8)
  with pytest.raises(UserError, match="data.features: .* is none"):
    Program.of(cached, mesh)
  (tmp_path / "manifest.json").write_text(json.dumps(dict(request={}, pictures=0, shards={})))
  whole, program = Program.of(seen, mesh), Program.of(cached, mesh)
  assert "clip_model" in whole.state.frozen and "clip_model" not in program.state.frozen
  tokens = (tiny_runs.SIZE // tiny_runs.PATCH) ** 2
  assert program.batch.images is None
  assert program.batch.features.shape == (8, config.data.images_per_row, tokens, tiny.CHANNELS)
  assert program.memory()["frozen"] < whole.memory()["frozen"]
  with jax.sharding.use_abstract_mesh(mesh):
    assert 0 < program.flops() < whole.flops()


def test_model_flops_are_of_the_model_whatever_is_computed_besides(config: ConfigDict):
  again = plan.with_model(config, kernel="splash", remat="full")
  again.optimizer = dict(name="muon")
  mesh = meshes.abstract(config.mesh, 8)
  with jax.sharding.use_abstract_mesh(mesh):
    counts = [plan.model_flops(one, mesh) for one in (config, again)]
    assert counts[0] == counts[1] < Program.of(plan.with_model(again, kernel="xla"), mesh).flops()

"""`clipflow plan`: what it says of a step that it compiles for devices that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax import cli, config_file
from clipflow_jax.errors import UserError
from clipflow_jax.models.text import TextTower
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import hardware, plan, plan_report, state
from clipflow_jax.training.program import Program, with_model
from configs import presets
from tests import tiny, tiny_runs

ROOT = Path(__file__).parents[2]
KEYS = {
  "fits",
  "hbm_per_chip_gib",
  "hbm_limit_gib",
  "model_flops_per_step",
  "hardware_flops_per_step",
  "collective_bytes_per_chip",
  "predicted_step_s",
  "predicted_mfu",
  "images_per_s_per_chip",
  "compile_s",
}
CONFIG = """
from configs import presets
from tests import tiny_runs

def get_config(arg=""):
  config = presets.stage("generation", model=tiny_runs.model(dtype="bfloat16"), steps=10, ema=0.9)
  config.train = presets.trains(flow=1.0)
  config.data.update(tasks=dict(draw=1.0), length=128)
  config.objective.update(weights=dict(flow=1.0), stop_text=True)
  config.optimizer.name = "adamw"
  return presets.scale(config, arg)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
  config = folder / "config.py"
  config.write_text(CONFIG)
  command = [sys.executable, "-m", "clipflow_jax.cli", "plan", f"--config={config}", *arguments]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def planned(folder: Path, *arguments: str) -> dict:
  said = run(folder, *arguments, f"--json={folder / 'plan.json'}")
  assert said.returncode == 0, said.stderr
  return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("quick", [(), ("--quick",)], ids=["", "quick"])
def test_a_cpu_mesh_shows_what_is_sharded_and_what_is_sent(tmp_path: Path, quick: tuple[str, ...]):
  report = planned(tmp_path, "--hardware=cpu:4", *quick)
  assert report.keys() >= KEYS
  assert (report["mesh"]["fsdp"], report["hardware"]["chips"]) == (4, 4)
  assert report["collective_bytes_by_kind_and_axes"]["all-gather"]["fsdp"] > 0
  memory, trained = report["memory_gib"], report["parameters"]["trained"]
  # float32 in four parts, save the small leaves.
  assert 4 * trained / 4 <= memory["trained"] * 2**30 < 4 * trained / 3
  assert memory["moments"] == pytest.approx(2 * memory["trained"], rel=0.01)
  assert memory["average"] == memory["trained"]
  assert report["hardware_flops_per_step"] >= report["model_flops_per_step"] > 0
  assert report["predicted_mfu"] is None  # nothing is predicted of a stand-in


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[plan]'")
def test_a_tpu_that_is_not_there_is_planned_for(tmp_path: Path):
  report = planned(tmp_path, "--hardware=v5e:2x2")
  assert report.keys() >= KEYS
  assert report["fits"] and report["hbm_limit_gib"] == 16
  assert sum(report["memory_gib"].values()) == pytest.approx(report["hbm_per_chip_gib"])
  assert 0 < report["predicted_mfu"] < 1
  assert report["predicted_step_s"] >= max(report["roofs_s"][name] for name in ("compute", "hbm"))
  assert report["images_per_s_per_chip"] * report["predicted_step_s"] * 4 == pytest.approx(report["batch_size"])
  assert report["chip_hours"] == pytest.approx(report["images"] / report["images_per_s_per_chip"] / 3600)


NO_GPU_COMPILER = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="no compiler for GPUs is installed: pip install '.[plan]'",
)


@NO_GPU_COMPILER
def test_gpus_that_are_not_there_are_planned_for(tmp_path: Path):
  report = planned(tmp_path, "--hardware=h100x8")
  assert report.keys() >= KEYS
  assert (report["mesh"]["fsdp"], report["hardware"]["chips"]) == (8, 8)
  assert report["fits"] and report["hbm_limit_gib"] == pytest.approx(73.2, abs=0.1)
  memory, trained = report["memory_gib"], report["parameters"]["trained"]
  assert 4 * trained / 8 <= memory["trained"] * 2**30 < 4 * trained / 3  # small leaves lie on all
  assert memory["temporaries"] > 0 and sum(memory.values()) == pytest.approx(report["hbm_per_chip_gib"])
  sent = report["collective_bytes_by_kind_and_axes"]
  assert sent["all-gather"]["fsdp"] > 0 and sent["reduce-scatter"]["fsdp"] > 0
  assert 0 < report["predicted_mfu"] < 1
  # Attention counts as the square that it is, also where a kernel leaves out what nobody sees; products of a few rows
  # are none to the compiler.
  assert report["executed_flops_per_chip"] * 8 == pytest.approx(report["hardware_flops_per_step"], rel=0.3)
  assert report["predicted_step_s"] > max(report["roofs_s"][name] for name in ("compute", "hbm"))


@NO_GPU_COMPILER
def test_groups_of_gpus_in_several_hosts_go_at_the_speed_of_the_network():
  with pytest.raises(UserError, match="12 h100 are no whole hosts of 8"):
    plan.devices(ConfigDict(dict(chip="h100", topology=(12,), slices=1)))
  found = plan.devices(ConfigDict(dict(chip="h100", topology=(16,), slices=1)))
  places = plan._Places(meshes.make(dict(data=2, fsdp=8), found), hardware.CHIPS["h100"])
  assert places.bandwidth(tuple(range(8))) == hardware.CHIPS["h100"].link_bandwidth
  assert places.bandwidth((0, 8)) == hardware.CHIPS["h100"].network_bandwidth


@NO_GPU_COMPILER
def test_towers_are_laid_out_as_they_are_written_on_gpus():
  """The gradient of places is a sum over rows: XLA likes those innermost for it, and each layer pays."""
  rows, words, width = 64, 48, 256
  tower = TextTower(512, words, width, 2, 4, 1024, 128, kernel="flash", dtype=jnp.bfloat16, unroll=True, pooling="end")
  tokens = jax.ShapeDtypeStruct((rows, words), jnp.int32)
  params = jax.eval_shape(tower.init, jax.random.key(0), tokens, tokens)
  mesh = meshes.make({}, plan.devices(ConfigDict(dict(chip="h100", topology=(1,), slices=1))))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params, tokens = jax.tree.map(lambda x: x.update(sharding=place), (params, tokens))

  def loss(params, tokens):
    return tower.apply(params, tokens, tokens)[:, 0].sum()

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
  assert f"[{rows},{words},{width}]" in text
  assert not re.search(rf"\[({words},{width},{rows}|{words},{rows},{width})\]", text)


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  config = config_file.load("configs/generation.py", [])
  for chip, topology in (("v5p", (2, 2, 1)), ("h100", (8,))):
    config.hardware = dict(chip=chip, topology=topology, slices=1)
    with pytest.raises(UserError, match=rf"planning for a {chip} needs its compiler: .*clipflow_jax\[plan\]"):
      plan.prepare(config)


def test_a_config_without_hardware_is_told_of_the_option():
  with pytest.raises(UserError, match="--hardware=v5p-512"):
    plan.prepare(config_file.load("configs/generation.py", []))


def test_a_run_of_several_stages_is_no_plan(capsys: pytest.CaptureFixture):
  assert cli.main(["plan", "--config=configs/quickstart.py"]) == 2
  assert "one stage" in capsys.readouterr().err


MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

  Largest program allocations in hbm:

  1. Size: 12.00G
     Operator: op_name="jit(step)/jvp(ClipFlow.read)/mul" source_file="x.py"
     Shape: bf16[64,4096,24576]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 12.00G
     XLA label: fusion.1
     ==========================

  2. Size: 512.0M
     Shape: f32[8192,16384]{1,0}
     ==========================
"""


def test_a_step_that_does_not_fit_says_by_how_much_and_what_is_largest():
  found = plan.does_not_fit(MESSAGE, hardware.CHIPS["v5e"])
  assert found["fits"] is False
  assert (found["hbm_per_chip_gib"], found["missing_gib"]) == (20.5, 4.75)
  assert found["largest"] == [
    "12.00G bf16[64,4096,24576] jit(step)/jvp(ClipFlow.read)/mul",
    "512.0M f32[8192,16384]",
  ]
  report = dict(mesh=dict(fsdp=4), batch_size=8, remat="full", hbm_limit_gib=16) | found
  assert "20.50 GiB a chip: does not fit by 4.75 GiB" in plan_report._line(report)


def test_temporaries_that_alone_do_not_fit_are_told_too():
  message = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (154.35G) exceeds available HBM (95.74G)."
  )
  found = plan.does_not_fit(message, hardware.CHIPS["v5p"])
  assert (found["hbm_per_chip_gib"], found["missing_gib"]) == (154.35, pytest.approx(58.61))


def test_a_group_is_as_fast_as_the_links_that_it_spans():
  """A v5p's slice of 4 x 4 x 2: fours close to rings, pairs are lines."""
  chip = hardware.CHIPS["v5p"]
  everywhere = np.stack(np.unravel_index(np.arange(32), (4, 4, 2)), axis=1)
  bounds = np.array([4, 4, 2])
  link = chip.link_bandwidth
  assert chip.bandwidth(everywhere, bounds, 1) == link * (2 + 2 + 1)
  assert chip.bandwidth(everywhere[everywhere[:, 0] == 0], bounds, 1) == link * (2 + 1)
  assert chip.bandwidth(everywhere[(everywhere[:, 1] == 0) & (everywhere[:, 0] < 2)], bounds, 1) == link * (1 + 1)
  assert chip.bandwidth(everywhere, bounds, 2) == chip.network_bandwidth
  gpu = hardware.CHIPS["h100"]
  ranks = np.zeros((8, 1))
  assert gpu.bandwidth(ranks, np.array([1]), 1) == gpu.link_bandwidth
  assert gpu.bandwidth(ranks, np.array([1]), 8) == gpu.network_bandwidth


def test_the_best_fit_and_are_the_fastest():
  reports = [
    dict(fits=True, images_per_s_per_chip=1.0),
    dict(fits=False, images_per_s_per_chip=None),
    dict(fits=True, images_per_s_per_chip=2.0),
  ]
  assert [report["images_per_s_per_chip"] for report in plan.best(reports)] == [2.0, 1.0]


def test_without_a_speed_the_best_do_the_least_work_a_row_and_hold_the_most_rows():
  unknown = dict(fits=True, images_per_s_per_chip=None)
  reports = [
    dict(unknown, hardware_flops_per_step=4.0, batch_size=2),
    dict(unknown, hardware_flops_per_step=3.0, batch_size=2),
    dict(unknown, hardware_flops_per_step=6.0, batch_size=4),
    dict(unknown, hardware_flops_per_step=9.0, batch_size=8, fits=False),
  ]
  assert [report["hardware_flops_per_step"] for report in plan.best(reports)] == [6.0, 3.0, 4.0]


def test_a_search_tells_what_fits_and_which_is_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  def instead(config, images, quick):
    rows = config.data.batch_size
    told = dict(batch_size=rows, remat=config.model.transformer.remat, mesh=dict(config.mesh), hbm_limit_gib=80.0)
    unknown = dict.fromkeys(("predicted_step_s", "images_per_s_per_chip"))
    fits = dict(fits=rows <= 16, hbm_per_chip_gib=60.0 * rows / 16, missing_gib=40.0)
    return told | unknown | fits | dict(hardware_flops_per_step=rows)

  monkeypatch.setattr(plan, "prepare", lambda config: None)
  monkeypatch.setattr(plan, "plan", instead)
  config = config_file.load("configs/joint.py:model=small,hardware=h100x1", ["--config.data.batch_size=8"])
  found = plan_report.make(config, search=True, images=1e6, quick=False)
  assert found["batch_size"] == 16 and len(found["tried"]) == 9
  assert "does not fit by 40.00 GiB" in capsys.readouterr().out


def test_a_search_of_which_nothing_can_be_planned_says_why(monkeypatch: pytest.MonkeyPatch):
  def refuse(config, images, quick):
    raise UserError("data.features: nowhere is none")

  monkeypatch.setattr(plan, "prepare", lambda config: None)
  monkeypatch.setattr(plan, "plan", refuse)
  config = config_file.load("configs/joint.py:model=small,hardware=h100x1", [])
  with pytest.raises(UserError, match="nowhere is none"):
    plan_report.make(config, search=True, images=1e6, quick=False)


@pytest.fixture(scope="module")
def offloaded() -> ConfigDict:
  config = presets.stage("generation", model=tiny_runs.model(dtype="bfloat16"), steps=10, ema=0.9)
  config.train = presets.trains(flow=1.0)
  config.data.update(tasks=dict(draw=1.0), length=64, batch_size=8)
  config.objective.update(weights=dict(flow=1.0), stop_text=True)
  config.optimizer = dict(name="adamw", learning_rate=1e-3, offload="host")
  config.frozen_dtype = "bfloat16"
  return config


def test_moments_that_are_offloaded_are_in_the_hosts_memory(offloaded: ConfigDict):
  program = Program.of(offloaded, meshes.make(dict(fsdp=-1)))
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim}
  assert kinds == {state.HOST}
  assert program.memory()["moments"] < 100 and program.host_memory() == 2 * program.memory()["trained"]
  mesh = meshes.abstract(dict(fsdp=-1), 8)
  with jax.sharding.use_abstract_mesh(mesh):
    eighth = Program.of(offloaded, mesh)
  assert eighth.host_memory() == 2 * eighth.memory()["trained"] < 2 * program.memory()["trained"] / 4


def test_cached_features_spare_the_tower(offloaded: ConfigDict, tmp_path: Path):
  cached = offloaded.copy_and_resolve_references()
  cached.data.features = str(tmp_path)
  mesh = meshes.abstract(dict(fsdp=-1), 8)
  with pytest.raises(UserError, match="data.features: .* is none"):
    Program.of(cached, mesh)
  (tmp_path / "manifest.json").write_text(json.dumps(dict(request={}, pictures=0, shards={})))
  whole, program = Program.of(offloaded, mesh), Program.of(cached, mesh)
  assert "clip_model" in whole.state.frozen and "clip_model" not in program.state.frozen
  tokens = (tiny_runs.SIZE // tiny_runs.PATCH) ** 2
  assert program.batch.images is None
  assert program.batch.features.shape == (8, offloaded.data.images_per_row, tokens, tiny.CHANNELS)
  assert program.memory()["frozen"] < whole.memory()["frozen"]
  with jax.sharding.use_abstract_mesh(mesh):
    assert 0 < program.flops() < whole.flops()


def test_model_flops_are_of_the_model_whatever_is_computed_besides(offloaded: ConfigDict):
  again = with_model(offloaded, kernel="splash", remat="full")
  again.optimizer = dict(name="muon")
  mesh = meshes.abstract(dict(fsdp=-1), 8)
  with jax.sharding.use_abstract_mesh(mesh):
    counts = [plan.model_flops(one, mesh) for one in (offloaded, again)]
    assert counts[0] == counts[1] < Program.of(with_model(again, kernel="xla"), mesh).flops()

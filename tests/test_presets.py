"""Model sizes and hardware: what is named exists, divides, and is spoken by the installed compilers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives import contrastive
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.parallel import sharding
from clipflow_jax.training import hardware as chips
from clipflow_jax.training import plan, program, state
from clipflow_jax.training.optimizer import Optimizer
from configs import contrastive as contrastive_config
from configs import hardware, presets

STAGES = ("contrastive", "decoder", "understanding", "generation", "joint")
SIZES = ("small", "1b", "4b", "8b")
TPUS = [found for name, found in hardware.CHIPS.items() if chips.CHIPS[name].torus]


def scaled(stage: str, model: str = "tiny", machine: str = "") -> ConfigDict:
  return importlib.import_module(f"configs.{stage}").get_config(f"model={model},hardware={machine}")


@pytest.mark.parametrize(("settings", "of"), [(presets.OPTIMIZER, Optimizer), (presets.OBJECTIVE, Objective)])
def test_every_setting_can_be_set_on_the_command_line(settings, of):
  assert set(settings) == {field.name for field in dataclasses.fields(of)} - {"steps"}
  for field in dataclasses.fields(of):
    if field.default is not dataclasses.MISSING and field.name != "adam_learning_rate":
      assert settings[field.name] == field.default, field.name


@functools.cache
def parameters(size: str, stage: str = "joint") -> dict[str, jax.ShapeDtypeStruct]:
  """{path: shape} of what a stage holds of a model of that size."""
  config = scaled(stage, size)
  config.data.update(batch_size=1, length=8, images_per_row=1)
  model = ClipFlow(**with_vocabulary(config.model.to_dict(), config.tokenizer.vocabulary))
  init = functools.partial(model.init, method="everything")
  return state.flatten(jax.eval_shape(init, jax.random.key(0), program.abstract_batch(config, model))["params"])


def billions(size: str, prefix: str) -> float:
  return sum(math.prod(leaf.shape) for path, leaf in parameters(size).items() if path.startswith(prefix)) / 1e9


@pytest.mark.parametrize(("stage", "holds"), [("contrastive", {"clip_model"}), ("decoder", {"clip_model", "decoder"})])
def test_a_stage_holds_what_it_computes_with_and_later_ones_find_it_under_the_same_names(stage: str, holds: set[str]):
  found, later = parameters("8b", stage), parameters("8b")
  assert {path.split("/")[0] for path in found} == holds | {"statistics"}
  assert {path: leaf.shape for path, leaf in found.items()}.items() <= {p: a.shape for p, a in later.items()}.items()


def test_a_stage_without_a_language_model_is_planned_without_one():
  report = plan.describe(scaled("contrastive", "8b", "v5p-128"), mesh_of("v5p-128"), 64)
  assert report["parameters"]["trained"] > 5e8 > 1e6 > report["parameters"]["frozen"]


@pytest.mark.parametrize("config", ["finetune", "blip3o", *(f"{stage}:model=small" for stage in STAGES)])
def test_where_the_newest_step_is_damaged_there_is_one_before_to_fall_back_to(config: str):
  name, _, arg = config.partition(":")
  assert importlib.import_module(f"configs.{name}").get_config(arg).keep >= 2


def mesh_of(machine: str) -> jax.sharding.AbstractMesh:
  found = hardware.make(machine)
  return meshes.abstract(found.mesh, found.devices)


@pytest.mark.parametrize(
  ("size", "language", "flow"), [("small", 0.05, 0.04), ("1b", 0.60, 0.36), ("4b", 3.09, 0.94), ("8b", 7.62, 1.46)]
)
def test_sizes_are_those_of_the_language_models_they_are_named_after(size: str, language: float, flow: float):
  """Qwen3-0.6B, Qwen2.5-3B and Qwen2.5-7B have 0.60, 3.09 and 7.62 billion parameters by their model cards."""
  text = sum(billions(size, f"language_model/{part}") for part in ("embed", "text", "head"))
  assert text == pytest.approx(language, rel=0.01 if size != "small" else 0.2)
  drawer = billions(size, "language_model/flow") + billions(size, "flow_head")
  assert drawer == pytest.approx(flow, rel=0.15)


@pytest.mark.parametrize("machine", hardware.PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_every_mesh_divides_every_parameter(size: str, machine: str):
  mesh = mesh_of(machine)
  for path, leaf in parameters(size).items():
    sharding.check(path, leaf.shape, sharding.parameter_axes(path, leaf.ndim), mesh)


@pytest.mark.parametrize("machine", hardware.PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_mesh_divides_every_batch_and_every_chunk_what_it_cuts(stage: str, machine: str):
  config, mesh = scaled(stage, "8b", machine), mesh_of(machine)
  rows = config.data.batch_size
  sharding.check("batch", (rows,), ("batch",), mesh)
  images, texts = 2 * [jax.ShapeDtypeStruct((rows, 8), "float32")]
  jax.eval_shape(
    lambda *pairs: contrastive.match(*pairs, 1.0, config.objective.get("contrastive_chunk", 0)), images, texts
  )
  assert config.data.threads > 0
  assert rows % config.data.shards == 0 and config.data.shards % mesh.size == 0  # a process has one device or several
  assert len(config.data.row) in (0, config.data.images_per_row)
  assert config.model.clip.vision.image_size == config.data.source.size


@pytest.mark.parametrize(
  ("machine", "chunk"), [("h100:24", 768), ("h100:40", 640), ("h100:56", 896), ("h100x64", 1024)]
)
def test_contrast_is_cut_into_parts_of_the_rows_that_a_machine_takes(machine: str, chunk: int):
  config = scaled("contrastive", "1b", machine)
  assert config.objective.contrastive_chunk == chunk and config.data.batch_size % chunk == 0


def test_named_hardware_says_how_every_stack_is_computed():
  of_import = ConfigDict(dict(clip=dict(vision=dict(layers=2)), transformer=dict(layers=2), drawer=dict(layers=2)))
  presets.computed_on(hardware.make("h100x8"), of_import)  # a model that an import wrote says nothing of it
  assert of_import.kernel == "flash" and of_import.drawer.remat == "dots" and of_import.drawer.unroll
  for part in (of_import.clip.vision, of_import.transformer):
    assert (part.remat, part.unroll) == ("dots", True)
  assert not scaled("joint", "8b", "v5p-512").model.transformer.unroll


@pytest.mark.parametrize("machine", hardware.PRESETS)
def test_a_preset_says_what_it_is_made_of(machine: str):
  found = hardware.make(machine)
  chip = chips.CHIPS[found.chip]
  dimensions = len(found.topology) if found.is_tpu else 0
  assert (chip.devices, chip.torus) == (found.cores, dimensions)
  for name, value, why in (*found.flags, *found.variables):
    assert name and value and len(why) > 10, name


def test_names_count_as_google_does():
  """Of v5p and tpu7x the number is of cores, two a chip; of v5e and v6e of chips."""
  for name, chips_of_it in (
    ("v5p-512", 256),
    ("v5p-4096", 2048),
    ("tpu7x-128", 64),
    ("v5e-256", 256),
    ("v6e-256", 256),
  ):
    assert hardware.make(name).chips == chips_of_it
  for name, found in hardware.PRESETS.items():
    if "-" in name:
      assert int(name.split("-")[1]) == found.chips * (2 if found.chip in ("v5p", "tpu7x") else 1)


def test_any_topology_and_several_slices_can_be_named():
  found = hardware.make("v5p:4x4x8:2")
  assert (found.chip, found.topology, found.slices, found.chips) == ("v5p", (4, 4, 8), 2, 256)
  assert found.mesh == dict(slice=2, data=2, fsdp=64)
  assert {name for name, *_ in hardware.SLICES} <= {name for name, *_ in found.flags}
  same = (("v5p:4x4x4", "v5p-128"), ("v5p:4x8x8", "v5p-512"), ("h100:64", "h100x64"), ("v5e:16x16", "v5e-256"))
  for by_topology, by_name in same:
    assert hardware.make(by_topology).mesh == dict(slice=1) | hardware.make(by_name).mesh


@pytest.mark.parametrize("name", ["v5p-513", "v9:2x2", "v5p:0x2x2", "v5p:2xx2", "v5p:2x2x2:0", "v5p:2x2x2:1:1", ""])
def test_unknown_hardware_is_named(name: str):
  with pytest.raises(UserError, match=r"is unknown; there are cpu, h100x1"):
    hardware.make(name)


@pytest.mark.parametrize(
  ("name", "instead"), [("h100:8:2", "h100:16"), ("h200:2x4:3", "h200:24"), ("cpu:1:2", "cpu:2")]
)
def test_slices_of_what_has_none_are_refused_with_what_to_name_instead(name: str, instead: str):
  with pytest.raises(UserError, match=f"TPUs alone have slices; .*, {instead}$"):
    hardware.make(name)
  assert not {flag for flag, *_ in hardware.make(instead).flags if "tpu" in flag}


@pytest.mark.parametrize("stage", STAGES)
def test_at_full_size_a_fresh_tower_learns_fast_and_averages_are_long(stage: str):
  config, tiny = scaled(stage, "1b"), scaled(stage)
  rates = config.optimizer.learning_rate, config.optimizer.weight_decay
  assert rates == ((1e-3, 0.1) if stage == "contrastive" else (1e-4, 0.0))
  assert config.ema == (0.9999 if tiny.ema else 0.0)


def test_an_imported_tower_is_trained_further_at_the_rate_of_what_is_there_already(tmp_path):
  vision = dict(presets.tiny()["clip"]["vision"], image_size=60)
  (tmp_path / "model.json").write_text(json.dumps(dict(clip=dict(vision=vision))))
  config = contrastive_config.get_config(f"model=1b,tower={tmp_path}")
  assert config.optimizer.learning_rate == presets.ADAMW["learning_rate"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_pictures_of_ones_own_at_the_size_of_its_tower(stage: str, tmp_path):
  module = importlib.import_module(f"configs.{stage}")
  source = module.get_config(f"model=small,data={tmp_path}").data.source
  assert source.to_dict() == dict(kind="folder", path=str(tmp_path), size=128)
  with pytest.raises(UserError, match="configs/folder.py:path=DIR"):
    module.get_config(f"data={tmp_path}")
  with pytest.raises(UserError, match="data=nowhere: it is not there"):
    module.get_config("model=small,data=nowhere")


def test_an_unknown_size_is_named():
  with pytest.raises(UserError, match="'9b' is unknown; there are small, 1b"):
    scaled("joint", "9b")


def test_tiny_stays_as_it_is_and_hardware_brings_its_mesh_batch_and_environment():
  plain, found = scaled("joint"), scaled("joint", "tiny", "v5p-512")
  assert plain.model == found.model
  assert found.mesh.to_dict() == dict(data=4, fsdp=64)
  assert found.data.batch_size % 256 == 0
  assert "--xla_enable_async_all_gather=true" in found.environment.LIBTPU_INIT_ARGS
  assert plain.environment.to_dict() == {}


# Flags. One that a compiler does not know ends its process, so each is asked in a process of its own.

SPEAK = "import jax; jax.jit(lambda x: x + 1)(1.0)"
# Of layers whose weights are gathered: a flag may be known to a compiler, and refused for a chip.
SPEAK_TPU = """
import sys, jax
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import plan
from configs import hardware
jax.config.update("jax_platforms", "cpu")
machine = hardware.make(sys.argv[1])
mesh = meshes.make(machine.mesh, plan.devices(machine))
def of(shape, *axes):
  return jax.ShapeDtypeStruct(shape, "float32", sharding=jax.sharding.NamedSharding(mesh, jax.P(*axes)))
run = jax.jit(lambda x, layers: jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, layers)[0])
run.lower(of((64, 256), "fsdp"), of((4, 256, 256), None, "fsdp")).compile()
"""


def speak(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
  environment = os.environ | plan.ENVIRONMENT | variables
  command = [sys.executable, "-c", code, *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_flags_for_gpu_and_cpu_are_known_to_the_installed_jaxlib():
  sets = {found.environment["XLA_FLAGS"] for found in hardware.CHIPS.values() if "XLA_FLAGS" in found.environment}
  assert sets
  for flags in sets:
    said = speak(SPEAK, XLA_FLAGS=flags)
    assert said.returncode == 0, said.stderr
  assert speak(SPEAK, XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[plan]'")
@pytest.mark.parametrize("found", TPUS, ids=lambda found: found.chip)
def test_flags_for_tpu_are_taken_by_the_installed_libtpu(found: hardware.Hardware):
  flags = " ".join(f"--{name}={value}" for name, value, _ in (*found.flags, *hardware.SLICES))
  machine = f"{found.chip}:{'2x2' if len(found.topology) == 2 else '2x2x1'}"
  said = speak(SPEAK_TPU, machine, LIBTPU_INIT_ARGS=flags)
  assert said.returncode == 0, said.stderr
  assert speak(SPEAK_TPU, machine, LIBTPU_INIT_ARGS=f"{flags} --xla_tpu_no_such_flag=true").returncode != 0

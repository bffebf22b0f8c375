"""`clipflow plan`: compiles a stage's real train step for hardware that is not there, and says what it will cost.

The prediction is a roofline of each instruction of the compiled program, not of the whole: an instruction takes the
longer of its matrix products at the chip's `products` share of its peak and of its memory traffic at `REACHED` of the
bandwidth, and instructions run one after the other. Loops count as often as they run. A collective takes the bytes that
a device receives at `REACHED` of the links that its group spans. Which of them overlap with compute is not assumed but
read: those that the compiler put inside a matrix product's fusion do so within their loop's body, and those that it
started early with what stands before the instruction that awaits them; the step waits for the rest.

  predicted_step_s = sum over bodies of max(compute, hidden collectives) + exposed collectives
  predicted_mfu    = model_flops_per_step / (chips x peak x predicted_step_s)

Model FLOPs are those of the matrix products of one forward and backward pass, recomputing nothing, without the
optimizer; attention counts all that it multiplies, also what the mask then drops. Hardware FLOPs add recomputation and
the optimizer. Both come from the traced step (`flops.count`).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import hlo
from clipflow_jax.training.hardware import CHIPS, GIB, REACHED, Chip
from clipflow_jax.training.program import Program, with_model, with_values

# For libtpu's compile-only client: ask no metadata server, take no lock.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "none",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
Report = dict[str, Any]


def prepare(config: ConfigDict) -> None:
  """Sets this process up for config.hardware, before JAX looks for devices: once, and first of all.

  UserError when the config names none, and without the compiler for it.
  """
  name = config.hardware.chip
  if not name:
    raise UserError("the config names no hardware: give --hardware=v5p-512 (or another of configs/hardware.py)")
  jax.config.update("jax_platforms", "cpu")
  if name == "cpu":
    jax.config.update("jax_num_cpu_devices", math.prod(config.hardware.topology))
    return
  compilers = ("libtpu",) if CHIPS[name].torus else ("jax_cuda13_plugin", "jax_cuda12_plugin")
  if not any(map(importlib.util.find_spec, compilers)):
    raise UserError(f"planning for a {name} needs its compiler: pip install 'clipflow_jax[plan]'")
  os.environ.update(ENVIRONMENT)


def devices(hardware: ConfigDict) -> list[jax.Device]:
  """The devices of config.hardware: of TPUs or GPUs that need not be there, or of this CPU in as many parts.

  UserError for a topology that does not exist.
  """
  name, shape = hardware.chip, "x".join(map(str, hardware.topology))
  if name == "cpu":
    return jax.devices()
  chip, options = CHIPS[name], dict(CHIPS[name].options)
  if chip.torus:
    platform, topology = "tpu", f"{name}:{shape}"
    options |= dict(num_slices=hardware.slices) if hardware.slices > 1 else {}
  else:
    gpus = math.prod(hardware.topology) * hardware.slices
    if gpus > chip.host and gpus % chip.host:
      raise UserError(f"{gpus} {name} are no whole hosts of {chip.host}: take a multiple, or no more than one has")
    platform, topology = "cuda", f"1x{-(-gpus // chip.host)}x{min(gpus, chip.host)}"
    options |= dict(topology=topology)
  try:
    return topologies.get_topology_desc(topology, platform, **options).devices
  except NotImplementedError as error:  # the compiler is of another version than jax, and was not loaded
    raise UserError(f"the compiler for a {name} does not go with jax {jax.__version__}: {error}") from error
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"there is no {name} of {shape} chips: {str(error).splitlines()[0]}") from error


def plan(config: ConfigDict, images: float = 1e6, quick: bool = False) -> Report:
  """Compiles the step of a stage for config.hardware; what it found, by name (README, "clipflow plan").

  images: how many `chip_hours` are for. quick: as `Program.compile`.
  UserError as `devices`, and for a mesh or a batch that does not fit.
  """
  found = devices(config.hardware)
  chip = CHIPS[config.hardware.chip]
  mesh = meshes.make(config.mesh, found)
  chips = len(found) // chip.devices
  with jax.set_mesh(mesh):
    program = Program.of(config, mesh)
    report = describe(config, mesh, chips)
    before = time.perf_counter()
    try:
      compiled = program.compile(quick)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      fault = does_not_fit(str(error), chip)
      fault["largest"] = fault["largest"] or program.largest()
      return report | dict(compile_s=time.perf_counter() - before) | fault
    report["compile_s"] = time.perf_counter() - before
  return report | _memory(compiled, program, chip) | predict(compiled.as_text(), report, mesh, chip, program, images)


def describe(config: ConfigDict, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, chips: int) -> Report:
  """What is known of a stage without a compiler."""
  traced = Program.of(with_model(config, kernel="xla"), mesh)  # no other kernel's products can be counted
  limit = CHIPS[config.hardware.chip].hbm_gib
  return dict(
    stage=config.name,
    hardware=dict(config.hardware.to_dict(), chips=chips),
    mesh=dict(mesh.shape),
    batch_size=config.data.batch_size,
    remat=str((config.model.get("transformer") or config.model.clip.vision).get("remat", "none")),
    parameters={
      name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(getattr(traced.state, name)))
      for name in ("trained", "frozen")
    },
    model_flops_per_step=model_flops(config, mesh),
    hardware_flops_per_step=traced.flops(),
    hbm_limit_gib=None if math.isnan(limit) else limit,
  )


def model_flops(config: ConfigDict, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """FLOPs of the model in one step of all devices: what an MFU is of."""
  return Program.of(with_model(config, remat="none", kernel="xla"), mesh, learns=False).flops()


def predict(text: str, report: Report, mesh: jax.sharding.Mesh, chip: Chip, program: Program, images: float) -> Report:
  """Times, collectives and costs from the compiled text. What is not known of a chip is None."""
  place = _Places(mesh, chip)
  speeds = {name: getattr(chip, name) / chip.devices for name in ("peak_flops", "hbm_bandwidth")}
  cost = hlo.Program(
    text,
    devices=mesh.size,
    flops_per_s=chip.products * speeds["peak_flops"],
    bytes_per_s=REACHED * speeds["hbm_bandwidth"],
    transfer=lambda one: one.bytes / (REACHED * place.bandwidth(one.group)),
  ).cost()
  by_kind = hlo.by_kind(cost.collectives, place.axes)
  roofs = {
    "compute": cost.flops / speeds["peak_flops"],
    "hbm": cost.hbm_bytes / speeds["hbm_bandwidth"],
    "interconnect": REACHED * (cost.hidden_s + cost.exposed_s),
  }
  seconds = max(cost.seconds, roofs["hbm"] / REACHED)
  pictures = math.prod(program.batch.image_roles.shape)
  chips = report["hardware"]["chips"]
  speed = pictures / seconds / chips
  known = dict(
    roofs_s=roofs,
    exposed_collectives_s=cost.exposed_s,
    hidden_collectives_s=cost.hidden_s,
    predicted_step_s=seconds,
    predicted_mfu=report["model_flops_per_step"] / (chips * chip.peak_flops * seconds),
    images_per_s_per_chip=speed,
    chip_hours=images / speed / 3600,
  )
  if math.isnan(seconds):
    known = dict.fromkeys(known)
  return dict(
    collective_bytes_per_chip=sum(sum(of.values()) for of in by_kind.values()) * chip.devices,
    collective_bytes_by_kind_and_axes=by_kind,
    executed_flops_per_chip=cost.flops * chip.devices,
    hbm_bytes_per_chip=cost.hbm_bytes * chip.devices,
    images=images,
    **known,
  )


class _Places:
  """Where a group's devices stand: on the mesh, and in the network."""

  def __init__(self, mesh: jax.sharding.Mesh, chip: Chip):
    self.mesh, self.chip = mesh, chip
    self.devices = mesh.devices.ravel()
    self.coords = np.array([getattr(d, "coords", (0,)) for d in self.devices])
    self.bounds = self.coords.max(axis=0) + 1

  def axes(self, group: tuple[int, ...]) -> str:
    """The mesh axes along which the group's members differ, as "data+fsdp"."""
    places = np.stack(np.unravel_index(np.array(group), self.mesh.devices.shape))
    return "+".join(name for name, at in zip(self.mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1)

  def bandwidth(self, group: tuple[int, ...]) -> float:
    """Bytes/s of one device in it."""
    apart = "slice_index" if self.chip.torus else "process_index"
    networks = {getattr(self.devices[i], apart, 0) for i in group}
    return self.chip.bandwidth(self.coords[list(group)], self.bounds, len(networks)) / self.chip.devices


def does_not_fit(message: str, chip: Chip) -> Report:
  """What the compiler says of a program that is too large: by how much, and its largest arrays."""
  # The second form is of temporaries that alone are too large, whatever else there is; it names no arrays.
  sizes = r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", r"\(([\d.]+)([KMGT]?)\) exceeds [^(]*\(([\d.]+)([KMGT]?)\)"
  used = next(filter(None, (re.search(form, message) for form in sizes)), None)
  gib = [float(used[i]) * UNITS[used[i + 1]] / GIB * chip.devices for i in (1, 3)] if used else [None, None]
  blocks = re.findall(r"Size: ([\d.]+[KMGT]?)\b(.*?)(?=\n\s*\d+\. Size:|\Z)", message, re.DOTALL)
  largest = []
  for size, block in blocks[:8]:
    shape, operator = (re.search(pattern, block) for pattern in (r"Shape: (\S+?)[{\s]", r'op_name="([^"]*)"'))
    largest.append(" ".join(filter(None, (size, shape and shape[1], operator and operator[1]))))
  missing = gib[0] - gib[1] if used else None
  return dict(fits=False, hbm_per_chip_gib=gib[0], missing_gib=missing, largest=largest) | dict.fromkeys(
    ("collective_bytes_per_chip", "predicted_step_s", "predicted_mfu", "images_per_s_per_chip", "chip_hours")
  )


def _memory(compiled: jax.stages.Compiled, program: Program, chip: Chip) -> Report:
  stats = compiled.memory_analysis()
  kinds = program.memory() | {
    "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
    "temporaries": float(stats.temp_size_in_bytes),
    "program": float(stats.generated_code_size_in_bytes),
  }
  # The arguments as the compiler lays them out, padding included. A CPU's own memory is the host's.
  laid_out = stats.argument_size_in_bytes + stats.host_argument_size_in_bytes
  kinds["padding"] = laid_out - sum(program.memory().values()) - program.host_memory()
  kinds = {kind: size * chip.devices / GIB for kind, size in kinds.items()}
  used = sum(kinds.values())
  fits = None if math.isnan(chip.hbm_gib) else used <= chip.hbm_gib
  found = dict(fits=fits, hbm_per_chip_gib=used, memory_gib=kinds)
  found["host_gib"] = program.host_memory() * chip.devices / GIB
  return found if fits is not False else found | dict(missing_gib=used - chip.hbm_gib, largest=program.largest())


def search(config: ConfigDict, planned: Callable[[ConfigDict], Report]) -> Iterator[Report]:
  """Reports by `planned` of the same stage with other batches, remat policies and meshes, each as soon as it is there.

  Those that the mesh does not divide are left out. UserError, the last one's, where none is left.
  """
  count = math.prod(config.hardware.topology) * config.hardware.slices * CHIPS[config.hardware.chip].devices
  sizes = {axis: config.mesh.get(axis, 1) for axis in meshes.AXES}
  sizes = {axis: count // -math.prod(sizes.values()) if size == -1 else size for axis, size in sizes.items()}
  found, refused = 0, UserError("there is no mesh to try")
  moves: list[dict[str, float]] = [{}, dict(data=2, fsdp=0.5), dict(data=0.5, fsdp=2), dict(tensor=2, fsdp=0.5)]
  for change, remat, rows in itertools.product(moves, ("full", "dots", "none"), (1, 2, 4)):
    mesh = {axis: size * change.get(axis, 1) for axis, size in sizes.items()}
    if any(size != int(size) for size in mesh.values()):
      continue
    other = config.copy_and_resolve_references()
    other.mesh = {axis: int(size) for axis, size in mesh.items()}
    other.model = with_values(config.model.to_dict(), remat=remat)
    other.data.batch_size = config.data.batch_size * rows
    try:
      report = planned(other)
    except UserError as error:
      refused = error
      continue
    found += 1
    yield report
  if not found:
    raise refused


def best(reports: list[Report]) -> list[Report]:
  """Those that fit, the fastest first; where no speed is known, those with the least work a row, the largest first."""

  def order(report: Report) -> tuple[float, ...]:
    if report["images_per_s_per_chip"] is not None:
      return (-report["images_per_s_per_chip"],)
    return (report["hardware_flops_per_step"] / report["batch_size"], -report["batch_size"])

  return sorted((report for report in reports if report["fits"]), key=order)

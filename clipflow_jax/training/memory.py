"""What a step will hold on GPUs that are not here: whether it fits, before anything starts.

No compiler for a GPU runs without one. What lives from step to step is known all the same, to the byte: it follows from
the shapes of the state and from how the mesh divides them, and so are the gradients. What a step makes in between is
estimated from the traced step: the most that is alive at once when its operations run in the order that they are
written in and each makes its whole result, divided by the devices. A compiler fuses many, which is less; its scratch
space and fragmentation, which are more, are not in it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.training import plan
from clipflow_jax.training.hardware import CHIPS, GIB
from clipflow_jax.training.plan import Program, Report

EXACT = ("trained", "average", "moments", "frozen", "gradients", "batch")
CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call", "custom_lin")


def absent(hardware: ConfigDict) -> bool:
  """Whether config.hardware is GPUs, and this process has none."""
  return hardware.chip != "cpu" and not CHIPS[hardware.chip].torus and jax.default_backend() != "gpu"


def estimate(config: ConfigDict) -> Report:
  """The memory of a stage on config.hardware, by the names that `plan.plan` uses; what takes a compiler is None.

  memory_gib: of a device, by kind, those of EXACT to the byte; what optimizer.offload keeps in the host's memory is in
  host_gib instead. UserError for a mesh or a batch that does not fit.
  """
  chip, count = CHIPS[config.hardware.chip], math.prod(config.hardware.topology) * config.hardware.slices
  mesh = meshes.abstract(config.mesh, count)
  traced = plan.with_model(config, kernel="shapes")  # cuDNN's cannot be traced here
  with jax.sharding.use_abstract_mesh(mesh):
    program = Program.of(traced, mesh)
    kinds = program.memory()
    kinds["gradients"] = kinds["trained"]
    step = Program.of(traced, mesh, learns=False)
    between = peak(jax.make_jaxpr(step.pure)(step.state, step.batch).jaxpr) / count
    kinds["activations"] = max(0.0, between - kinds["gradients"])
    report = plan.describe(config, mesh, count)
  used = sum(kinds.values()) / GIB
  report |= dict(
    hbm_per_chip_gib=used,
    memory_gib={kind: size / GIB for kind, size in kinds.items()},
    host_gib=program.host_memory() / GIB,
    fits=used <= chip.hbm_gib,
  )
  if not report["fits"]:
    report |= dict(missing_gib=used - chip.hbm_gib, largest=program.largest())
  unknown = ("compile_s", "collective_bytes_per_chip", "predicted_step_s", "predicted_mfu", "images_per_s_per_chip")
  return report | dict.fromkeys((*unknown, "chip_hours"))


def peak(jaxpr: Any) -> int:
  """Bytes of the most that is alive at once beside the inputs: equations run in order, and none is fused."""
  last: dict[Any, int] = {}
  for i, equation in enumerate(jaxpr.eqns):
    last |= {var: i for var in equation.invars if isinstance(var, jax.extend.core.Var)}
  last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, jax.extend.core.Var)}
  alive = most = 0
  made: set[Any] = set()
  for i, equation in enumerate(jaxpr.eqns):
    out = {var for var in equation.outvars if var in last}
    size = sum(map(_bytes, out))
    inner = max(map(peak, _inside(equation)), default=0)
    # What a call returns is what it made; a loop's results are beside what each of its turns makes.
    now = max(size, inner) if equation.primitive.name in CALLS else size + inner
    most = max(most, alive + now)
    made |= out
    alive += size - sum(_bytes(var) for var in made if last[var] == i)
    made -= {var for var in made if last[var] == i}
  return most


def _inside(equation: Any) -> list[Any]:
  found = []
  for value in equation.params.values():
    for sub in value if isinstance(value, tuple | list) else (value,):
      sub = getattr(sub, "jaxpr", sub)
      found += [sub] if hasattr(sub, "eqns") else []
  return found


def _bytes(var: Any) -> int:
  dtype = var.aval.dtype
  size = (
    8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
  )  # a random key has two words
  return math.prod(var.aval.shape) * size

"""What to run on: chips and how they are wired, the mesh over them, what each holds, and the compiler's options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from clipflow_jax.errors import UserError

# (flag, value, why). XLA's flags for TPU go into LIBTPU_INIT_ARGS, for GPU and CPU into XLA_FLAGS: one that the
# compiler does not know ends the process, and tests/test_presets.py asks the installed one.
Options = tuple[tuple[str, str, str], ...]

TPU: Options = (
  ("xla_tpu_enable_async_collective_fusion", "true", "runs a layer's collectives inside matrix products beside them"),
  ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "what takes longer than one product spans several"),
  ("xla_tpu_overlap_compute_collective_tc", "true", "lets the tensor core compute while it forwards"),
  ("xla_enable_async_all_gather", "true", "gathers are started early and awaited late"),
)
V5E: Options = (
  *TPU,
  # On other chips libtpu 0.0.48 refuses it, and warns of wrong results with whatever did not.
  ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "also FSDP's gathers of the next weights"),
)
V5P: Options = (
  *TPU,
  ("xla_enable_async_collective_permute", "true", "rings of context parallelism overlap with attention"),
  ("xla_tpu_enable_ag_backward_pipelining", "true", "the backward loop gathers one layer ahead"),
  ("xla_tpu_megacore_fusion_allow_ags", "false", "keeps gathers out of fusions that both cores share, which serialise"),
)
V6E: Options = (
  *TPU,
  ("xla_tpu_scoped_vmem_limit_kib", "98304", "larger tiles: its 256 x 256 matrix units starve on the default's"),
)
SLICES: Options = (
  ("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "gradients cross the network while the rest is computed"),
  ("xla_tpu_data_parallel_opt_different_sized_ops", "true", "also where the layers' gradients differ in size"),
)
GPU: Options = (
  ("xla_gpu_enable_triton_gemm", "false", "cuBLAS multiplies as fast or faster, and is the sooner compiled"),
  ("xla_gpu_enable_latency_hiding_scheduler", "true", "starts collectives early and awaits them late"),
  ("xla_gpu_enable_while_loop_double_buffering", "true", "the next layer's weights arrive while this one computes"),
  ("xla_gpu_all_gather_combine_threshold_bytes", str(2**30), "one gather a layer: many small ones wait for each other"),
  ("xla_gpu_reduce_scatter_combine_threshold_bytes", str(2**30), "likewise for the gradients of a layer"),
  ("xla_gpu_all_reduce_combine_threshold_bytes", str(2**30), "likewise across hosts"),
)
# Variables that are no flags of XLA.
GPU_VARIABLES: Options = (
  ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92", "the default leaves a quarter of the memory to nobody"),
  ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "on Hopper: kernels start in order, so that collectives are not overtaken"),
  ("NCCL_NVLS_ENABLE", "1", "reductions inside the switch of a host"),
)


@dataclasses.dataclass(frozen=True)
class Hardware:
  """chip: a key of `clipflow_jax.training.hardware.CHIPS`. topology: chips along each dimension of a slice's network.

  mesh: sizes of `parallel.mesh.AXES`. tokens: how many tokens (words, pictures' and noisy blocks') a device takes a
  step: the per-chip batch, in the unit that rows of any stage share. remat, unroll, kernel: of the model's stacks.
  cores: JAX devices a chip.
  """

  chip: str
  topology: tuple[int, ...]
  mesh: dict[str, int]
  tokens: int
  remat: str = "full"
  unroll: bool = False
  kernel: str = "xla"
  flags: Options = ()
  variables: Options = ()
  slices: int = 1
  cores: int = 1

  @property
  def chips(self) -> int:
    """Of all slices."""
    return self.slices * math.prod(self.topology)

  @property
  def devices(self) -> int:
    """As JAX counts them."""
    return self.chips * self.cores

  @property
  def is_tpu(self) -> bool:
    """Whether it is wired in slices, and compiled for by libtpu."""
    return self.chip not in ("cpu", "h100", "h200")

  @property
  def environment(self) -> dict[str, str]:
    """The environment variables to run with."""
    flags = " ".join(f"--{name}={value}" for name, value, _ in self.flags)
    named = {"LIBTPU_INIT_ARGS" if self.is_tpu else "XLA_FLAGS": flags} if flags else {}
    return {name: value for name, value, _ in self.variables} | named


OF_GPU: dict[str, Any] = dict(unroll=True, kernel="flash", remat="dots", flags=GPU, variables=GPU_VARIABLES)
# What a device of each kind takes; PRESETS say how many there are and how they share. Tokens: enough that a layer's
# products outlast the gather of the next one's weights (scaling book: some 850 on a v5p with three axes), and that the
# 8b model fits. Where there is memory to spare, products with weights are kept instead of made twice. GPUs unroll: in a
# loop XLA copies each layer's weights out of their stack and what is kept into one, 38 % of the time of a CLIP L/14's
# step, and half of its memory. TPUs loop: there it works in place, and compiles once what is the same in each layer.
CHIPS = {
  "cpu": Hardware("cpu", (1,), dict(fsdp=-1), tokens=2048),
  "h100": Hardware("h100", (1,), dict(fsdp=-1), tokens=16384, **OF_GPU),
  "h200": Hardware("h200", (1,), dict(fsdp=-1), tokens=16384, **OF_GPU),
  "v4": Hardware("v4", (2, 2, 1), dict(fsdp=-1), tokens=8192, kernel="splash", flags=TPU),
  "v5e": Hardware("v5e", (1, 1), dict(fsdp=-1), tokens=8192, kernel="splash", flags=V5E),
  "v5p": Hardware("v5p", (2, 2, 1), dict(fsdp=-1), tokens=16384, remat="dots", kernel="splash", flags=V5P),
  "v6e": Hardware("v6e", (1, 1), dict(fsdp=-1), tokens=16384, kernel="splash", flags=V6E),
  "tpu7x": Hardware("tpu7x", (2, 2, 1), dict(fsdp=-1), tokens=16384, remat="dots", kernel="splash", flags=TPU, cores=2),
}


def _at(chip: str, *topology: int, **mesh: int) -> Hardware:
  return dataclasses.replace(CHIPS[chip], topology=topology, mesh=mesh or dict(fsdp=-1))


# Google's names: of v4, v5p and tpu7x the number counts cores, two a chip. The 8b model's state needs no more than 64
# chips to share it; beyond, `data` repeats them, so that a chip sends as much on 4,096 chips as on 64 (widths of 1152
# and 3584 divide by 128, not by 256). v5e has little memory: 128 share. On v5p-128 with all chips in one axis the
# compiler makes gathers into all-reduces of twice the bytes; with two axes it does not.
PRESETS = {
  "cpu": _at("cpu", 1),
  "h100x1": _at("h100", 1),
  "h100x8": _at("h100", 8),
  "h100x64": _at("h100", 64, data=8, fsdp=8),  # weights are gathered inside a host, gradients cross the network
  "h200x1": _at("h200", 1),
  "h200x8": _at("h200", 8),
  "v5e-16": _at("v5e", 4, 4),
  "v5e-256": _at("v5e", 16, 16, data=2, fsdp=128),
  "v6e-256": _at("v6e", 16, 16, data=4, fsdp=64),
  "v5p-64": _at("v5p", 2, 4, 4),
  "v5p-128": _at("v5p", 4, 4, 4, data=2, fsdp=32),
  "v5p-512": _at("v5p", 4, 8, 8, data=4, fsdp=64),
  "v5p-4096": _at("v5p", 8, 16, 16, data=32, fsdp=64),
  "v5p-8192": _at("v5p", 16, 16, 16, data=64, fsdp=64),
  "tpu7x-128": _at("tpu7x", 4, 4, 4, data=2, fsdp=64),
}


def make(name: str) -> Hardware:
  """A preset by its name, or CHIP:4x4x4 for any topology, CHIP:4x4x4:2 for two such slices of a TPU.

  UserError for a name that is neither, and for slices of what has none.
  """
  if name in PRESETS:
    return PRESETS[name]
  chip, *rest = name.split(":")
  try:
    topology, slices = tuple(map(int, rest[0].split("x"))), int(rest[1]) if len(rest) > 1 else 1
    if chip not in CHIPS or len(rest) > 2 or min(*topology, slices, 1) < 1:
      raise ValueError
  except (IndexError, ValueError):
    raise UserError(
      f"hardware {name!r} is unknown; there are {', '.join(PRESETS)}, and CHIP:4x4x4[:SLICES] of {', '.join(CHIPS)}"
    ) from None
  found = dataclasses.replace(CHIPS[chip], topology=topology, slices=slices)
  if slices > 1 and not found.is_tpu:
    raise UserError(f"hardware {name!r}: TPUs alone have slices; of {chip} give all together, {chip}:{found.chips}")
  devices = found.devices // slices
  shared = math.gcd(devices, {"v5e": 128, "h100": 8, "h200": 8}.get(chip, 64))  # for the reasons at PRESETS
  if shared == devices == 64:
    shared = 32
  mesh = dict(slice=slices, data=devices // shared, fsdp=shared)
  return dataclasses.replace(found, mesh=mesh, flags=found.flags + (SLICES if slices > 1 else ()))

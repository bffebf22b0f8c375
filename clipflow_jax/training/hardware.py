"""What chips can do by their data sheets: the roofs that `clipflow plan` measures a step against."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipflow_jax.training.metrics import PEAK_FLOPS

GIB = 2**30

# The share of their data sheet's bandwidth that large copies and rings of links reach (scaling book, for links).
REACHED = 0.9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip. Speeds are of a whole chip, which is `devices` JAX devices.

  peak_flops: dense bf16 FLOP/s. hbm_gib: memory that a program can have, in GiB. hbm_bandwidth, link_bandwidth (one ICI
  link, one way), network_bandwidth (between slices, or between GPU hosts): bytes/s. torus: dimensions of the ICI
  network, 0 where every chip of a host reaches every other at link_bandwidth. ring: multiples of so many chips in a row
  close to one, others are a line. host: chips that share a host. products: the share of peak_flops at which a large
  matrix product runs. options: of the compile-only client: which of its devices is a chip, or what a GPU is.
  """

  peak_flops: float
  hbm_gib: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  torus: int = 0
  ring: int = 4
  devices: int = 1
  host: int = 4
  products: float = REACHED
  options: tuple[tuple[str, str], ...] = ()

  def bandwidth(self, coords: np.ndarray, bounds: np.ndarray, networks: int) -> float:
    """Bytes/s at which a chip takes part in a collective of one group.

    coords i[n, dims]: where the group's chips stand; bounds i[dims]: the whole slice. A ring sends both ways along each
    dimension that the group spans, a line one way. networks: in how many slices, or GPU hosts, the group's chips are;
    in more than one they go at the speed of what is between.
    """
    if networks > 1:
      return self.network_bandwidth
    if not self.torus:
      return self.link_bandwidth
    speed = 0.0
    for dimension in range(coords.shape[1]):
      spanned = len(set(coords[:, dimension].tolist()))
      if spanned > 1:
        closed = spanned == bounds[dimension] and spanned % self.ring == 0
        speed += self.link_bandwidth * (2 if closed else 1)
    return speed or self.link_bandwidth * 2 * self.torus  # two devices of one chip: no slower than all its links


def _hopper(sheet: str, name: str, gib: float, bandwidth: float, l2_bytes: int) -> Chip:
  """An SXM GPU of compute capability 9.0: sheet names its row of PEAK_FLOPS, the rest is what the CUDA driver tells.

  The compiler is told in the text format of XLA's protocol buffer. Of the memory JAX takes the share that the presets
  set (XLA_PYTHON_CLIENT_MEM_FRACTION). Products: 797 TFLOP/s, as measured on an H200.
  """
  per_block = "threads_per_block_limit: 1024 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448"
  per_core = "threads_per_core_limit: 2048 shared_memory_per_core: 233472 fpus_per_core: 128"
  registers = "registers_per_core_limit: 65536 registers_per_block_limit: 65536"
  grid = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 threads_per_warp: 32"
  memory = f"memory_bandwidth: {bandwidth:.0f} device_memory_size: {gib * GIB:.0f} l2_cache_size: {l2_bytes}"
  capability = "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"
  device = f"core_count: 132 clock_rate_ghz: 1.98 {per_block} {per_core} {registers} {grid} {memory} {capability}"
  library = "dnn_version_info { major: 9 minor: 10 }"
  text = f'platform_name: "CUDA" device_description_str: "{name}" {library} gpu_device_info {{ {device} }}'
  options = (("target_config", text),)
  return Chip(PEAK_FLOPS[sheet], 0.92 * gib, bandwidth, 450e9, 50e9, host=8, products=0.81, options=options)


# Sources: cloud.google.com/tpu/docs, a page for each version, has FLOP/s, memory, its bandwidth, and the bandwidth of
# all of a chip's links in both directions, of which link_bandwidth is the share of one link one way; the network's is
# "data center network bandwidth per chip" there, and for v4 and v5e that of jax-ml.github.io/scaling-book/tpus. GPUs:
# NVIDIA's data sheets of the H100 SXM and of the DGX H100 (NVLink one way; one 400 Gb/s card a GPU). `products` is what
# libtpu 0.0.42.1 itself estimates for bf16[8192,8192] @ bf16[8192,8192]: its cycles against those that the matrix units
# need at the peak.
CHIPS = {
  "v4": Chip(
    PEAK_FLOPS["TPU v4"], 32, 1228e9, 50e9, 6.25e9, products=0.93, torus=3, options=(("chip_config_name", "megacore"),)
  ),
  "v5e": Chip(PEAK_FLOPS["TPU v5e"], 16, 819e9, 50e9, 3.125e9, products=0.88, torus=2, ring=16, host=8),
  "v5p": Chip(PEAK_FLOPS["TPU v5"], 95, 2765e9, 100e9, 6.25e9, products=0.9, torus=3),
  "v6e": Chip(PEAK_FLOPS["TPU v6"], 32, 1638e9, 100e9, 12.5e9, products=0.7, torus=2, ring=16, host=8),
  "tpu7x": Chip(2 * PEAK_FLOPS["TPU7x"], 192, 7380e9, 100e9, 12.5e9, products=0.8, torus=3, devices=2),
  "h100": _hopper("NVIDIA H100", "NVIDIA H100 80GB HBM3", 79.6, 3350e9, 52_428_800),
  "h200": _hopper("NVIDIA H200", "NVIDIA H200", 140.4, 4800e9, 62_914_560),
  # A stand-in that only proves that a mesh compiles: nothing is predicted of it.
  "cpu": Chip(float("nan"), float("nan"), float("nan"), float("nan"), float("nan"), host=1 << 20),
}

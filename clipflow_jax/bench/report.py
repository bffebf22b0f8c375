"""What was timed, in numbers and as a table."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Any

from clipflow_jax.bench.frame import Worker
from clipflow_jax.training.metrics import PEAK_FLOPS

GIB = 2**30
FORMULA = (
  "MFU = FLOPs of a call / (median seconds x FLOP/s of the ceiling). FLOPs: 2 for each multiply-add of the matrix "
  "products that the mathematics asks for.\nRoofline = max(FLOPs / matmul ceiling, bytes / copy ceiling): the seconds "
  "that a call cannot go below."
)


def machine() -> dict[str, Any]:
  """What the numbers are of: processor, cores that this process may use, memory, the load before."""
  names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
  return {
    "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    "python": platform.python_version(),
    "load_before": os.getloadavg()[0],
  }


def numbers(found: dict[str, list[Worker]]) -> dict[str, Any]:
  """All numbers by name: {"device", "ways", "peers", "ceilings"}.

  Of a way with a peer, and of the first such at the top, too: "ratio", peer time / our time, of the same amount of the
  first unit that is counted, within each round; its median and range over the rounds are told. found: of `frame.run`.
  """
  ceilings = {worker.name: _rate(worker) for worker in found["ceilings"]}
  device = found["ceilings"][0].facts["device"] if ceilings else ""
  sheet = next((flops for name, flops in PEAK_FLOPS.items() if device.startswith(name)), 0.0)
  ways = {worker.name: _of(worker, ceilings, sheet) for worker in found["ours"]}
  for worker in found["ours"]:
    for peer in found["peers"]:
      if peer.told == worker.facts["peer"]:
        each = [_per_unit(peer, i) / _per_unit(worker, i) for i in range(len(worker.seconds))]
        ways[worker.name]["peer"] = peer.name
        ways[worker.name]["ratio"] = statistics.median(each)
        ways[worker.name]["ratio_range"] = [min(each), max(each)]
        cores = (statistics.median(each.core_seconds) for each in (peer, worker))
        ways[worker.name]["ratio_of_core_seconds"] = next(cores) / next(cores) * _amount(worker) / _amount(peer)
  peers = {worker.name: _of(worker, {}, 0.0) for worker in found["peers"]}
  ratios = [way["ratio"] for way in ways.values() if "ratio" in way]
  named = {"device": device, "ways": ways, "peers": peers, "ceilings": ceilings}
  return ({"ratio": ratios[0]} if ratios else {}) | named


def table(found: dict[str, Any]) -> str:
  """The numbers of `numbers` in columns, one for each way and peer."""
  columns = found["ways"] | found["peers"]
  rows: dict[str, list[str]] = {}
  for i, column in enumerate(columns.values()):
    for name, value in column.items():
      if isinstance(value, int | float):
        text = f"{value:.4g}"
      elif isinstance(value, list):
        text = " - ".join(f"{each:.4g}" for each in value)
      else:
        continue
      rows.setdefault(name, [""] * len(columns))[i] = text
  first = max(len(name) for name in rows)
  widths = [max(len(name), *(len(row[i]) for row in rows.values())) for i, name in enumerate(columns)]
  lines = [" " * first + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths))]
  for name, row in rows.items():
    lines.append(f"{name:{first}}" + "".join(f"  {text:>{width}}" for text, width in zip(row, widths)))
  lines += [f"{name}: {column['about']}" for name, column in columns.items()]
  if found["ceilings"]:
    lines += [f"ceilings: {found['ceilings']['matmul'] / 1e9:.4g} GFLOP/s, {found['ceilings']['copy'] / 1e9:.4g} GB/s"]
    lines += [FORMULA]
  return "\n".join(lines)


def _of(worker: Worker, ceilings: dict[str, float], sheet: float) -> dict[str, Any]:
  facts, seconds = worker.facts, _all(worker)
  median = statistics.median(seconds)
  quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
  found: dict[str, Any] = {
    "about": facts["about"],
    "versions": facts["versions"],
    "seconds": median,
    "seconds_quartiles": [quarters[0], quarters[2]],
    "core_seconds": statistics.median(worker.core_seconds),
    "calls": len(seconds),
  }
  found |= {f"{unit}_per_second": count / median for unit, count in facts["counts"].items()}
  if facts["flops"]:
    found |= {"gflops": facts["flops"] / 1e9, "gflops_per_second": facts["flops"] / 1e9 / median}
  if facts["flops"] and ceilings:
    bounds = facts["flops"] / ceilings["matmul"], facts["bytes"] / ceilings["copy"]
    found |= {"mfu_of_measured": bounds[0] / median, "roofline_seconds": list(bounds)}
    found["share_of_roofline"] = max(bounds) / median
    if sheet:
      found["mfu_of_datasheet"] = facts["flops"] / median / sheet
  found |= {"peak_gib": worker.peak_bytes / GIB, "startup_seconds": worker.startup_seconds}
  if facts["compile_seconds"]:
    found["compile_seconds"] = facts["compile_seconds"]
  return found


def _all(worker: Worker) -> list[float]:
  return [each for turn in worker.seconds for each in turn]


def _rate(worker: Worker) -> float:
  """The first unit a second, in the median as all: so both sides of a share are of the same machine."""
  return _amount(worker) / statistics.median(_all(worker))


def _per_unit(worker: Worker, turn: int) -> float:
  return statistics.median(worker.seconds[turn]) / _amount(worker)


def _amount(worker: Worker) -> float:
  """How much of the first unit one call does."""
  return next(iter(worker.facts["counts"].values()))

"""Runs `clipflow bench` beside its peers and writes what came out into RESULTS.md: python -m tests.benchmarks.results.

Arguments are subjects (by default all that have a peer), or files with what `measure` found on another machine. Let
nothing else run meanwhile. A subject is run twice: all turns, and then one turn more from the compilation cache that
the first filled, for the time to the first step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clipflow_jax.bench.frame import PEERS, SUBJECTS

FILE = Path(__file__).parent / "RESULTS.md"
BARS = {
  "cpu": {"generation": 5.0, "understanding": 1.2, "contrastive": 1.2, "decode": 2.0, "draw": 1.5, "evaluate": 1.2},
  "h100": {"generation": 10.0, "understanding": 1.2, "contrastive": 1.2, "decode": 1.5, "draw": 1.5, "evaluate": 1.2},
}
HEAD = """| way | ours, ms | peer, ms | peer / ours (range of turns) | of core-seconds | target |
|---|---|---|---|---|---|"""


def measure(subject: str, folder: Path, rounds: int, size: str = "cpu", peer: str = "torch") -> dict[str, Any]:
  """The numbers of `clipflow bench SUBJECT --size=SIZE --peer=PEER`, both, and "warm_seconds" by way."""
  environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

  def bench(*options: str) -> dict[str, Any]:
    file = folder / "bench.json"
    command = [sys.executable, "-m", "clipflow_jax.cli", "bench", subject, f"--size={size}", f"--json={file}", *options]
    subprocess.run(command, env=environment, check=True, cwd=FILE.parents[2], stdout=sys.stderr)
    return json.loads(file.read_text())

  found = bench(f"--peer={peer}", f"--rounds={rounds}")
  warm = bench("--rounds=1")["ways"]
  seconds = {way: numbers["startup_seconds"] for way, numbers in warm.items()}
  return found | {"size": size, "peer": peer, "warm_seconds": seconds}


def table(found: dict[str, Any]) -> str:
  """A row for each way that has a peer, then what was run, how near it came to the roofline, and where."""
  rows, notes = [HEAD], []
  for way, ours in found["ways"].items():
    if "ratio" not in ours:
      continue
    peer = found["peers"][ours["peer"]]
    low, high = ours["ratio_range"]
    times = f"{1000 * ours['seconds']:.4g} | {1000 * peer['seconds']:.4g}"
    ratios = f"**{ours['ratio']:.2f}** ({low:.2f} - {high:.2f}) | {ours['ratio_of_core_seconds']:.2f}"
    rows.append(f"| {way} | {times} | {ratios} | {BARS[found['size']].get(found['subject'], '-')} |")
    warm = found.get("warm_seconds", {}).get(way)
    first = f"first call after {ours['startup_seconds']:.1f} s" + (f", {warm:.1f} s from a warm cache" if warm else "")
    notes.append(f"- {way}: {ours['about']}. {_roofline(ours)}Peak {ours['peak_gib']:.2f} GiB; {first}.")
  for name, peer in found["peers"].items():
    notes.append(f"- {name}: {peer['about']}. Peak {peer['peak_gib']:.2f} GiB.")
  return "\n".join([*rows, "", *notes, _where(found)])


def _roofline(ours: dict[str, Any]) -> str:
  if "roofline_seconds" not in ours:
    return ""
  compute, memory = (f"{1000 * seconds:.3g} ms" for seconds in ours["roofline_seconds"])
  share = f"{ours['share_of_roofline']:.0%} of the roofline"
  return f"{ours['gflops']:.4g} GFLOP: {compute} at the matmul ceiling, {memory} to move the state; {share}. "


def _where(found: dict[str, Any]) -> str:
  machine, ceilings = found["machine"], found["ceilings"]
  columns = (*found["ways"].values(), *found["peers"].values())
  versions = {name: version for column in columns for name, version in column["versions"].items()}
  device = "" if found["device"] in ("", "cpu") else f"{found['device']}; "
  parts = [f"- {device}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"]
  parts += [f"load before {machine['load_before']:.2f}"]
  if ceilings:
    parts += [f"matmul {ceilings['matmul'] / 1e9:.4g} GFLOP/s, copy {ceilings['copy'] / 1e9:.3g} GB/s"]
  parts += [", ".join(f"{name} {version}" for name, version in sorted(versions.items()))]
  return "; ".join(parts) + f". `clipflow bench {found['subject']} --size={found['size']} --peer={found['peer']}`."


def write(text: str, found: dict[str, Any]) -> str:
  """The page with what stood between the subject's marks replaced, or with a chapter more."""
  name = f"{found['subject']}, {found['size']}, beside {found['peer']}"
  begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  block = "\n".join([begin, table(found), end])
  pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
  if pattern.search(text):
    return pattern.sub(lambda _: block, text)
  return text.rstrip() + f"\n\n## {name.capitalize()}\n\n{block}\n"


def main(subjects: list[str], rounds: int = 5) -> None:
  for subject in subjects or [name for name in SUBJECTS if (PEERS / f"torch_{name}.py").is_file()]:
    if subject.endswith(".json"):
      found = json.loads(Path(subject).read_text())
    else:
      with tempfile.TemporaryDirectory() as scratch:
        found = measure(subject, Path(scratch), rounds)
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else "# Benchmark results\n"
    FILE.write_text(write(text, found), encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])

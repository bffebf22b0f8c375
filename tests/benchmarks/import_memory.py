"""Peak memory of an import: python tests/benchmarks/import_memory.py [GIB]

Writes a synthetic Llama of so many GiB (2) in bfloat16 under a scratch folder, loads it in a process of its own, and
prints that process's peak resident memory over what it had just before, beside what an import may take: all
parameters, which stay, and 1.3 times the largest one. Linux tells the peak (/proc/self/status).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from clipflow_jax.interop import huggingface
from clipflow_jax.models.transformer import Transformer

GIB = 2**30


def write(folder: Path, gib: float) -> None:
  """A checkpoint of about `gib` GiB in eight layers, a file for each tensor that is large."""
  fields = dict(vocabulary=32_000, layers=8, heads=16, kv_heads=4, head_dim=128, mlp=5632, qk_norm=False)
  # Of a layer's numbers all grow with the width: 2 width (2048 + 512) + 3 width 5632.
  width = round(gib * GIB / 2 / (8 * (2 * 2560 + 3 * 5632) + 2 * 32_000) / 128) * 128
  module = Transformer(**fields, width=width, tie_embeddings=False)
  family = huggingface.family("llama")
  abstract = family.parameters(module)
  value = np.dtype(ml_dtypes.bfloat16).type(0.01)
  params = jax.tree.map(lambda leaf: np.broadcast_to(value, leaf.shape), abstract)
  huggingface.SHARD = "512MB"
  huggingface.save(folder, module, params)


def measure(folder: str) -> dict[str, float]:
  """In GiB, of this process: its memory before, its peak in a load, all parameters, and the largest."""
  jax.block_until_ready(jax.numpy.zeros(1))
  huggingface.read_config(Path(folder))  # which imports what a load imports
  Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not with the imports
  before = resident("VmRSS")
  _, params = huggingface.load(folder)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(params))]
  found = {"before": before, "peak": resident("VmHWM"), "parameters": sum(sizes), "largest": max(sizes)}
  return {name: value / GIB for name, value in found.items()}


def resident(which: str) -> int:
  """Bytes of this process's memory, by that line of its status."""
  line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:"))
  return int(line.split()[1]) * 1024


def main(gib: float) -> int:
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / "model"
    write(folder, gib)
    done = subprocess.run([sys.executable, __file__, "--load", folder], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
  taken = found["peak"] - found["before"]
  bound = found["parameters"] + 1.3 * found["largest"]
  print(" ".join(f"{name} {value:.3f} GiB;" for name, value in found.items()))
  print(f"an import took {taken:.3f} GiB; all parameters and 1.3 times the largest are {bound:.3f} GiB")
  return int(taken > bound)


if __name__ == "__main__":
  if "--load" in sys.argv:
    print(json.dumps(measure(sys.argv[-1])))
  else:
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0))

"""Whether memory stays flat: python -m tests.benchmarks.memory_over_steps [STEPS]

Trains a pixel decoder of a few thousand parameters on a folder of pictures, decoded, captioned and batched as in any
run, for so many steps (50,000), with checkpoints as often as in any, and prints ten times on the way the process's
resident memory, which Linux tells, and how many Python objects are alive: where the first alone grows, no object is
kept. Every checkpoint gives free memory back. What it leaves behind is TensorStore's (0.1.86: a call of
`KvStore.Spec.to_json` loses four objects): some 25 kB of a state of 40 arrays.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
from pathlib import Path

from clipflow_jax.training import loop
from tests import tiny_data, tiny_runs
from tests.benchmarks.import_memory import resident

MIB = 2**20
GROWTH = 1.02  # of the last tenth over the second: buffers fill and lists grow to their size in the first


def main(steps: int) -> int:
  found: list[tuple[int, float]] = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = tiny_data.folder(Path(scratch) / "pictures", tiny_data.samples(200))
    config = tiny_runs.decoder_stage(steps=steps, log_every=100, checkpoint_every=1000, sample_every=steps // 10)
    config.data.source = dict(kind="folder", path=str(folder), size=tiny_runs.SIZE)
    config.data.batch_size = 2

    def look(model, config, params, chat, step, writer, due):
      found.append((step, resident("VmRSS") / MIB))
      gc.collect()
      print(f"step {step:,}: {found[-1][1]:.1f} MiB, {len(gc.get_objects()):,} objects", flush=True)

    logging.disable(logging.INFO)
    loop.train(config, Path(scratch) / "run", look)
  growth = found[-1][1] / found[1][1]
  print(f"from step {found[1][0]:,} to {found[-1][0]:,} it grew {growth:.3f} times; at most {GROWTH} is flat")
  return int(growth > GROWTH)


if __name__ == "__main__":
  sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000))

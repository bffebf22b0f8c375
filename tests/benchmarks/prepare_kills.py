"""`clipflow prepare` killed at random: python tests/benchmarks/prepare_kills.py FOLDER [KILLS [SIZE]]

Prepares FOLDER of captioned pictures once, undisturbed, and prints the pictures per second. Then again, each attempt
but the last killed (SIGKILL) at a random moment of what the first took, KILLS (10) times, and compares every byte.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTH = 512  # records of a shard: several complete ones between two kills
PROGRAM = """
import sys
from clipflow_jax.data.folder import FolderSource
from clipflow_jax.data.prepare import prepare
prepare(FolderSource(sys.argv[1], int(sys.argv[3]), "all"), sys.argv[2], length=int(sys.argv[4]), dedup=True)
"""


def start(folder: str, output: Path, size: str) -> subprocess.Popen:
  command = [sys.executable, "-c", PROGRAM, folder, str(output), size, str(LENGTH)]
  return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(folder: str, kills: int = 10, size: str = "60") -> int:
  with tempfile.TemporaryDirectory() as scratch:
    whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
    begun = time.perf_counter()
    if start(folder, whole, size).wait():
      return 1
    seconds = time.perf_counter() - begun
    records = sum(1 for _ in (Path(folder) / "captions.jsonl").open())
    print(f"{records} records in {seconds:.1f} s, {records / seconds:.0f} a second", flush=True)
    chance, done = random.Random(0), 0
    while done < kills:
      process = start(folder, killed, size)
      try:
        # The first seconds are imports; the later the kill, the fewer are left to be survived.
        process.wait(chance.uniform(0.02, 1.5 / kills) * seconds + 2)
        print(f"the run was over after {done} kills: begun anew", flush=True)
        for path in killed.iterdir():
          path.unlink()
        killed.rmdir()
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        shards = len(list(killed.with_name("killed.partial").glob("parts/[0-9]*.json")))
        print(f"kill {done}: {shards} shards complete", flush=True)
    if start(folder, killed, size).wait():
      return 1
    same = contents(whole) == contents(killed)
    print(f"{len(contents(whole))} files, byte for byte the same: {same}")
    return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4]))

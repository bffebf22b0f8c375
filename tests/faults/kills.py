"""A run that is killed at random points, as a program: kills.py FOLDER LIVES. Prints a JSON line for every life.

A life is a fork of this process, which has imported everything and started nothing: it restores, steps, saves every
EVERY steps in the background, and is killed after some steps. Every third time the newest step is damaged as well.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from clipflow_jax.training import checkpoint

EVERY, SIZE = 3, 1 << 18  # a state of 1 MiB takes about as long to write as a few steps


def expected(step: int) -> jax.Array:
  """The state after `step` steps, whatever has happened in between."""
  return jnp.arange(SIZE, dtype=jnp.float32) * step


def live(folder: Path) -> None:
  """Goes on from the newest checkpoint until killed. Its diary: "restored N", "step N", "saving N"."""
  with (folder / "diary").open("w", buffering=1) as diary:
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = checkpoints.restore({"x": jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=place)})
    step, x = (found.step, found.state["x"]) if found else (0, expected(0))
    exact = bool((x == expected(step)).all()) and (not found or found.data_state == {"next": step})
    diary.write(f"restored {step if exact else -1}\n")
    pace = random.Random(step).choice([0.0, 0.03])  # kills fall into a save at one, mostly between saves at the other
    while True:
      step += 1
      x = x + jnp.arange(SIZE, dtype=jnp.float32)
      diary.write(f"step {step}\n")
      if step % EVERY == 0:
        checkpoints.save(step, {"x": x}, data_state={"next": step}, meta={})
        diary.write(f"saving {step}\n")
      time.sleep(pace)


def last(folder: Path, what: str) -> int | None:
  """The newest number that the diary of this life has behind `what`."""
  diary = folder / "diary"
  lines = (line.split() for line in (diary.read_text().splitlines() if diary.exists() else ()))
  numbers = [int(line[1]) for line in lines if len(line) == 2 and line[0] == what]
  return numbers[-1] if numbers else None


def damage(checkpoints: Path) -> bool:
  """Cuts the largest file of the newest step short, if there is an older one to fall back to."""
  steps = sorted((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
  if len(steps) < 2:
    return False
  largest = max((path for path in steps[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  return True


def main(folder: Path, lives: int) -> None:
  chance = random.Random(0)
  for life in range(lives):
    (folder / "diary").unlink(missing_ok=True)
    child = os.fork()
    if not child:
      live(folder)
    steps = chance.randrange(4 * EVERY)
    while last(folder, "restored") is None or (folder / "diary").read_text().count("step") < steps:
      time.sleep(0.005)
      assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
    time.sleep(chance.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    damaged = life % 3 == 2 and damage(folder / "checkpoints")
    words = {what: last(folder, what) for what in ("restored", "step", "saving")}
    print(json.dumps(words | {"damaged": damaged}), flush=True)


if __name__ == "__main__":
  main(Path(sys.argv[1]), int(sys.argv[2]))

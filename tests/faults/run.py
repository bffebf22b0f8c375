"""A run small enough to be started many times, as a program: run.py WORKDIR [STEP=DEED...], by one process or many.

At STEP a process does something to itself: kill1 (process 1 dies), stop0 (process 0 gets SIGTERM, of which the others
hear within seconds: the steps behind it are slow). devices=N: how many each process has. Each writes what its rows of
every batch were to rows.PROCESS.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from clipflow_jax.parallel import distributed
from clipflow_jax.training import loop
from configs import presets
from tests import tiny_runs

STEPS, EVERY = 6, 2
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


def config(**fields) -> ConfigDict:
  """Two towers of one layer by contrast, in which every row of a batch meets every other."""
  clip = tiny_runs.model()["clip"]
  towers = dict(vision=dict(clip["vision"], layers=1), text=clip["text"], captioner=None)
  made = presets.stage(
    "contrastive",
    model=tiny_runs.model(clip=towers, transformer=None, pixel_decoder=None),
    tokenizer=dict(vocabulary=300, examples=20),
    train=presets.trains(clip=1.0),
    steps=STEPS,
    log_every=1,
    checkpoint_every=EVERY,
    keep=2,
  )
  made.data.source = dict(kind="shapes", size=tiny_runs.SIZE, counts=(1.0,), questions=0)
  made.data.update(tasks=dict(caption=1.0), length=64, batch_size=8, shards=8)
  made.objective.weights = dict(contrastive=1.0)
  made.optimizer = dict(name="adamw", learning_rate=0.001, warmup=1, clip=1.0)
  made.update(fields)
  return made


def recorded(workdir: Path):
  """`distributed.assemble`, which writes every row that it is given."""
  assemble = distributed.assemble

  def record(local, rows, total, shardings):
    line = {int(row): _digest(jax.tree.map(lambda leaf, i=i: leaf[i], local)) for i, row in enumerate(rows)}
    with (workdir / f"rows.{jax.process_index()}.jsonl").open("a") as file:
      file.write(json.dumps(line) + "\n")
    return assemble(local, rows, total, shardings)

  return record


def _digest(row) -> str:
  return hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(row))).hexdigest()[:16]


def deeds(asked: dict[str, str]):
  """A sampler that does at its step what is asked."""

  def sample(model, config, params, chat, step, writer, due):
    deed = asked.get(str(step), "")
    if deed and jax.process_index() == int(deed[4:]):
      os.kill(os.getpid(), SIGNALS[deed[:4]])
    if any(when <= str(step) and what.startswith("stop") for when, what in asked.items()):
      time.sleep(1)

  return sample


def main(workdir: Path, asked: dict[str, str]) -> None:
  logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
  jax.config.update("jax_num_cpu_devices", int(asked.pop("devices", 1)))
  workdir.mkdir(parents=True, exist_ok=True)
  distributed.assemble = recorded(workdir)
  with distributed.joined():
    loop.train(config(sample_every=1), workdir, deeds(asked))


if __name__ == "__main__":
  main(Path(sys.argv[1]), dict(argument.split("=") for argument in sys.argv[2:]))

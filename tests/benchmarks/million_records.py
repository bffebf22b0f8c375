"""Start-up and resumption over a large prepared set: python -m tests.benchmarks.million_records [RECORDS [STEP]]

Writes RECORDS (1e6) tiny captioned pictures as `clipflow prepare` writes them, and measures in a process of its own
each, imports aside: opening the source and making the first batch; and the same from where a run stands after STEP
(1e6) steps of eight rows. That place is not walked to: what a checkpoint holds is a number of items, which is set. At
step 50 it is checked that the batches are those of a run that walked there.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from clipflow_jax.data import prepared, sources, text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.mixture import Part
from clipflow_jax.data.pipeline import TOGETHER, Pipeline
from clipflow_jax.data.records import Record
from clipflow_jax.data.sequence import Layout
from clipflow_jax.data.stored import share
from tests import tiny_data

SHARD, ROWS, CHECKED = 4096, 8, 50


def write(folder: Path, count: int) -> None:
  picture, shards = tiny_data.picture(128), []
  for start in range(0, count, SHARD):
    file = folder / f"{start // SHARD:05d}.array_record"
    records = range(start, min(start + SHARD, count))
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in records:
      writer.write(prepared.pack(Record(f"record {i}", (f"number {i % 100}",), (), (picture,), "")))
    writer.close()
    shards.append({"file": file.name, "records": len(records), "bytes": file.stat().st_size, "sha256": ""})
  np.save(folder / prepared.INDEX, np.array([share(f"record {i}") for i in range(count)]))
  manifest = {"records": count, "shards": shards, "request": {}}
  (folder / prepared.MANIFEST).write_text(json.dumps(manifest))


def stream(folder: Path, chat: text.Chat):
  source = sources.make({"kind": "prepared", "path": str(folder), "size": 8}, "train")
  layout = Layout(length=32, images=1, grid=1)
  parts = (Part(source),)
  pipeline = Pipeline(parts=parts, chat=chat, layout=layout, batch_size=ROWS, tasks={"caption": 1.0})
  return pipeline.batches(BadRecords(None, 0.0))


def at(state: dict[str, Any], step: int) -> dict[str, Any]:
  """What `state`, of the beginning, is after `step` batches: how many lists are taken, wherever it stands, says all."""
  state = copy.deepcopy(state)

  def walk(node: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else ():
      if key == "next_index":
        node[key] = step * ROWS // TOGETHER
      walk(value)

  walk(state)
  return state


def measure(folder: Path, step: int) -> None:
  """Prints seconds from nothing to a batch."""
  chat = text.Chat(text.train_tokenizer(["number 0 1 2 3 4 5 6 7 8 9"], 300))
  start = time.perf_counter()
  batches = stream(folder, chat)
  if step:
    batches.set_state(at(batches.get_state(), step))
  next(batches)
  seconds = time.perf_counter() - start
  print(f"{'resumed at step ' + format(step, ',') if step else 'started'}: {seconds:.2f} s")


def check(folder: Path) -> None:
  chat = text.Chat(text.train_tokenizer(["number 0 1 2 3 4 5 6 7 8 9"], 300))
  walked, jumped = stream(folder, chat), stream(folder, chat)
  jumped.set_state(at(jumped.get_state(), CHECKED))
  for _ in range(CHECKED):
    next(walked)
  for _ in range(3):
    np.testing.assert_array_equal(next(walked).tokens, next(jumped).tokens)


def main(records: int, step: int) -> None:
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    write(Path(folder), records)
    print(f"wrote {records:,} records in {time.perf_counter() - start:.0f} s", flush=True)
    check(Path(folder))
    for place in (0, step):
      subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.million_records", "measure", folder, str(place)], check=True
      )


if __name__ == "__main__":
  if sys.argv[1:2] == ["measure"]:
    measure(Path(sys.argv[2]), int(sys.argv[3]))
  else:
    main(*(int(float(x)) for x in [*sys.argv[1:], *("1e6", "1e6")[len(sys.argv) - 1 :]]))

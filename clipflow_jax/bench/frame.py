"""What is timed, and how: each piece of work in a process of its own, all of them in turns.

A subject is made of ways, which are configs; each way becomes a `Work` in a process that `serve`s it, and so does a
peer's. Of the others one always waits while one runs, so that what the machine does besides falls on all alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from clipflow_jax.errors import UserError

# Subject -> "module:function", which makes the `Work` of one way from its config (those are in configs/bench.py).
SUBJECTS = {
  "generation": "clipflow_jax.bench.training:step",
  "understanding": "clipflow_jax.bench.training:step",
  "contrastive": "clipflow_jax.bench.training:step",
  "data": "clipflow_jax.bench.data:work",
  "decode": "clipflow_jax.bench.inference:decode",
  "draw": "clipflow_jax.bench.inference:draw",
  "evaluate": "clipflow_jax.bench.inference:evaluate",
}
CEILINGS = ("matmul", "copy")  # of `ceiling.work`: the most that this machine does of each
PEERS = Path("tests", "benchmarks", "peers")  # of a checkout: the one that is worked in, else the one imported from
LIBRARIES = {"jax": "jax", "torch": "torch", "transformers": "transformers", "diffusers": "diffusers"}
LIBRARIES |= {"open_clip": "open_clip_torch", "PIL": "pillow", "grain": "grain"}  # module -> distribution
LIBRARIES |= {"torch_fidelity": "torch-fidelity"}


@dataclasses.dataclass(frozen=True)
class Work:
  """What one call does, and what is known of it before."""

  # Does it once, and returns None when it is done, or sooner what waits until it is.
  run: Callable[[], Callable[[], Any] | None]
  counts: dict[str, float]  # how much that is: {"images": 64.0, "tokens": 4096.0}, the unit of ratios first
  about: str  # its sizes in words, to be printed
  flops: float = 0.0  # model FLOPs of a call: 2 for each multiply-add that the mathematics asks for, none done twice
  bytes: float = 0.0  # that a call has to move between memory and processor
  compile_seconds: float = 0.0
  dtype: str = "float32"  # of its matrix products
  peer: dict[str, Any] | None = None  # what a peer has to be told to do the same; None: there is none
  memory: Callable[[], float] | None = None  # peak bytes of the device; None: of the process
  device: str = ""  # what it runs on, by the name that data sheets are found by


def serve(make: Callable[[dict[str, Any]], Work]) -> None:
  """The life of a process: its first line of stdin tells what to make, each further one how often to run it.

  Every line is answered by one of JSON on stdout: first what was made, then the seconds, of the clock and of all
  processors, of each run.
  """
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print goes where errors go
  work = make(json.loads(sys.stdin.readline()))
  facts = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
  del facts["run"], facts["memory"]
  versions = {name: metadata.version(name) for module, name in LIBRARIES.items() if module in sys.modules}
  print(json.dumps(facts | {"versions": versions}), file=answers)
  for line in sys.stdin:
    seconds, core_seconds = timed(work, int(line))
    peak = work.memory() if work.memory else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "core_seconds": core_seconds, "peak_bytes": peak}), file=answers)


def timed(work: Work, calls: int) -> tuple[list[float], list[float]]:
  """The seconds, of the clock and of all processors, from the end of one call to the next one's.

  The next is begun before one is waited for, as a training loop does, which waits for none: where another chip computes
  it has something to do meanwhile.
  """
  marks = [(time.perf_counter(), time.process_time())]

  def mark(wait: Callable[[], Any] | None) -> None:
    if wait:
      wait()
    marks.append((time.perf_counter(), time.process_time()))

  before = None
  for _ in range(calls):
    now = work.run()
    if before:
      mark(before)
    if now is None:
      mark(None)
    before = now
  if before:
    mark(before)
  clock, processor = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)), strict=True)
  return list(clock), list(processor)


class Worker:
  """A process that serves, seen from outside. `start` it; then `turn` runs it. Its seconds are kept by turn."""

  def __init__(self, name: str, command: list[str], told: dict[str, Any]):
    self.name, self.told, self._command = name, told, command
    self.facts: dict[str, Any] = {}
    self.seconds: list[list[float]] = []
    self.core_seconds: list[float] = []
    self.startup_seconds = self.peak_bytes = 0.0
    self._calls = 1

  def start(self, turn_seconds: float) -> None:
    """From nothing to the first run, which is `startup_seconds`; a second run tells how many fill a turn."""
    begin = time.perf_counter()
    self._errors = tempfile.TemporaryFile("w+")
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= self.told.get("environment") or {}
    environment |= os.environ
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(
      self._command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
    )
    self.facts = self._ask(json.dumps(self.told))
    self._ask("1")
    self.startup_seconds = time.perf_counter() - begin
    once = self._ask("1")["seconds"][0]
    self._calls = max(1, min(1000, round(turn_seconds / once)))

  def turn(self) -> None:
    # Not counted: the host of a virtual machine takes back what lies free during others' turns, and to get it again is
    # dear. A program that goes on keeps it.
    self._ask("1")
    found = self._ask(str(self._calls))
    self.seconds.append(found["seconds"])
    self.core_seconds += found["core_seconds"]
    self.peak_bytes = found["peak_bytes"]

  def stop(self) -> None:
    if self._process.poll() is None:
      self._process.communicate()  # closes its stdin, which ends it
    self._errors.close()

  def _ask(self, line: str) -> dict[str, Any]:
    try:
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # it has ended, and says why
    answer = self._process.stdout.readline()
    if answer:
      return json.loads(answer)
    self._process.wait()
    self._errors.seek(0)
    raise UserError(f"bench {self.name} failed: {(self._errors.read().strip().splitlines() or ['without a word'])[-1]}")


def run(
  subject: str,
  ways: dict[str, dict[str, Any]],
  *,
  peer: str = "",
  rounds: int = 5,
  turn_seconds: float = 1.0,
  apart: bool = False,
) -> dict[str, list[Worker]]:
  """Runs all in turns, `rounds` of them of about `turn_seconds` each: {"ours", "peers", "ceilings"}, with their times.

  ways: name -> config, of the subject. peer: whose scripts PEER_SUBJECT.py of tests/benchmarks/peers run too, one
  process for all ways that tell it the same. apart: one begins when the one before has ended, all its turns done, for a
  device that has no room for all. UserError where there is no such peer, or where a process fails.
  """
  peers = next((root / PEERS for root in (Path.cwd(), Path(__file__).parents[2]) if (root / PEERS).is_dir()), PEERS)
  script = peers / f"{peer}_{subject}.py"
  if peer and not script.is_file():
    there = sorted(file.stem for file in peers.glob(f"*_{subject}.py"))
    raise UserError(
      f"there is no peer {peer!r} for {subject}: peers are the scripts in {PEERS} of a checkout, in which to run this"
      f" ({', '.join(there) or 'none for it'})"
    )
  found: dict[str, list[Worker]] = {"ours": [], "peers": [], "ceilings": []}
  serving = [sys.executable, "-m", "clipflow_jax.bench.serving"]

  def begin(kind: str, name: str, command: list[str], told: dict[str, Any]) -> Worker:
    worker = Worker(name, command, told)
    found[kind].append(worker)
    worker.start(turn_seconds)
    if apart:
      take_turns(worker)
      worker.stop()
    return worker

  def take_turns(*workers: Worker) -> None:
    for _ in range(rounds):
      for worker in workers:
        worker.turn()

  try:
    for way, config in ways.items():
      worker = begin("ours", way, [*serving, SUBJECTS[subject]], config)
      told = worker.facts["peer"]
      if peer and told is not None and told not in [other.told for other in found["peers"]]:
        begin("peers", f"{peer} {way}", [sys.executable, str(script)], told)
    if any(worker.facts["flops"] for worker in found["ours"]):
      for name in CEILINGS:
        begin(
          "ceilings",
          name,
          [*serving, "clipflow_jax.bench.ceiling:work"],
          dict(name=name, dtype=found["ours"][0].facts["dtype"]),
        )
    if not apart:
      take_turns(*found["ours"], *found["peers"], *found["ceilings"])
  finally:
    for workers in found.values():
      for worker in workers:
        worker.stop()
  return found

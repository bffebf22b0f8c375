"""When a run stands still: a watchdog that shows where."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

from clipflow_jax.parallel import distributed

HUNG = 75  # the exit code of a run that hung: EX_TEMPFAIL of sysexits.h, "try again later"


class Watchdog:
  """Dumps the stacks of all threads when a `beat` is `timeout` seconds late, once for every silence.

  ends: it then ends the process, and the other processes of the run, with code `HUNG`, so that what started them starts
  them again; else it only watches. Steps are dispatched ahead of the device, so that one beat may have to wait for all
  steps between two logs: the timeout must be longer than those take. 0 never barks.
  """

  def __init__(self, timeout: float, *, ends: bool = False):
    self._timeout, self._ends = timeout, ends
    self._where, self._due = "the start", time.monotonic() + timeout
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="clipflow-watchdog", daemon=True)

  def beat(self, where: str, takes: float = 0.0) -> None:
    """The run is alive and goes on to do `where`, which may take so many seconds beside the timeout; inf: any time."""
    self._where, self._due = where, time.monotonic() + takes + self._timeout

  def __enter__(self) -> Watchdog:
    self.beat(self._where)
    if self._timeout:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._timeout:
      self._thread.join()

  def _watch(self) -> None:
    told = 0.0  # the beat whose lateness has been told of
    while not self._over.wait(min(max(0.0, self._due - time.monotonic()) or self._timeout, self._timeout)):
      if self._due == told or time.monotonic() < self._due:
        continue
      told = self._due
      what = f"{self._where} has taken more than {self._timeout:g} s"
      print(f"clipflow: {what}; the stacks of all threads:", file=sys.stderr, flush=True)
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
      if self._ends:
        distributed.end(what, HUNG)

"""Where the time of a step goes: `config.profile` has some steps of a run traced by jax.profiler."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class Profile:
  """Traces `steps` steps, after the `first` that this process makes, into `folder`; 0 steps: none.

  Process 0 traces, itself and its devices. Whatever ends the `with` ends the trace.
  """

  def __init__(self, folder: Path, first: int, steps: int):
    self._folder, self._begin, self._end = folder, first, first + steps
    self._made = 0
    self._active = bool(steps) and jax.process_index() == 0
    self._tracing = False

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *_) -> None:
    if self._tracing:
      self._stop()
    elif self._active and self._made <= self._begin:
      log.warning("profile: the run has ended after %d steps, before the first to be traced", self._made)

  @contextlib.contextmanager
  def step(self, number: int, last: jax.Array) -> Iterator[None]:
    """Step `number` of the run is made inside. last: what the device makes at the end of the one before.

    Only where a trace begins and where it ends the device is waited for, so that it holds those steps and no others.
    """
    if self._active and self._made in (self._begin, self._end):
      last.block_until_ready()
      if self._tracing:
        self._stop()
      else:
        jax.profiler.start_trace(self._folder)
        self._tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield
    self._made += 1

  def _stop(self) -> None:
    self._tracing = False
    jax.profiler.stop_trace()
    log.info("traced %d steps into %s", self._made - self._begin, self._folder)

"""Dynamic batching: one worker owns the model, and computes together what came in for it at about the same time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipflow_jax.errors import UserError

log = logging.getLogger(__name__)

# (settings, items of these settings) -> for each step of the computation, the next piece for each item.
Compute = Callable[[Any, list], Iterator[Sequence]]


class Full(Exception):
  """More waits than may."""

  def __init__(self, seconds: int):
    super().__init__(f"the queue is full; come again in {seconds} s")
    self.seconds = seconds


class Closed(Exception):
  """Nothing is taken any more."""


class Failed(Exception):
  """The computation failed; the log says why."""


class _End:
  """Behind the last piece."""


class Job:
  """One item on its way. Iterate for the pieces of its answer, at most up to Failed."""

  def __init__(self, settings: Hashable, item: Any):
    self.settings, self.item = settings, item
    self.dropped = False  # nobody waits for it any more
    self._pieces: asyncio.Queue = asyncio.Queue()

  def put(self, piece: Any) -> None:
    self._pieces.put_nowait(piece)

  def __aiter__(self) -> Job:
    return self

  async def __anext__(self) -> Any:
    piece = await self._pieces.get()
    if isinstance(piece, _End):
      raise StopAsyncIteration
    if isinstance(piece, Failed):
      raise piece
    return piece


class Batcher:
  """A bounded queue before a computation that runs in one thread. Lives in one event loop, where `work` has to run.

  compute: see `Compute`; size: items computed together; wait: seconds that the first of a batch waits for company when
  nothing else is to do; limit: items that may wait, those among them that are still being made.
  """

  def __init__(self, compute: Compute, *, size: int, wait: float = 0.005, limit: int = 128):
    self.compute, self.size, self.wait, self.limit = compute, size, wait, limit
    self.closed = False
    self._jobs: list[Job] = []
    self._kept = 0  # places of items that are still being made
    self._news = asyncio.Event()
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
    self._seconds = 1.0  # that a batch takes, of late

  @property
  def waiting(self) -> list[Job]:
    """Jobs that are not begun and that somebody waits for, the oldest first."""
    return [job for job in self._jobs if not job.dropped]

  @property
  def length(self) -> int:
    """Items that wait, and those that are still being made and have their places."""
    return len(self.waiting) + self._kept

  @contextlib.contextmanager
  def places(self, n: int) -> Iterator[None]:
    """Keeps places for n items while they are made, which are then to be submitted at once. Raises as `submit`."""
    self._check_room(n)
    self._kept += n
    try:
      yield
    finally:
      self._kept -= n

  def submit(self, settings: Hashable, items: Sequence) -> list[Job]:
    """A job for each item, all or none. Only items of equal settings are computed together.

    Raises Full or Closed, and UserError for more items than may ever wait.
    """
    self._check_room(len(items))
    jobs = [Job(settings, item) for item in items]
    self._jobs = self.waiting + jobs
    self._news.set()
    return jobs

  def check_open(self) -> None:
    """Raises Closed."""
    if self.closed:
      raise Closed("no more is taken: the server is about to stop")

  def _check_room(self, n: int) -> None:
    self.check_open()
    if n > self.limit:
      raise UserError(f"{n} at once do not fit a queue of {self.limit}; ask for fewer")
    if self.length + n > self.limit:
      raise Full(math.ceil(self._seconds * (1 + self.length // self.size)))

  def close(self) -> None:
    """Takes no more. `work` returns when all that waits is done."""
    self.closed = True
    self._news.set()

  async def work(self) -> None:
    """Computes what comes in, the oldest and those like it first, until closed."""
    while self.waiting or not self.closed:
      if not self.waiting:
        self._news.clear()
        await self._news.wait()
        continue
      if len(self._next()) < self.size and not self.closed:
        await asyncio.sleep(self.wait)
      jobs = self._next()
      self._jobs = [job for job in self.waiting if job not in jobs]
      if jobs:
        await self._answer(jobs)

  def _next(self) -> list[Job]:
    waiting = self.waiting
    return [job for job in waiting if job.settings == waiting[0].settings][: self.size]

  async def _answer(self, jobs: list[Job]) -> None:
    start = time.monotonic()
    end: _End | Failed = _End()
    try:
      steps = self.compute(jobs[0].settings, [job.item for job in jobs])
      in_thread = asyncio.get_running_loop().run_in_executor
      while not all(job.dropped for job in jobs):
        pieces = await in_thread(self._thread, next, steps, None)
        if pieces is None:
          break
        for job, piece in zip(jobs, pieces, strict=True):
          job.put(piece)
    except Exception:  # theirs alone: the worker goes on
      log.exception("a batch of %d failed", len(jobs))
      end = Failed("the model failed")
    for job in jobs:
      job.put(end)
    self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - start)

"""Bad records are counted, named and skipped; too many of them stop the run."""

from __future__ import annotations

import collections
import functools
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from clipflow_jax.data.example import BadRecord
from clipflow_jax.errors import UserError

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MIN_SEEN = 100  # a fraction of fewer records says nothing
SHOWN = 5  # names in the error itself
CROWDED = 0.1  # the share of examples without room in their rows that is worth a warning


class BadRecords:
  """Counts what was read and what could not be, and writes the first `limit` distinct names to `path`.

  A line of the file is {"name", "kind", "why"}; the kind is what stands before the colon of the reason. Names
  that are in the file already, from an earlier run, are not written again. Safe to share among threads; each
  worker process counts for itself and appends to the same file.
  """

  def __init__(self, path: Path | None, max_fraction: float, limit: int = 100):
    if not 0 <= max_fraction <= 1:
      raise UserError(f"the largest fraction of bad records is {max_fraction}: give one from 0 to 1")
    self.path = path
    self.max_fraction = max_fraction
    self.limit = limit
    self.seen = 0
    self.packed = self.left_out = 0  # good ones, and those among them for which their row had no room
    self._told = False  # that these are many
    self.kinds: collections.Counter[str] = collections.Counter()
    self.named = {} if path is None else _read(path)  # name -> reason
    self._lock = threading.Lock()

  @property
  def bad(self) -> int:
    return self.kinds.total()

  def guard(self, fn: Callable[P, T]) -> Callable[P, T | None]:
    """`fn`, with None, which Grain's MapDataset drops, instead of a BadRecord.

    The guarded function raises UserError, with names, once so many of at least 100 records were bad that more than
    `max_fraction` of the data are, or all were: an endless stream without a good one would be read for ever.
    """

    @functools.wraps(fn)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T | None:
      try:
        result = fn(*args, **kwargs)
      except BadRecord as error:
        self.add(1, {error.kind: 1}, [(error.name, error.why)])
        if self.bad == self.seen >= MIN_SEEN:
          raise UserError(f"{self.summary()}; mend them") from error
        return None
      self.add(1, {}, ())
      return result

    return guarded

  def leave_out(self, count: int, of: int) -> None:
    """Counts `of` more examples, for `count` of which their row had no room. Warns once, when they are too many."""
    with self._lock:
      self.packed, self.left_out = self.packed + of, self.left_out + count
      if not self._told and self.packed >= MIN_SEEN and self.left_out > CROWDED * self.packed:
        self._told = True
        share = f"{self.left_out / self.packed:.0%}"
        log.warning("%s of the examples, the longest first, have no room in their rows: raise data.length", share)

  def summary(self) -> str:
    """One line: how many of how many were bad, of which kinds, and the first names."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
    names = "; ".join(f"{name} ({why})" for name, why in list(self.named.items())[:SHOWN])
    return f"{self.bad} of {self.seen} records are bad ({kinds}): {names}"

  def add(self, seen: int, kinds: Mapping[str, int], named: Iterable[tuple[str, str]]) -> None:
    """Counts `seen` more records, of which so many of each kind were bad, the first of them (name, reason).

    Raises UserError as a guarded function does.
    """
    with self._lock:
      self.seen += seen
      self.kinds.update(kinds)
      for name, why in named:
        if name not in self.named and len(self.named) < self.limit:
          self.named[name] = why
          self._write({"name": name, "kind": BadRecord(name, why).kind, "why": why})
      # Each host asks after each record, of a sample of the data: a fraction that is allowed must not stop one of many.
      if self.seen >= MIN_SEEN and self.bad > _by_chance(self.max_fraction, self.seen):
        self._stop()

  def check(self) -> None:
    """Raises UserError where more than `max_fraction` of the records were bad, all of which have now been seen."""
    if self.seen >= MIN_SEEN and self.bad > self.max_fraction * self.seen:
      self._stop()

  def _stop(self) -> NoReturn:
    more = "" if self.path is None else f"; more names are in {self.path}"
    raise UserError(f"{self.summary()}{more}; mend them or allow more than the fraction {self.max_fraction}")

  def _write(self, row: dict[str, str]) -> None:
    if self.path is not None:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with self.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")

  def __getstate__(self) -> dict[str, Any]:  # a lock does not travel to worker processes
    return {key: value for key, value in vars(self).items() if key != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _lock=threading.Lock())


def _by_chance(fraction: float, seen: int) -> float:
  """How many of the records seen may be bad where this fraction of all are: four deviations more, and one."""
  return fraction * seen + 4 * math.sqrt(fraction * (1 - fraction) * seen) + (fraction > 0)


def _read(path: Path) -> dict[str, str]:
  """{name: reason} of an earlier run's file; a last line that its end cut short is closed and passed over."""
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  if text and not text.endswith("\n"):
    with path.open("a", encoding="utf-8") as file:
      file.write("\n")
  named = {}
  for line in text.splitlines():
    try:
      row = json.loads(line)
      named[row["name"]] = row["why"]
    except (ValueError, KeyError, TypeError):
      continue
  return named

"""Tasks from a config to RESULT.json: asked in chunks, each answer kept as it comes, so that a stop costs one chunk.

What is measured is a function of (checkpoint, config, items): a chunk holds the same items whether an evaluation ran
through or was resumed, and a model's answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipflow_jax import files
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation.items import Item

log = logging.getLogger(__name__)

Scores = Mapping[str, np.ndarray]  # f64[N] each
# (scores, weights f64[N], categories [N]) -> metrics of items that count so many times; NaN of what none tells.
Summary = Callable[[Scores, np.ndarray, np.ndarray], dict[str, float]]


def means(scores: Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
  """The weighted mean of every score."""
  return {name: float(weights @ values / weights.sum()) for name, values in scores.items()}


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model made of one item. scores: numbers that the task's summary makes metrics of."""

  scores: Mapping[str, float]
  written: str = ""
  truth: str = ""


class Scorer(Protocol):
  """A task's way to ask: `score` answers items in their order, `summary` makes metrics of the scores."""

  def score(self, items: Sequence[Item]) -> list[Answer]: ...

  def summary(self, scores: Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]: ...


def run(file: Path, key: str, items: Sequence[Item], scorer: Scorer, *, chunk: int = 64) -> list[Answer]:
  """The answers to all items, read from `file` as far as they are there under the same key, the rest asked now.

  key: a text that changes with whatever changes an answer. File: JSON lines, the key first.
  """
  done = list(_kept(file, key))
  whole = len(done) if len(done) == len(items) else len(done) // chunk * chunk
  if whole:
    log.info("%s: %d of %d answers are there already", file.name, whole, len(items))
  file.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(file, "".join(_line(row) for row in [{"key": key}, *map(dataclasses.asdict, done[:whole])]))
  answers = done[:whole]
  with file.open("a", encoding="utf-8") as out:
    for start in range(whole, len(items), chunk):
      part = scorer.score(items[start : start + chunk])
      out.write("".join(_line(dataclasses.asdict(answer)) for answer in part))
      out.flush()
      os.fsync(out.fileno())
      answers += part
  return answers


def check_finite(found: np.ndarray, items: Sequence[Item]) -> None:
  """UserError with the first item of which f[n] or f[n,K] is not finite: NaN is below nothing, and would be right."""
  finite = np.isfinite(found).reshape(len(items), -1).all(axis=1)
  if not finite.all():
    raise UserError(
      f"the model gives numbers that are not finite for item {items[int(finite.argmin())].id}: its weights have "
      "diverged or overflow; evaluate an earlier checkpoint, or weights of another dtype"
    )


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(row, ensure_ascii=False) + "\n"


def _kept(file: Path, key: str) -> Iterator[Answer]:
  """The answers of a file of this key, up to the first that is not whole."""
  lines = file.read_bytes().split(b"\n") if file.is_file() else []  # not as text: it may end within a letter
  for number, line in enumerate(lines):
    try:
      row = json.loads(line)
    except ValueError:  # cut off when the process was killed
      return
    if number:
      yield Answer(**row)
    elif row != {"key": key}:
      log.warning("%s: the model, the config or the items have changed; asking anew", file)
      return


def summarise(
  answers: Sequence[Answer], items: Sequence[Item], summary: Summary, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
  """{"count", "metrics": {name: {"value", "low", "high"}}, "by_category": {category: the same}}.

  low, high: the 95 % interval of the percentile bootstrap over items (Efron 1979), those of one group together: what
  the choice of these items, or groups, leaves open. Metrics of which the items tell nothing are left out.
  """
  names = list(answers[0].scores)
  scores = {name: np.array([answer.scores[name] for answer in answers], np.float64) for name in names}
  categories = np.array([item.category for item in items])
  numbers: dict[str, int] = {}
  groups = np.array([numbers.setdefault(item.group or f"#{i}", len(numbers)) for i, item in enumerate(items)])
  metrics = _intervals(scores, categories, groups, summary, resamples, seed)
  found: dict[str, Any] = {"count": len(items), "metrics": metrics}
  distinct = sorted(set(categories.tolist()))
  if len(distinct) > 1:
    found["by_category"] = {}
    for category in distinct:
      rows = categories == category
      own = {name: values[rows] for name, values in scores.items()}
      metrics = _intervals(own, categories[rows], groups[rows], summary, resamples, seed)
      found["by_category"][category] = {"count": int(rows.sum()), "metrics": metrics}
  return found


def _intervals(
  scores: Scores, categories: np.ndarray, groups: np.ndarray, summary: Summary, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
  whole = summary(scores, np.ones(len(categories)), categories)
  metrics = {name: {"value": value} for name, value in whole.items() if not np.isnan(value)}
  distinct, group = np.unique(groups, return_inverse=True)
  n = len(distinct)
  if not resamples or n < 2:
    return metrics
  rng = np.random.default_rng(seed)
  drawn = [
    summary(scores, np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)[group], categories)
    for _ in range(resamples)
  ]
  for name, interval in metrics.items():
    low, high = np.nanpercentile([one[name] for one in drawn], [2.5, 97.5])
    interval |= {"low": float(low), "high": float(high)}
  return metrics


def key_of(*parts: Any) -> str:
  """A hash of what JSON can say."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

"""What an evaluation leaves: RESULT.json, a page with pictures, a table for the terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipflow_jax import files
from clipflow_jax.evaluation import page, report
from clipflow_jax.evaluation.suite import Done, Run, checkpoint
from clipflow_jax.evaluation.tasks import Answer

log = logging.getLogger(__name__)

SHOWN = 12  # answers of each task on the page, the first ones


def write(run: Run, done: Mapping[str, Done]) -> dict[str, Any]:
  """Writes run.directory/RESULT.json and index.html with its pictures, each whole or not at all; returns the result.

  RESULT.json is a function of checkpoint, config, data and software: no time, no memory, no place is in it. What it
  has of other tasks, measured of the same checkpoint with the same seed, resamples and software, stays in it and on the
  page, there without pictures.
  """
  file = run.directory / "RESULT.json"
  measured = {
    "checkpoint": checkpoint(run.model),
    "seed": run.seed,
    "resamples": run.resamples,
    **report.software(),
  }
  result = {"tasks": _kept(file, measured) | {name: one.result for name, one in done.items()}, **measured}
  text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
  run.directory.mkdir(parents=True, exist_ok=True)
  shown = {name: list(_shown(run, name, one)) for name, one in done.items()}
  files.write_text(run.directory / "index.html", page.results(result, shown))
  files.write_text(file, text)
  return result


def _kept(file: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
  """The tasks in a RESULT.json whose other parts are the same: there are none where it is not there or not whole."""
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
    tasks = found.pop("tasks", {})
  except (OSError, ValueError):
    return {}
  if found != measured:
    log.warning("%s is of another checkpoint, seed, number of resamples or software: it is replaced", file)
    return {}
  return tasks


def _shown(run: Run, name: str, done: Done) -> Iterator[tuple[str, str, Answer]]:
  """(file of the picture or "", question, answer) of the first answers; writes the pictures."""
  (run.directory / "pictures").mkdir(exist_ok=True)
  for number, (item, answer) in enumerate(zip(done.items[:SHOWN], done.answers, strict=False)):
    file = ""
    image = done.pictures(number) if done.pictures else None
    if image is None and item.picture is not None:
      image = item.look(run.model.image_size)
    if image is not None:
      file = f"pictures/{name}_{number:02d}.png"
      files.write(run.directory / file, Image.fromarray(np.asarray(image)).save)
    yield file, item.question, answer


def table(result: Mapping[str, Any]) -> str:
  """Every metric with its interval, a line each."""
  lines = []
  for name, task in result["tasks"].items():
    for metric, found in task["metrics"].items():
      interval = f"  [{found['low']:.4g}, {found['high']:.4g}]" if "low" in found else ""
      lines.append(f"{name:<24} {metric:<20} {found['value']:>10.4g}{interval:<22} n={task['count']}")
  return "\n".join(lines)

"""What a run has left in its workdir, each part on its own: what is missing or damaged is a line, not an end."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.data import pipeline
from clipflow_jax.errors import UserError
from clipflow_jax.inference.info import by_part, table
from clipflow_jax.training import checkpoint, settings, stages, state
from clipflow_jax.training.settings import Change
from clipflow_jax.webpage import number

Load = Callable[[str], ConfigDict]  # "file.py:arguments" -> its config; raises UserError
BAD = "data_errors*.jsonl"  # one for each process


@dataclasses.dataclass
class Stage:
  """One stage of a run. What could not be found out says so in `notes`."""

  name: str
  path: Path
  progress: str = "no checkpoint yet"
  file: str = ""  # of the config, with its arguments
  changes: list[Change] | None = None  # from the file (there) to the run (here); None where they were not compared
  parameters: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # part -> (trained, all)
  metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # rows of metrics.jsonl
  data: list[str] = dataclasses.field(default_factory=list)
  checkpoints: list[str] = dataclasses.field(default_factory=list)
  samples: list[Path] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def newest(self) -> dict[str, Any]:
    """The metrics of the last step that has any, of which there may be several rows; {} without."""
    last = [row for row in self.metrics if row["step"] == self.metrics[-1]["step"]]
    return {name: value for row in last for name, value in row.items()}


@dataclasses.dataclass
class Run:
  """A workdir: its stages, and the report of its evaluation if there is one."""

  path: Path
  stages: list[Stage]
  report: dict[str, Any] = dataclasses.field(default_factory=dict)


def look(path: Path | str, load: Load) -> Run:
  """All there is to tell of a workdir, without reading an array. load: how to read the file that a config came from.

  Raises UserError when there is no run.
  """
  path = Path(path)
  order = path / stages.ORDER
  try:
    names = [str(name) for name in json.loads(order.read_text())] if order.exists() else [""]
  except (OSError, ValueError) as error:
    raise UserError(f"{order} cannot be read ({error}): give the workdir of one stage, a folder beside it") from error
  if names == [""] and not any((path / left).exists() for left in ("checkpoints", "metrics.jsonl", "report")):
    raise UserError(f"{path} holds no run: give the workdir of clipflow train or clipflow quickstart")
  found = [_stage(path / name, name, load) for name in names]
  report = path / "report" / "metrics.json"
  return Run(path, found, _json(report, found[-1].notes) if report.exists() else {})


def describe(run: Run) -> str:
  """The run as tables for the terminal."""
  text = f"{run.path}\n" + table((), [row for stage in run.stages for row in _rows(stage)])
  if run.report:
    shown = [(name, number(value)) for name, value in run.report.items() if not isinstance(value, dict)]
    text += f"\n{run.path / 'report' / 'index.html'}\n" + table((), shown)
  return text


def _rows(stage: Stage) -> Iterator[tuple[str, str]]:
  yield stage.name or stage.path.name, stage.progress
  if stage.file:
    yield "  config", f"{stage.file}, as it is" if stage.changes == [] else stage.file
  for change in stage.changes or ():
    yield "", f"{change.key}: {change.here} (there {change.there})"
  parameters = [f"{part}: {trained:,} of {whole:,} trained" for part, (trained, whole) in stage.parameters.items()]
  if newest := stage.newest():
    values = [f"{key} {number(value)}" for key, value in newest.items() if key not in ("step", "stage")]
    yield "  metrics", f"step {newest['step']}: {', '.join(values)}"
  for name, lines in (("parameters", parameters), ("data", stage.data), ("checkpoints", stage.checkpoints)):
    for i, line in enumerate(lines):
      yield f"  {name}" if i == 0 else "", line
  if stage.samples:
    yield "  samples", f"{len(stage.samples)} samples, the last {stage.samples[-1]}"
  for note in stage.notes:
    yield "  note", note


def _stage(path: Path, name: str, load: Load) -> Stage:
  stage = Stage(name, path)
  if (path / "checkpoints").exists():
    stage.checkpoints = [_folder(folder) for folder in _newest_first(path / "checkpoints")]
    try:
      _tell(stage, checkpoint.load(path, ()), load)
    except UserError as error:
      stage.progress = str(error)
  try:
    stage.metrics = [row for row in stages.history(path) if isinstance(row, dict) and {"step", "stage"} <= row.keys()]
  except (OSError, ValueError) as error:
    stage.notes.append(f"metrics.jsonl cannot be read: {error}")
  bad = sum(len(file.read_text(errors="replace").splitlines()) for file in sorted(path.glob(BAD)))
  if bad:
    stage.data.append(f"{bad} bad records named in {BAD}")
  stage.samples = sorted(file for file in (path / "samples").glob("*") if file.is_file())
  return stage


def _tell(stage: Stage, read: checkpoint.Restored, load: Load) -> None:
  """What a checkpoint says of its stage."""
  config = read.meta.get("config", {})
  stage.name = config.get("name", stage.name)
  stage.progress = f"step {read.step} of {config.get('steps', '?')}"
  stage.file = config.get("file", "")
  if stage.file:
    try:
      stage.changes = _changes(load(stage.file), config)
    except UserError as error:
      stage.notes.append(f"the config's file cannot be compared: {error}")
  else:
    stage.notes.append("the run does not say which file its config came from")
  stage.parameters = _parameters(checkpoint.shapes(stage.path / "checkpoints" / str(read.step)))
  source = config.get("data", {}).get("source", {})
  rows = config.get("data", {}).get("batch_size", 0)
  stage.data.append(f"{source.get('kind', 'unknown')} data, {read.step} batches of {rows} rows")
  places = pipeline.places(read.data_state)
  if places:
    reached = f"{min(places):,}" if min(places) == max(places) else f"{min(places):,} to {max(places):,}"
    shards = [name for name in read.data_state if not name.startswith("records of")]
    stage.data.append(f"{len(shards)} shard(s) of the stream, at item {reached}")
  stage.data += [f"{count:,} {name}" for name, count in read.data_state.items() if isinstance(count, int)]


def _changes(there: ConfigDict, here: Mapping[str, Any]) -> list[Change]:
  """Settings that differ; of a file of several stages, those of the stage of this name."""
  if "order" in there:
    name = here.get("name")
    if name not in there.stages:
      raise UserError(f"it has no stage {name!r} any more")
    there = there.stages[name]
  return settings.changes(json.loads(there.to_json_best_effort()), here)


def _parameters(shapes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
  leaves = (
    (path, math.prod(getattr(leaf, "shape", ())), field == "trained")
    for field in ("trained", "frozen")
    for path, leaf in state.flatten(shapes.get(field) or {}).items()
  )
  return dict(sorted(by_part(leaves).items()))


def _newest_first(folder: Path) -> list[Path]:
  return sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime, reverse=True)


def _folder(folder: Path) -> str:
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  written = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
  return f"{folder.name}: {size / 1e6:,.1f} MB, {written}"


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
  """An object, {} with a note where the file holds none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError) as error:
    notes.append(f"{path} cannot be read: {error}")
    return {}

"""A run of several stages, each starting from the one before: workdir/STAGE is one stage's workdir."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from clipflow_jax import files
from clipflow_jax.errors import UserError, make_folder
from clipflow_jax.parallel import distributed
from clipflow_jax.training import checkpoint, loop, owed, settings

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of what `clipflow prepare` and `cache-features` write
ORDER = "stages.json"  # names in order: what tells a run of several stages from a single one


def train(config: ConfigDict, workdir: Path, sample: loop.Sampler | None = None) -> None:
  """One stage, or with `config.order` each of `config.stages` in that order. Finished stages are not run again.

  UserError for settings of any stage that make no run, before the first is run, and for a workdir that processes do not
  share, that another run is using, or that is something else.
  """
  for stage in [config.stages[name] for name in config.order] if "order" in config else [config]:
    settings.check(stage)
  others = (MANIFEST,) if "order" in config else (MANIFEST, ORDER)
  if found := next((name for name in others if (workdir / name).exists()), None):
    held = {MANIFEST: "prepared data", ORDER: "a run of several stages"}[found]
    raise UserError(f"{workdir} holds {held} (its {found}): give another --workdir")
  make_folder(workdir)
  distributed.share(workdir)
  with files.held(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
    if "order" in config:
      _train_in_order(config, workdir, sample)
    else:
      _train(config, workdir, sample)


def _train_in_order(config: ConfigDict, workdir: Path, sample: loop.Sampler | None) -> None:
  if jax.process_index() == 0:
    files.write_text(workdir / ORDER, json.dumps(list(config.order)))
  before = config.get("init_from", "")
  for name in config.order:
    stage = config.stages[name]
    if before and not stage.init_from:
      stage.init_from = str(before)
    _train(stage, workdir / name, sample)
    before = workdir / name


def _train(stage: ConfigDict, workdir: Path, sample: loop.Sampler | None) -> None:
  if is_finished(workdir, stage.steps):
    settings.compare(stage, workdir)
    log.info("%s has been trained to step %d: nothing to do", workdir, stage.steps)
  else:
    loop.train(stage, workdir, sample)


def is_finished(workdir: Path, steps: int) -> bool:
  """Whether a stage's newest checkpoint is of these steps, or of more, and whole as far as it tells unread.

  Also what was to be made of the last step must be.
  """
  newest = max(checkpoint.steps(workdir), default=-1)
  if newest < steps or owed.at(workdir, newest):
    return False
  try:
    return bool(checkpoint.shapes(workdir / "checkpoints" / str(newest)))
  except UserError:
    return False  # damaged: the stage goes on from the one before


def newest(path: Path | str) -> Path:
  """Where to load from: the last stage with a checkpoint for a run of several stages, else `path` itself."""
  path = Path(path)
  if not (path / ORDER).exists():
    return path
  for name in reversed(json.loads((path / ORDER).read_text())):
    if checkpoint.steps(path / name):
      return path / name
  raise UserError(f"no stage of {path} has a checkpoint yet; train it first")


def history(path: Path | str) -> list[dict[str, Any]]:
  """All lines of metrics.jsonl of a run, stages in order."""
  path = Path(path)
  names = json.loads((path / ORDER).read_text()) if (path / ORDER).exists() else [""]
  files = [path / name / "metrics.jsonl" for name in names]
  return [row for file in files if file.exists() for row in _rows(file)]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
  for line in file.read_text(encoding="utf-8").splitlines():
    try:
      yield json.loads(line)
    except ValueError:
      continue  # cut off when the process was killed

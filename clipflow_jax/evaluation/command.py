"""`clipflow evaluate`: a report on a run, chosen tasks of a model, or two folders of pictures compared."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.data import mixture, sources
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import bars, folders, report, results, suite
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training import stages


def report_on(
  workdir: Path,
  weights: str = "",
  *,
  begun: float | None = None,
  n: int = 1000,
  per_category: int | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Writes WORKDIR/report; returns its metrics. UserError for a run that has no data of its own.

  begun: the time at which this process began, where it has trained the run from the first step on.
  per_category: by default as `n` allows.
  """
  model = ClipFlow.from_checkpoint(workdir, weights=weights).spread()
  if "data" not in model.config:
    raise UserError(f"{workdir} was imported, without data to be measured on; name what is to be measured: --tasks=...")
  print(f"evaluating on {n} pictures")
  source = mixture.shown(model.config.data.source)
  shown: tuple[bars.Bar, ...] = ()
  if isinstance(source, sources.ShapesSource):
    shown = bars.QUICKSTART
    per_category = per_category or min(128, n)
    metrics, artefacts = report.evaluate_shapes(model, source, n=n, per_category=per_category, seed=seed)
  else:
    metrics, artefacts = report.evaluate_folder(model, source, n=n, seed=seed)
  if begun is None:  # of what the training took an evaluation knows what was written then
    run = report.of_training(workdir / "report")
  else:
    install = float(os.environ.get("CLIPFLOW_INSTALL_SECONDS", 0)) / 60
    run = {"minutes_total": (time.time() - begun) / 60 + install, "minutes_install": install}
  metrics = run | metrics
  metrics = report.write_report(workdir / "report", metrics, artefacts, stages.history(workdir), bars=shown)
  print(bars.table(metrics, shown))
  print(f"report: {workdir / 'report' / 'index.html'}")
  return metrics


def measure(
  chosen: Sequence[str], config: ConfigDict, named: str, *, workdir: Path, weights: str = ""
) -> dict[str, Any]:
  """Writes WORKDIR/evaluation; returns RESULT.json. UserError for tasks that the config, `named` so, has not."""
  known = config.to_dict().get("tasks")
  if not known:
    raise UserError(f"{named} has no tasks: give a config that has some, such as configs/evaluate.py")
  names = list(known) if list(chosen) == ["all"] else chosen
  unknown = [name for name in names if name not in known]
  if unknown:
    raise UserError(f"there is no task {unknown[0]!r} in {named}; there are {', '.join(known)}")
  model = ClipFlow.from_checkpoint(workdir, weights=weights).spread()
  source = mixture.shown(model.config.data.source) if "data" in model.config else None
  run = suite.Run(model, workdir / "evaluation", source, config.seed, config.resamples)
  found = results.write(run, suite.evaluate(run, {name: known[name] for name in names}))
  print(results.table(found))
  print(f"result: {run.directory / 'RESULT.json'}, page: {run.directory / 'index.html'}")
  return found


def compare(
  chosen: Sequence[str],
  real: Path | None,
  fake: Path | None,
  *,
  resize: str,
  inception: str | None,
  dinov2: str | None,
  workdir: Path | None = None,
  weights: str = "",
) -> dict[str, Any]:
  """The metrics of two folders' pictures, by default of fid. UserError for what cannot be compared.

  inception, dinov2, and workdir with its weights: what looks at the pictures, as far as the tasks need it.
  """
  chosen = chosen or ["fid"]
  folders.check(chosen, real, fake)
  by_clip = [name for name in chosen if name in folders.CLIP_TASKS]
  if by_clip and workdir is None:
    raise UserError(f"{', '.join(by_clip)} need --workdir=DIR, whose CLIP looks at the pictures")
  rest = [name for name in chosen if name not in by_clip]
  using = folders.extractors(rest, inception_weights=inception, resize=resize, dinov2_weights=dinov2)
  found: dict[str, Any] = {}
  if by_clip:
    model = ClipFlow.from_checkpoint(workdir, weights=weights).spread()
    found |= folders.compare_by_clip(by_clip, real, fake, model)
  if rest:
    found |= folders.compare(rest, real, fake, using)
  print("\n".join(f"{name:<28} {value:10.6g}" for name, value in found.items()))
  return {**found, "resize": resize, **report.software()}


def write_statistics(real: Path, file: Path, *, resize: str, inception: str | None) -> dict[str, Any]:
  """Writes what fid needs of the pictures of a folder; returns what it is of. UserError for no folder or weights."""
  folders.check(["fid"], real, real)
  using = folders.extractors(["fid"], inception_weights=inception, resize=resize, dinov2_weights=None)
  folders.save_statistics(real, using.inception, file)
  print(f"wrote the statistics of {real} to {file}")
  return {"resize": resize, **report.software()}

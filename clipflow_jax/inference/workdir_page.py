"""What a run has left in its workdir, as one static page with its pictures inside."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clipflow_jax.inference import show
from clipflow_jax.inference.workdir import Run, Stage
from clipflow_jax.webpage import document, figure, inlined, number, table

SHOWN = 12  # the newest samples of a stage
WIDTH = 480  # pixels of a sample, at most
STYLE = (
  ".sheet figure, .sheet figure img { width: auto; max-width: 480px } pre { font-size: 12px; white-space: pre-wrap }"
)


def page(run: Run) -> str:
  """The whole page. It needs nothing else, not even the workdir."""
  rows = [[escape(stage.name or stage.path.name), escape(stage.progress)] for stage in run.stages]
  sections = [table(["stage", ""], rows)]
  for stage in run.stages:
    sections += _stage(stage)
  if run.report:
    measured = [[escape(name), escape(number(v))] for name, v in run.report.items() if not isinstance(v, dict)]
    sections.append("<h2>Report</h2>" + table(["name", "value"], measured))
  return document(f"clipflow: {run.path.name}", sections, STYLE)


def _stage(stage: Stage) -> Iterator[str]:
  yield f"<h2>{escape(stage.name or stage.path.name)}</h2><p>{escape(stage.progress)}</p>"
  yield "".join(f'<p class="wrong">{escape(note)}</p>' for note in stage.notes)
  if stage.file:
    rows = [[escape(change.key), escape(change.there), escape(change.here)] for change in stage.changes or ()]
    found = table(["key", "in the file", "in the run"], rows) if rows else ""
    yield f"<h3>Config: {escape(stage.file)}</h3>{found}" + ("<p>as it is</p>" if stage.changes == [] else "")
  if stage.parameters:
    counts = [[escape(part), f"{trained:,}", f"{whole:,}"] for part, (trained, whole) in stage.parameters.items()]
    yield "<h3>Parameters</h3>" + table(["part", "trained", "all"], counts)
  if stage.metrics:
    values = [[escape(name), escape(number(value))] for name, value in stage.newest().items()]
    yield '<h3>Metrics</h3><img class="wide" src="' + inlined(show.curves(stage.metrics)) + '" alt="training curves">'
    yield table(["last", "value"], values)
  for name, lines in (("Data", stage.data), ("Checkpoints", stage.checkpoints)):
    if lines:
      yield f"<h3>{name}</h3>" + "".join(f"<p>{escape(line)}</p>" for line in lines)
  if stage.samples:
    shown = stage.samples[-SHOWN:]
    yield f"<h3>Samples, the last {len(shown)} of {len(stage.samples)}</h3>"
    yield f'<div class="sheet">{"".join(map(_sample, shown))}</div>'


def _sample(file: Path) -> str:
  """A picture, or a text; where it can be read as neither its name alone."""
  try:
    if file.suffix == ".png":
      with Image.open(file) as picture:
        picture.thumbnail((WIDTH, WIDTH))
        return figure(inlined(picture), file.name, escape(file.name))
    return f"<div><b>{escape(file.name)}</b><pre>{escape(file.read_text(encoding='utf-8'))}</pre></div>"
  except (OSError, ValueError, UnidentifiedImageError) as error:
    return f'<p class="wrong">{escape(file.name)} cannot be read: {escape(str(error))}</p>'

"""One static page: the table of bars, every picture with its prompt and mark, what was read and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from clipflow_jax.evaluation.bars import Standing
from clipflow_jax.evaluation.tasks import Answer
from clipflow_jax.webpage import document, figure, number, table


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
  """A picture the model drew. right: the reader's verdict, None where there is no reader."""

  image: np.ndarray  # u8[H,W,3]
  prompt: str
  group: str
  right: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
  """A real picture and what the model wrote of it."""

  image: np.ndarray  # u8[H,W,3]
  question: str
  written: str
  truth: str

  @property
  def right(self) -> bool:
    return self.written.strip() == self.truth.strip()


@dataclasses.dataclass(frozen=True, eq=False)
class Artefacts:
  """What a report shows beside its numbers: the first of each kind, never a choice of the best."""

  title: str
  drawings: Sequence[Drawing]
  readings: Sequence[Reading]
  real: np.ndarray  # u8[N,H,W,3]
  decoded: np.ndarray  # u8[N,H,W,3]: real, through the tower's features and back


def drawing_path(index: int) -> str:
  """Where the page looks for the picture of a drawing."""
  return f"pictures/drawing_{index:03d}.png"


def reading_path(index: int) -> str:
  """Where the page looks for the picture of a reading."""
  return f"pictures/reading_{index:03d}.png"


def html(metrics: Mapping[str, Any], artefacts: Artefacts, standings: Sequence[Standing], has_curves: bool) -> str:
  """The whole page. It needs nothing but the pictures beside it: no script, no font, no network."""
  sections = [
    _bars(standings),
    _drawings(artefacts.drawings, metrics.get("compositional_by_category", {})),
    _readings(artefacts.readings),
    "<h2>Reconstructions</h2><p>Real pictures, and the same through the tower's features and the decoder.</p>"
    '<img class="wide" src="reconstructions.png" alt="real pictures above their reconstructions">',
    '<h2>Training</h2><img class="wide" src="curves.png" alt="training curves">' if has_curves else "",
    _measured(metrics),
  ]
  return document(artefacts.title, sections)


def results(result: Mapping[str, Any], shown: Mapping[str, Sequence[tuple[str, str, Answer]]]) -> str:
  """The page of an evaluation's RESULT.json. shown: of tasks, (file of the picture or "", question, answer)."""
  sections = []
  for name, task in result["tasks"].items():
    rows = [["all", str(task["count"]), *_metrics(task["metrics"])]]
    rows += [
      [escape(c), str(part["count"]), *_metrics(part["metrics"])] for c, part in task.get("by_category", {}).items()
    ]
    sections.append(f"<h2>{escape(name)}</h2>" + table(["", "n", *map(escape, task["metrics"])], rows))
    figures = [
      (figure(file, question, caption) if file else f"<figure><figcaption>{caption}</figcaption></figure>\n")
      for file, question, answer in shown.get(name, ())
      for caption in [
        f"<i>{escape(question)}</i><br>{escape(answer.written)}<br><small>truth: {escape(answer.truth)}</small>"
      ]
    ]
    sections.append(f'<div class="sheet">{"".join(figures)}</div>')
  rest = {name: value for name, value in result.items() if name != "tasks"}
  return document("clipflow evaluation", [*sections, _measured(rest)])


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
  return [
    number(m["value"]) + (f" <small>{number(m['low'])} – {number(m['high'])}</small>" if "low" in m else "")
    for m in metrics.values()
  ]


def _bars(standings: Sequence[Standing]) -> str:
  if not standings:
    return ""
  rows = [
    [escape(s.bar.text), f"{s.bar.sense} {number(s.limit)}", _value(s), _mark(s.reached, "reached", "missed")]
    for s in standings
  ]
  return "<h2>Targets</h2>" + table(["measure", "target", "measured", ""], rows)


def _value(standing: Standing) -> str:
  return "not measured" if standing.value is None else number(standing.value)


def _drawings(drawings: Sequence[Drawing], shares: Mapping[str, float]) -> str:
  parts = ["<h2>Drawn from words</h2><p>The first prompts of each kind, not chosen.</p>"]
  for group in dict.fromkeys(drawing.group for drawing in drawings):
    share = f": {number(shares[group])} right" if group in shares else ""
    figures = [
      figure(drawing_path(i), drawing.prompt, f"{_mark(drawing.right)} {escape(drawing.prompt)}")
      for i, drawing in enumerate(drawings)
      if drawing.group == group
    ]
    parts.append(f'<h3>{escape(group)}{share}</h3><div class="sheet">{"".join(figures)}</div>')
  return "\n".join(parts)


def _readings(readings: Sequence[Reading]) -> str:
  figures = [
    figure(
      reading_path(i),
      reading.truth,
      f"<i>{escape(reading.question)}</i><br>{_mark(reading.right)} {escape(reading.written) or '(nothing)'}"
      + ("" if reading.right else f"<br><small>truth: {escape(reading.truth)}</small>"),
    )
    for i, reading in enumerate(readings)
  ]
  heading = "<h2>Read from pictures</h2><p>Real pictures, what was asked and what the model wrote.</p>"
  return f'{heading}<div class="sheet">{"".join(figures)}</div>' if figures else ""


def _measured(metrics: Mapping[str, Any]) -> str:
  """Every metric; the entries of a nested one follow its name."""
  rows = []
  for name, value in metrics.items():
    inner = value.items() if isinstance(value, Mapping) else [("", value)]
    rows += [[escape(f"{name} {key}".strip()), escape(number(v))] for key, v in inner]
  return "<h2>Everything measured</h2>" + table(["name", "value"], rows)


def _mark(right: bool | None, yes: str = "right", no: str = "wrong") -> str:
  if right is None:
    return ""
  return f'<b class="right">✓ {yes}</b>' if right else f'<b class="wrong">✗ {no}</b>'

"""Pictures of pictures: contact sheets, rows to compare, training curves."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_GAP = 6
_FONT_SIZE = 11
_LINE_HEIGHT = 13
_MOST_LINES = 6


def grid(images: np.ndarray, columns: int, captions: Sequence[str] | None = None, scale: int = 2) -> Image.Image:
  """A contact sheet.

  images: u8[N,H,W,3], shown in reading order; captions: N texts, wrapped to the width of their picture and
  cut after six lines; scale: whole-number magnification without smoothing.
  """
  if captions is not None and len(captions) != len(images):
    raise ValueError(f"{len(captions)} captions for {len(images)} pictures")
  count, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
  columns = max(1, min(columns, count))
  texts = [_wrap(text, width) for text in captions] if captions is not None else [[]] * count
  cell_width, cell_height = width + _GAP, height + _GAP + _LINE_HEIGHT * max(map(len, texts), default=0)
  rows = -(-count // columns)
  sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
    x, y = _GAP + i % columns * cell_width, _GAP + i // columns * cell_height
    # White pictures have edges too.
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
    sheet.paste(_enlarged(image, scale), (x, y))
    for j, line in enumerate(lines):
      draw.text((x, y + height + j * _LINE_HEIGHT), line, fill="black", font=_font())
  return sheet


def side_by_side(rows: Mapping[str, np.ndarray], scale: int = 2) -> Image.Image:
  """Rows of pictures under each other, each with its label at the left. rows: label -> u8[N,H,W,3]."""
  margin = _GAP + int(max(_font().getlength(label) for label in rows))
  sheets = [grid(images, columns=len(images), scale=scale) for images in rows.values()]
  sheet = Image.new("RGB", (margin + max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
  draw = ImageDraw.Draw(sheet)
  y = 0
  for label, part in zip(rows, sheets, strict=True):
    sheet.paste(part, (margin, y))
    draw.text((_GAP, y + (part.height - _FONT_SIZE) // 2), label, fill="black", font=_font())
    y += part.height
  return sheet


def curves(rows: Iterable[Mapping], names: Sequence[str]) -> Figure:
  """Metrics over steps: one column a stage, one line of panels a metric.

  rows: the objects of metrics.jsonl (`step`, `stage`, scalars); names: the metrics to plot. A panel without
  values stays empty, because stages differ in scale and in what they measure.
  """
  from matplotlib.figure import Figure  # not pyplot: no window, no global state, Agg when saved

  rows = list(rows)
  stages = list(dict.fromkeys(row["stage"] for row in rows if any(name in row for name in names))) or [""]
  figure = Figure(figsize=(3.2 * len(stages), 2.4 * max(1, len(names))), layout="constrained")
  panels = figure.subplots(max(1, len(names)), len(stages), squeeze=False)
  for line, name in zip(panels, names, strict=False):
    for panel, stage in zip(line, stages, strict=True):
      points = [(row["step"], row[name]) for row in rows if row.get("stage") == stage and name in row]
      panel.set_visible(bool(points))
      panel.plot(*zip(*points, strict=True) if points else ([], []))
      panel.set_title(f"{stage}: {name}", fontsize=9)
      panel.tick_params(labelsize=7)
      panel.grid(alpha=0.3)
  for panel in panels[-1]:
    panel.set_xlabel("step", fontsize=8)
  return figure


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(size=_FONT_SIZE)


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
  height, width, _ = image.shape
  return Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _wrap(text: str, width: int) -> list[str]:
  """The lines of a text no wider than `width` pixels, except where one word is."""
  lines: list[str] = []
  for word in text.split():
    if lines and _font().getlength(f"{lines[-1]} {word}") <= width:
      lines[-1] += f" {word}"
    else:
      lines.append(word)
  return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1] + " ..."]

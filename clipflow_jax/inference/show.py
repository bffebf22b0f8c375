"""Pictures and plots: contact sheets, rows to compare, curves, maps over pictures, attention.

Contact sheets are PIL images, plots are matplotlib figures without pyplot: no window, no global state. Notebooks,
reports and samples are made of the same functions.
"""

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
    sheet.paste(enlarged(image, scale), (x, y))
    for j, line in enumerate(lines):
      draw.text((x, y + height + j * _LINE_HEIGHT), line, fill="black", font=_font())
  return sheet


def enlarged(image: np.ndarray, scale: int) -> Image.Image:
  """A picture u8[H,W,3] so many times as wide and high, without smoothing."""
  height, width, _ = image.shape
  return Image.fromarray(_stretched(image, height * scale, width * scale))


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


def curves(rows: Iterable[Mapping], names: Sequence[str] | None = None) -> Figure:
  """Metrics over steps: one column a stage, one line of panels a metric.

  rows: the objects of metrics.jsonl (`step`, `stage`, scalars); names: the metrics to plot, by default all losses and
  accuracies. A panel without values stays empty, because stages differ in scale and in what they measure.
  """
  rows = list(rows)
  if names is None:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if "loss" in name or "accuracy" in name]
  stages = list(dict.fromkeys(row["stage"] for row in rows if any(name in row for name in names))) or [""]
  figure = _figure(3.2 * len(stages), 2.4 * max(1, len(names)))
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


def lines(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  x: str,
  y: str,
  *,
  log_x: bool = False,
  log_y: bool = False,
) -> Figure:
  """Curves in one panel. curves: label -> (abscissae, ordinates); x, y: what the axes say."""
  figure = _figure(6.0, 3.2)
  panel = figure.subplots()
  for label, (at, values) in curves.items():
    panel.plot(at, values, marker="o", markersize=3, label=label)
  panel.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
  panel.grid(alpha=0.3)
  panel.legend(fontsize=8)
  return figure


def bars(
  parts: Mapping[str, Sequence[float]], places: Sequence[str], y: str, limits: Mapping[str, float] | None = None
) -> Figure:
  """Stacked bars. parts: label -> a height at each of the places; limits: label -> a height to draw a line at."""
  figure = _figure(max(5.0, 0.55 * len(places)), 3.2)
  panel = figure.subplots()
  at, bottom = np.arange(len(places)), np.zeros(len(places))
  for label, heights in parts.items():
    panel.bar(at, heights, bottom=bottom, label=label)
    bottom = bottom + np.asarray(heights)
  for label, height in (limits or {}).items():
    panel.axhline(height, color="black", linestyle="--", linewidth=1)
    panel.text(at[-1] + 0.5, height, label, fontsize=8, ha="right", va="bottom")
  panel.set_ylabel(y)
  panel.set_xticks(at, places, rotation=45 if max(map(len, places)) > 4 else 0, ha="right", fontsize=8)
  if len(parts) > 1:
    panel.legend(fontsize=8)
  return figure


def arrows(points: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray], x: str, y: str) -> Figure:
  """A field in a plane. points, vectors: label -> f[N,2], where arrows begin and how far they go."""
  figure = _figure(5.0, 4.0)
  panel = figure.subplots()
  for i, (label, at) in enumerate(points.items()):
    panel.scatter(at[:, 0], at[:, 1], s=10, color=f"C{i}", label=label)
    panel.quiver(*at.T, *vectors[label].T, angles="xy", scale_units="xy", scale=1, color=f"C{i}", width=0.004)
  panel.set(xlabel=x, ylabel=y)
  panel.grid(alpha=0.3)
  panel.legend(fontsize=7)
  return figure


def attention(weights: np.ndarray, queries: Sequence[str], keys: Sequence[str]) -> Figure:
  """How much each query (a line) takes of each key (a column): weights f[Q,K] from 0 to 1."""
  figure = _figure(1.5 + 0.17 * len(keys), 1.2 + 0.17 * len(queries))
  panel = figure.subplots()
  panel.imshow(weights, cmap="magma", vmin=0)
  panel.set_xticks(range(len(keys)), keys, rotation=90, fontsize=7)
  panel.set_yticks(range(len(queries)), queries, fontsize=7)
  return figure


def heat(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
  """Pictures u8[N,H,W,3] under their maps f[N,T], T cells of a square grid: bright where a map is high, u8[N,H,W,3].

  All maps share one scale, from 0 to the highest value.
  """
  from matplotlib import colormaps

  n, height, width, _ = images.shape
  side = round(maps.shape[1] ** 0.5)
  shares = (maps / max(float(maps.max()), 1e-12)).reshape(n, side, side)
  cells = colormaps["magma"](shares)[..., :3] * 255
  glow = np.stack([_stretched(cell.astype(np.uint8), height, width) for cell in cells])
  grey = images.mean(axis=-1, keepdims=True)
  return (0.35 * grey + 0.65 * glow).astype(np.uint8)


def colours(features: np.ndarray, size: int) -> np.ndarray:
  """Features f32[N,T,C] as colours, u8[N,size,size,3]: their three principal components are red, green and blue.

  The components are those of all N together, so that like colours are like features.
  """
  n, tokens, channels = features.shape
  side = round(tokens**0.5)
  flat = features.reshape(-1, channels) - features.reshape(-1, channels).mean(axis=0)
  _, _, ways = np.linalg.svd(flat, full_matrices=False)
  parts = flat @ ways[:3].T
  low, high = np.percentile(parts, [2, 98], axis=0)
  cells = (255 * np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)).astype(np.uint8)
  return np.stack([_stretched(cell, size, size) for cell in cells.reshape(n, side, side, 3)])


def _figure(width: float, height: float) -> Figure:
  """An empty figure; inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _stretched(cells: np.ndarray, height: int, width: int) -> np.ndarray:
  """u8[h,w,3] without smoothing as u8[height,width,3]."""
  return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST))


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(size=_FONT_SIZE)


def _wrap(text: str, width: int) -> list[str]:
  """The lines of a text no wider than `width` pixels, except where one word is."""
  lines: list[str] = []
  for word in text.split():
    if lines and _font().getlength(f"{lines[-1]} {word}") <= width:
      lines[-1] += f" {word}"
    else:
      lines.append(word)
  return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1] + " ..."]

"""Pictures and plots: contact sheets, rows to compare, curves, maps over pictures, attention.

Contact sheets are PIL images, plots are matplotlib figures without pyplot: no window, no global state. Notebooks,
reports and samples are made of the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipflow_jax.errors import UserError
from clipflow_jax.files import write

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

ARRAY = ".npy"  # what a file of features ends in

_SCALE = 2  # by which pictures on a sheet are enlarged
_GAP = 6
_FONT_SIZE = 11
_LINE_HEIGHT = 13
_MOST_LINES = 6
_LABEL_WIDTH = 150
_GLOW = (255, 60, 0)  # seen on black, grey and white alike


def grid(images: np.ndarray, columns: int, captions: Sequence[str] | None = None, scale: int = _SCALE) -> Image.Image:
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
    _write(draw, lines, x, y + height)
  return sheet


def check(path: Path) -> None:
  """UserError where `save` cannot write: no folder, or an ending that is neither a picture's nor that of arrays."""
  if not path.parent.is_dir():
    raise UserError(f"cannot write {path}: there is no folder {path.parent}")
  if path.suffix != ARRAY and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
    raise UserError(f"cannot write {path}: no picture ends in {path.suffix!r}; choose .png, or {ARRAY} for features")


def save(path: Path, drawn: np.ndarray, captions: Sequence[str]) -> None:
  """Writes a picture u8[1,H,W,3] as it is, so that it may be shown to the model again; several as a contact sheet with
  their captions; to ARRAY whatever they are. UserError."""
  try:
    if path.suffix == ARRAY:
      write(path, lambda partial: np.save(partial, drawn))
    else:
      sheet = Image.fromarray(drawn[0]) if len(drawn) == 1 else grid(drawn, min(8, len(drawn)), captions)
      write(path, sheet.save)
  except (OSError, ValueError) as error:  # a disk that is full; more pictures than the format takes
    raise UserError(f"cannot write {path}: {error}") from error


def enlarged(image: np.ndarray, scale: int) -> Image.Image:
  """A picture u8[H,W,3] so many times as wide and high, without smoothing."""
  height, width, _ = image.shape
  return Image.fromarray(_stretched(image, height * scale, width * scale))


def side_by_side(rows: Mapping[str, np.ndarray], heads: Sequence[str] = ()) -> Image.Image:
  """Rows of pictures under each other, each with its label at the left, and what columns have in common above them.

  rows: label -> u8[N,H,W,3]; heads: a text for each of the first columns. Long texts are wrapped.
  """
  labels = [_wrap(label, _LABEL_WIDTH) for label in rows]
  margin = _GAP + int(max((_font().getlength(line) for lines in labels for line in lines), default=0))
  sheets = [grid(images, columns=len(images)) for images in rows.values()]
  cell = _GAP + _SCALE * max(images.shape[2] for images in rows.values())
  above = [_wrap(head, cell - _GAP) for head in heads]
  top = _LINE_HEIGHT * max(map(len, above), default=0)
  sheet = Image.new("RGB", (margin + max(s.width for s in sheets), top + sum(s.height for s in sheets)), "white")
  draw = ImageDraw.Draw(sheet)
  for i, lines in enumerate(above):  # they stand on their column
    _write(draw, lines, margin + _GAP + i * cell, top - _LINE_HEIGHT * len(lines))
  y = top
  for lines, part in zip(labels, sheets, strict=True):
    sheet.paste(part, (margin, y))
    _write(draw, lines, _GAP, y + (part.height - _LINE_HEIGHT * len(lines)) // 2)
    y += part.height
  return sheet


def curves(rows: Iterable[Mapping], names: Sequence[str] | None = None) -> Figure:
  """Metrics over steps: a line of panels for each stage, one for each metric that it has.

  rows: the objects of metrics.jsonl (`step`, `stage`, scalars); names: the metrics to plot, by default all losses and
  accuracies. Each panel has a scale of its own, because stages differ in what they measure.
  """
  rows = list(rows)
  if names is None:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if "loss" in name or "accuracy" in name]
  points: dict[str, dict[str, list]] = {}
  for row in rows:
    for name in [name for name in names if name in row]:
      points.setdefault(row.get("stage", ""), {}).setdefault(name, []).append((row["step"], row[name]))
  widest = max(map(len, points.values()), default=1)
  figure = _figure(3.2 * widest, 2.4 * max(1, len(points)))
  panels = figure.subplots(max(1, len(points)), widest, squeeze=False)
  for panel in panels.flat:
    panel.set_visible(False)
  for line, (stage, metrics) in zip(panels, points.items(), strict=False):
    for panel, (name, values) in zip(line, metrics.items(), strict=False):
      panel.set_visible(True)
      panel.plot(*zip(*values, strict=True))
      panel.set_title(f"{stage}: {name}", fontsize=9)
      panel.set_xlabel("step", fontsize=8)
      panel.tick_params(labelsize=7)
      panel.grid(alpha=0.3)
  return figure


def lines(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  x: str,
  y: str,
  *,
  log_x: bool = False,
  log_y: bool = False,
  limits: Mapping[str, float] | None = None,
) -> Figure:
  """Curves in one panel. curves: label -> (abscissae, ordinates); x, y: what the axes say; limits: as of `bars`.

  A logarithmic x has a tick at each abscissa.
  """
  figure = _figure(6.0, 3.2)
  panel = figure.subplots()
  for label, (at, values) in curves.items():
    panel.plot(at, values, marker="o", markersize=3, label=label)
  panel.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
  if log_x:
    at = sorted({value for abscissae, _ in curves.values() for value in abscissae})
    panel.set_xticks(at, [f"{value:g}" for value in at])
    panel.set_xticks([], minor=True)
  if log_y:
    panel.yaxis.set_major_formatter("{x:g}")
  _limit(panel, limits or {})
  panel.grid(alpha=0.3)
  panel.legend(fontsize=8)
  return figure


def bars(
  parts: Mapping[str, Sequence[float]],
  places: Sequence[str],
  y: str,
  limits: Mapping[str, float] | None = None,
  *,
  x: str = "",
) -> Figure:
  """Stacked bars. parts: label -> a height at each of the places; limits: label -> a height to draw a line at."""
  figure = _figure(max(5.0, 0.55 * len(places)), 3.2)
  panel = figure.subplots()
  at, bottom = np.arange(len(places)), np.zeros(len(places))
  for label, heights in parts.items():
    panel.bar(at, heights, bottom=bottom, label=label)
    bottom = bottom + np.asarray(heights)
  _limit(panel, limits or {})
  panel.set(xlabel=x, ylabel=y)
  slanted = max(map(len, places)) > 4
  panel.set_xticks(at, places, rotation=45 if slanted else 0, ha="right" if slanted else "center", fontsize=8)
  if len(parts) > 1:
    panel.legend(fontsize=8)
  return figure


def arrows(points: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray], x: str, y: str) -> Figure:
  """A field in a plane. points, vectors: label -> f[N,2], where arrows begin and how far they go."""
  figure = _figure(6.0, 4.0)
  panel = figure.subplots()
  for i, (label, at) in enumerate(points.items()):
    panel.scatter(at[:, 0], at[:, 1], s=10, color=f"C{i}", label=label)
    panel.quiver(*at.T, *vectors[label].T, angles="xy", scale_units="xy", scale=1, color=f"C{i}", width=0.004)
  panel.set(xlabel=x, ylabel=y)
  panel.grid(alpha=0.3)
  panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the field: it would hide some of it
  return figure


def attention(weights: np.ndarray, queries: Sequence[str], keys: Sequence[str]) -> Figure:
  """How much each query (a line) takes of each key (a column): weights f[Q,K] from 0 to 1."""
  figure = _figure(2.3 + 0.17 * len(keys), 1.2 + 0.17 * len(queries))
  panel = figure.subplots()
  shown = panel.imshow(weights, cmap="magma", vmin=0)
  panel.set_xticks(range(len(keys)), keys, rotation=90, fontsize=7)
  panel.set_yticks(range(len(queries)), queries, fontsize=7)
  scale = figure.colorbar(shown, fraction=0.05)
  scale.set_label("share of attention", fontsize=7)
  scale.ax.tick_params(labelsize=7)
  return figure


def heat(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
  """Pictures u8[N,H,W,3] without their colours, red where their maps f[N,T] are high, T cells of a square grid.

  All maps share one scale, from 0 (the grey picture alone) to the highest value. Returns u8[N,H,W,3].
  """
  n, height, width, _ = images.shape
  side = round(maps.shape[1] ** 0.5)
  shares = (maps / max(float(maps.max()), 1e-12)).reshape(n, side, side, 1)
  cells = np.repeat(np.rint(shares * 255), 3, axis=-1).astype(np.uint8)
  share = 0.8 * np.stack([_stretched(cell, height, width) for cell in cells]) / 255  # something is always to be seen
  grey = images.mean(axis=-1, keepdims=True)
  return ((1 - share) * grey + share * np.array(_GLOW)).astype(np.uint8)


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


def _limit(panel: Axes, limits: Mapping[str, float]) -> None:
  """Lines across a panel, each with its label on it at the right."""
  for label, height in limits.items():
    panel.axhline(height, color="black", linestyle="--", linewidth=1)
    at = panel.get_yaxis_transform()  # x from 0 to 1, y as of the data
    panel.text(0.99, height, label, fontsize=8, ha="right", va="bottom", transform=at)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int) -> None:
  for i, line in enumerate(lines):
    draw.text((x, y + i * _LINE_HEIGHT), line, fill="black", font=_font())


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

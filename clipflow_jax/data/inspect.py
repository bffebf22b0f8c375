"""What the model will see: a batch as a page and as a picture, and how full its rows are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipflow_jax import files
from clipflow_jax.batch import BOTH, INPUT, TARGET, Batch
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import make_folder
from clipflow_jax.webpage import document, inlined

ROLES = {INPUT: "read", TARGET: "drawn", BOTH: "read and drawn"}
COLOURS = ("#8fb3d9", "#e6b894", "#a5cf9d", "#d9a3c4", "#cfc98a", "#a8a3dc", "#8fd0cb", "#d99a9a")
SHOWN = 8  # rows of the batch


@dataclasses.dataclass(frozen=True)
class Packing:
  """How full rows are, 0 to 1. What ends a row first, its slots or its places for pictures, is what should be full."""

  rows: int
  slots: float  # share of the slots that examples take
  pictures: float  # share of the places for pictures
  examples: float  # of a row
  words: float  # slots of an example that are no picture's
  left_out: float  # share of the examples for which a row of data.row had no room

  def __str__(self) -> str:
    return (
      f"{self.rows} rows: {self.examples:.1f} examples each, slots {self.slots:.1%} full, places for pictures "
      f"{self.pictures:.1%} full, {self.words:.1f} words an example"
      + (f", {self.left_out:.1%} of the examples had no room" if self.left_out else "")
    )


def packing(batches: Sequence[Batch], left_out: float = 0.0) -> Packing:
  """The packing of some batches, beside which this share of the examples had no room."""
  slots = np.concatenate([batch.segments for batch in batches]) > 0
  pictures = np.concatenate([batch.image_roles for batch in batches]) > 0
  words = np.concatenate([batch.image_index for batch in batches]) < 0
  examples = sum(batch.segments.max(axis=1).sum() for batch in batches)
  return Packing(
    rows=len(slots),
    slots=float(slots.mean()),
    pictures=float(pictures.mean()),
    examples=float(examples / len(slots)),
    words=float((slots & words).sum() / examples),
    left_out=left_out,
  )


def write(pipeline: Pipeline, output: Path, name: str, batches: int = 8) -> Packing:
  """Writes output/NAME.html and output/NAME.png of the stream's first batch; the packing of so many.

  Reads no more than these batches; UserError where the data is bad beyond measure, or `output` can be no folder.
  """
  make_folder(output)
  bad = BadRecords(None, 0.5)
  found = list(itertools.islice(pipeline.batches(bad), batches))
  state = packing(found, bad.left_out / max(bad.packed, 1))
  files.write_text(output / f"{name}.html", page(found[0], pipeline.layout, pipeline.chat, f"{name}: {state}"))
  files.write(output / f"{name}.png", sheet(found[0], pipeline.layout).save)
  return state


# The page.


def page(batch: Batch, layout: Layout, chat: Chat, title: str) -> str:
  """A page that needs nothing beside it: every row's examples, their words by weight, their pictures."""
  rows = "\n".join(_row(batch, i, layout, chat) for i in range(min(SHOWN, len(batch.tokens))))
  legend = (
    "<p>Green words are learned, the greener the more they weigh; the others are only read. A bar is a row, "
    "its colours are the examples packed into it.</p>"
  )
  return document(title, [legend, rows], _STYLE)


def _row(batch: Batch, row: int, layout: Layout, chat: Chat) -> str:
  segments = batch.segments[row]
  bars, cards = [], []
  for number in range(1, segments.max(initial=0) + 1):
    slots = np.flatnonzero(segments == number)
    colour = COLOURS[(number - 1) % len(COLOURS)]
    bars.append(f'<i style="width:{100 * len(slots) / len(segments):.3f}%;background:{colour}"></i>')
    drawn = [
      _figure(batch, row, n, layout)
      for n in np.flatnonzero(batch.image_segments[row] == number).tolist()
      if not batch.image_roles[row, n] & INPUT
    ]
    pieces = "".join(_pieces(batch, row, slots, layout, chat)) + "".join(drawn)
    cards.append(f'<div class="card" style="border-color:{colour}"><b>{len(slots)} slots</b> {pieces}</div>')
  return f'<h2>Row {row}</h2><div class="bar">{"".join(bars)}</div>\n' + "\n".join(cards)


def _pieces(batch: Batch, row: int, slots: np.ndarray, layout: Layout, chat: Chat) -> Iterator[str]:
  """An example's words, those of one weight together, and the pictures that it reads, where it reads them."""

  def kind(slot: int) -> tuple[int, float]:
    index = batch.image_index[row, slot]
    return (-1 if index < 0 else int(index) // layout.tokens_per_image, float(batch.loss_weights[row, slot]))

  for (picture, weight), group in itertools.groupby(slots.tolist(), kind):
    if picture >= 0:
      yield _figure(batch, row, picture, layout)
      continue
    words = escape(chat.tokenizer.decode(batch.tokens[row, list(group)].tolist()))
    shade = f' style="background:rgba(60,170,80,{0.15 + 0.5 * min(weight, 1.0):.2f})"' if weight else ""
    yield f'<span title="weight {weight:g}"{shade}>{words}</span>'


def _figure(batch: Batch, row: int, n: int, layout: Layout) -> str:
  role = ROLES.get(int(batch.image_roles[row, n]), "absent")
  image = f'<img src="{inlined(Image.fromarray(pixels(batch, row, n, layout)))}" alt="">'
  return f'<figure class="{role.split()[-1]}">{image}<figcaption>{role}</figcaption></figure>'


_STYLE = """
h1 { font-size: 1.1em } h2 { font-size: 1em; margin: 1.5em 0 .3em }
.bar { display: flex; height: 14px; background: #eee } .bar i { display: block }
.card { border-left: 6px solid; padding: .3em .6em; margin: .4em 0; white-space: pre-wrap }
.card b { color: #888; font-weight: normal; font-size: .85em; margin-right: .6em }
figure { display: inline-block; width: auto; margin: 0 .4em; vertical-align: middle; text-align: center }
figcaption { color: #666 }
figure img { width: 72px; display: block }
figure.drawn img { border: 2px solid #3ca650 }
"""


# The picture.


def sheet(batch: Batch, layout: Layout, width: int = 960, side: int = 72) -> Image.Image:
  """Each row as a bar of its examples, what is learned dark beneath it, and its pictures in the examples' colours."""
  rows, places = min(SHOWN, len(batch.tokens)), batch.image_roles.shape[1]
  columns = width // (side + 6)
  height = 40 + -(-places // columns) * (side + 6)
  out = Image.new("RGB", (width, rows * height), "white")
  draw, font = ImageDraw.Draw(out), ImageFont.load_default(10)
  for row in range(rows):
    top = row * height
    slots = batch.segments.shape[1]
    used = (batch.segments[row] > 0).mean()
    draw.text((4, top + 2), f"row {row}: {used:.1%} of {slots} slots", fill="black", font=font)
    for slot in range(slots):
      left, right = slot * width // slots, max(slot * width // slots, (slot + 1) * width // slots - 1)
      segment = batch.segments[row, slot]
      draw.rectangle((left, top + 16, right, top + 26), fill=_colour(segment))
      if batch.loss_weights[row, slot] and segment:
        draw.rectangle((left, top + 28, right, top + 32), fill="#3ca650")
    for n in np.flatnonzero(batch.image_roles[row]).tolist():
      left, down = n % columns * (side + 6) + 3, top + 37 + n // columns * (side + 6)
      draw.rectangle((left - 2, down - 2, left + side + 1, down + side + 1), fill=_colour(batch.image_segments[row, n]))
      picture = Image.fromarray(pixels(batch, row, n, layout))
      out.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, down))
  return out


def _colour(segment: int) -> str:
  return COLOURS[(int(segment) - 1) % len(COLOURS)] if segment else "#eeeeee"


def pixels(batch: Batch, row: int, n: int, layout: Layout) -> np.ndarray:
  """u8[H,W,3]: picture n of a row; of cached features, the first three channels of each token as a colour."""
  if batch.images is not None:
    return batch.images[row, n]
  colours = np.asarray(batch.features[row, n, :, :3], np.float32).reshape(layout.grid, layout.grid, 3)
  return (128 + 40 * colours).clip(0, 255).astype(np.uint8)

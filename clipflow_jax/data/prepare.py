"""`clipflow prepare`: any folder of captioned pictures to a clean one, every picture decoded once.

The result is a folder as FolderSource reads it: images/NNNNNN.png, all of one size, and captions.jsonl;
beside them statistics.json, contact_sheet.png and, where something was left out, data_errors.jsonl.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.sources import CAPTIONS, FolderSource, folder_paths
from clipflow_jax.errors import UserError

STATISTICS = "statistics.json"
CONTENTS = {"images", CAPTIONS, STATISTICS, "contact_sheet.png", "data_errors.jsonl"}
CHUNK = 1024  # pictures between two lines of progress


def prepare(
  inputs: str | Path | Iterable[str | Path],
  output: str | Path,
  *,
  size: int,
  fit: str = "crop",
  min_caption: int = 1,
  workers: int | None = None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Decodes the pictures of the folders `inputs` to `size` x `size` and writes the folder `output`.

  Captions with fewer than `min_caption` characters are dropped, and pictures with none left. Records keep
  their ids, so the test split of the result is that of the inputs. The folder appears whole or not at all:
  it is written as OUTPUT.partial and renamed. Where `output` already is the result of the same request
  nothing is done. Returns the contents of statistics.json. Raises UserError for anything else at `output`
  and for inputs without a single good record.
  """
  output = Path(output)
  folders = folder_paths(inputs)
  source = FolderSource(folders, size, "all", fit=fit)
  request = {
    "inputs": [_fingerprint(folder) for folder in folders],
    "size": size,
    "fit": fit,
    "min_caption": min_caption,
  }
  done = _finished(output)
  if done is not None and done["request"] == request:
    say(f"{output} already holds these {done['written']} pictures")
    return done
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    what = "was prepared from other inputs or settings" if done is not None else "exists"
    raise UserError(f"{output} {what}: give another output, or remove it first")
  partial = _start_afresh(output.with_name(output.name + ".partial"))

  bad = BadRecords(partial / "data_errors.jsonl", max_fraction=1.0, limit=len(source))
  result = bad.guard(Future.result)  # counted here, in order, not where the threads meet them
  tally = _Tally()
  with (
    ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool,
    (partial / CAPTIONS).open("w", encoding="utf-8") as captions,
  ):
    for start in range(0, len(source), CHUNK):
      chunk = range(start, min(start + CHUNK, len(source)))
      for future in [pool.submit(_write_picture, source, i, min_caption, partial) for i in chunk]:
        written = result(future)
        if written is not None:
          captions.write(json.dumps(written.row, ensure_ascii=False) + "\n")
          tally.add(written)
      say(f"{chunk.stop} of {len(source)} records read, {bad.bad} bad")
  if not tally.pictures:
    shutil.rmtree(partial)
    raise UserError(f"nothing to prepare: {bad.summary()}")

  statistics = {
    "request": request,
    "records": len(source),
    "bad": dict(bad.kinds),
    **tally.statistics(),
  }
  (partial / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")
  contact_sheet(FolderSource(partial, size, "all")).save(partial / "contact_sheet.png")
  partial.rename(output)
  say(f"{output}: {tally.pictures} pictures" + (f"; {bad.summary()}" if bad.bad else ""))
  return statistics


@dataclasses.dataclass(frozen=True)
class _Written:
  """What is kept of one picture after its file is written."""

  row: dict[str, Any]  # its line of captions.jsonl
  mean: np.ndarray  # f64[3] of the pixels in [0, 1]
  square: np.ndarray  # f64[3], mean of the squares


def _write_picture(source: FolderSource, i: int, min_caption: int, directory: Path) -> _Written:
  example = source[i]
  captions = [caption for caption in example.captions if len(caption) >= min_caption]
  if not captions:
    raise BadRecord(example.id, f"short caption: fewer than {min_caption} characters")
  file = f"images/{i:06d}.png"
  Image.fromarray(example.image).save(directory / file)
  unit = example.image / 255.0
  return _Written(_row(example, captions, file), unit.mean((0, 1)), np.square(unit).mean((0, 1)))


def _row(example: Example, captions: list[str], file: str) -> dict[str, Any]:
  row: dict[str, Any] = {"file": file, "id": example.id, "captions": captions}
  if example.questions:
    row["conversations"] = [
      turn
      for question, answer in example.questions
      for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
  return row


class _Tally:
  """Running statistics of the pictures and captions written."""

  def __init__(self) -> None:
    self.pictures = 0
    self.questions = 0
    self.lengths: collections.Counter[int] = collections.Counter()  # of captions, in words
    self.words: set[str] = set()
    self.mean, self.square = np.zeros(3), np.zeros(3)

  def add(self, written: _Written) -> None:
    self.pictures += 1
    self.questions += len(written.row.get("conversations", ())) // 2
    for caption in written.row["captions"]:
      words = caption.lower().split()
      self.lengths[len(words)] += 1
      self.words.update(words)
    self.mean += written.mean
    self.square += written.square

  def statistics(self) -> dict[str, Any]:
    captions = self.lengths.total()
    mean = self.mean / self.pictures
    deviation = np.sqrt(np.maximum(self.square / self.pictures - mean**2, 0))
    return {
      "written": self.pictures,
      "captions": captions,
      "questions": self.questions,
      "caption_words": {
        "min": min(self.lengths),
        "mean": round(sum(length * count for length, count in self.lengths.items()) / captions, 3),
        "max": max(self.lengths),
      },
      "distinct_words": len(self.words),
      "pixel_mean": mean.round(4).tolist(),
      "pixel_std": deviation.round(4).tolist(),
    }


def contact_sheet(source: FolderSource, columns: int = 8, rows: int = 6) -> Image.Image:
  """Up to columns x rows evenly spaced examples, each with the start of its caption, for the eye to judge."""
  chosen = np.linspace(0, len(source) - 1, min(columns * rows, len(source))).astype(int)
  side, lines, line = 128, 3, 12
  sheet = Image.new("RGB", (columns * side, -(-len(chosen) // columns) * (side + lines * line)), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
  for cell, i in enumerate(chosen):
    x, y = cell % columns * side, cell // columns * (side + lines * line)
    example = source[i]
    sheet.paste(Image.fromarray(example.image).resize((side - 8, side - 8)), (x + 4, y + 4))
    text = textwrap.wrap(example.description, 22, max_lines=lines, placeholder=" …")
    draw.multiline_text((x + 4, y + side - 3), "\n".join(text), "black", font, spacing=1)
  return sheet


def _fingerprint(folder: Path) -> dict[str, str]:
  """What makes a folder the same input: its name and its captions."""
  sha256 = hashlib.sha256((folder / CAPTIONS).read_bytes()).hexdigest()
  return {"folder": folder.resolve().name, "captions_sha256": sha256}


def _finished(output: Path) -> dict[str, Any] | None:
  """The statistics of an earlier prepare, or None."""
  try:
    statistics = json.loads((output / STATISTICS).read_text())
    return statistics if {"request", "written"} <= statistics.keys() else None
  except (OSError, ValueError, AttributeError):
    return None


def _start_afresh(partial: Path) -> Path:
  """An empty folder to write in; what an interrupted prepare left there is removed, and nothing else."""
  if partial.exists():
    if not partial.is_dir() or not {path.name for path in partial.iterdir()} <= CONTENTS:
      raise UserError(f"{partial} is in the way and was not written by prepare: move it")
    shutil.rmtree(partial)
  (partial / "images").mkdir(parents=True)
  return partial

"""One shard of a prepared set: a range of a source's records, filtered, resized, written, without regard to others."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipflow_jax import files
from clipflow_jax.data import images, prepared
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource
from clipflow_jax.errors import UserError

FORMATS: dict[str, dict[str, Any]] = {"png": {}, "jpeg": {"quality": 95}, "webp": {"quality": 95}}
PARTS = "parts"  # beside the shards, while they are written: what is known of each that is complete
NAMED = 100  # bad records that a part names


class LeftOut(BadRecord):
  """A record that a filter leaves out. Nothing is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Filters:
  """What is left out. Sides are of the picture as it was, in pixels; lengths of captions are in characters."""

  min_side: int = 1
  max_aspect: float = float("inf")  # longer side by shorter
  min_caption: int = 1
  max_caption: int = 2**31

  def __post_init__(self) -> None:
    if self.max_aspect < 1:
      raise UserError(f"max_aspect is {self.max_aspect}: it is the longer side by the shorter, give 1 or more")
    if self.min_caption > self.max_caption:
      raise UserError(f"no caption has {self.min_caption} or more and {self.max_caption} or fewer characters")

  def check(self, record: Record, width: int, height: int) -> None:
    """Raises LeftOut."""
    if min(width, height) < self.min_side:
      raise LeftOut(record.name, f"too small: {width} x {height} pixels, the shorter side is to have {self.min_side}")
    if max(width, height) > self.max_aspect * min(width, height):
      raise LeftOut(record.name, f"too long: {width} x {height} pixels, the limit is {self.max_aspect:g} times")

  def captions(self, record: Record) -> tuple[str, ...]:
    """Those of a fitting length. Raises LeftOut where there are some and none is."""
    kept = tuple(caption for caption in record.captions if self.min_caption <= len(caption) <= self.max_caption)
    if record.captions and not kept:
      kind = "short caption" if len(record.captions[0]) < self.min_caption else "long caption"
      raise LeftOut(record.name, f"{kind}: not from {self.min_caption} to {self.max_caption} characters")
    return kept


@dataclasses.dataclass(frozen=True)
class Job:
  """How a source becomes the shards of `folder`. Shard k is a function of records k*length to (k+1)*length alone."""

  source: StoredSource  # of split "all"
  folder: Path
  filters: Filters = Filters()
  format: str = "png"  # of FORMATS
  length: int = 4096  # records that a shard is made of
  workers: int = 1

  def __len__(self) -> int:
    return -(-len(self.source) // self.length)

  def part(self, number: int) -> dict[str, Any] | None:
    """What is known of shard `number`, or None where it is not complete, or a bad record of it was mended since.

    None too for a part of an earlier release, which knows less of its records.
    """
    file = self._part_file(number)
    if not file.exists():
      return None
    part = json.loads(file.read_text(encoding="utf-8"))
    if part["rows"].keys() != {field.name for field in dataclasses.fields(Row)}:
      return None
    again = list(self._converted(part["places"]))
    bad = [found for found in again if isinstance(found, BadRecord) and not isinstance(found, LeftOut)]
    return part if len(bad) == len(again) else None

  def write(self, number: int) -> dict[str, Any]:
    """Writes shard `number` and then its part: only what has one is complete. Returns the part.

    A part is {"shard": its line of the manifest, or None without a record; "seen": records read; "bad": {kind: count};
    "places": which records of the source those are; "named": the first [name, reason] of them; "left_out": {kind:
    count}; "rows": {field of Row: [of every record]}}.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    indices = range(number * self.length, min((number + 1) * self.length, len(self.source)))
    file = self.folder / f"{number:05d}.array_record"
    bad: collections.Counter[str] = collections.Counter()
    left_out: collections.Counter[str] = collections.Counter()
    places, named, rows = [], [], []
    with files.whole(file) as partial:
      writer = ArrayRecordWriter(str(partial), "group_size:1")  # random access is to one record
      for i, found in zip(indices, self._converted(indices), strict=True):
        if isinstance(found, LeftOut):
          left_out[found.kind] += 1
        elif isinstance(found, BadRecord):
          bad[found.kind] += 1
          places.append(i)
          named.append([found.name, found.why])
        else:
          writer.write(found[0])
          rows.append(found[1])
      writer.close()
      shard = _describe(partial, file.name, len(rows)) if rows else None
    part = {
      "shard": shard,
      "seen": len(indices),
      "bad": dict(bad),
      "places": places,
      "named": named[:NAMED],
      "left_out": dict(left_out),
      "rows": {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(Row)},
    }
    if not rows:
      file.unlink()
    files.write_text(self._part_file(number), json.dumps(part))
    return part

  def convert(self, i: int) -> tuple[bytes, Row]:
    """Item i of the source as it lies in a shard, and what is known of it. Raises BadRecord, also LeftOut."""
    record = self.source.record(i)
    if not record.pictures:
      raise LeftOut(record.name, "no picture: words alone need no preparing, learn them from their own file")
    captions = self.filters.captions(record)
    sides, every = [], []
    for picture in record.pictures:
      with images.opened(picture, record.name) as image:
        self.filters.check(record, *image.size)
        sides.append(min(image.size))
        images.lighten(image, self.source.size)
        every.append(images.square(image, self.source.size, fit=self.source.fit))
    pixels = every[0]
    mean, square = moments(pixels)
    before = record.before
    if before is not None:
      before = _encode(images.decode(before, self.source.size, fit=self.source.fit, name=record.name), self.format)
    pictures = tuple(_encode(each, self.format) for each in every)
    kept = dataclasses.replace(record, captions=captions, pictures=pictures, before=before)
    rest = prepared.pack(dataclasses.replace(kept, id="", pictures=pictures[1:]))
    row = Row(
      share=self.source.share(i),
      hash=difference_hash(pixels),
      look=look(pixels).tobytes().hex(),
      mean=mean.tolist(),
      square=square.tolist(),
      side=min(sides),
      words=[len(caption.split()) for caption in captions],
      questions=sum(role == "assistant" for role, _ in record.turns),
      rest=int.from_bytes(hashlib.blake2b(rest, digest_size=8).digest(), "big"),
    )
    return prepared.pack(kept), row

  def _converted(self, indices: Sequence[int]) -> Iterator[tuple[bytes, Row] | BadRecord]:
    """The results of `convert` in order, errors in their places; few are held at a time."""
    with ThreadPoolExecutor(self.workers) as pool:  # Pillow lets other threads run
      ahead: collections.deque = collections.deque()
      for i in indices:
        ahead.append(pool.submit(self._try, i))
        if len(ahead) > 4 * self.workers:
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()

  def _try(self, i: int) -> tuple[bytes, Row] | BadRecord:
    try:
      return self.convert(i)
    except BadRecord as error:
      return error

  def _part_file(self, number: int) -> Path:
    return self.folder / PARTS / f"{number:05d}.json"


@dataclasses.dataclass(frozen=True)
class Row:
  """What is known of one record that was written."""

  share: float  # decides its split
  hash: int  # of 64 bits
  look: str  # the picture made small, in hexadecimal
  mean: list[float]  # of the pixels in [0, 1], per channel
  square: list[float]  # mean of the squares
  side: int  # the shorter one, of the picture as it was
  words: list[int]  # of each caption
  questions: int
  rest: int  # a hash, of 64 bits, of what a duplicate has in common beside the look: words, and all other pictures


def difference_hash(pixels: np.ndarray) -> int:
  """u8[H,W,3] -> 64 bits: whether brightness rises from each cell of an 8 x 9 grid to its right neighbour.

  What is resized or compressed anew keeps nearly all bits. Source: Neal Krawetz, "Kind of Like That", 2013 (dHash).
  """
  grey = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
  rises = grey[:, 1:] > grey[:, :-1]
  # A quarter of the bits is two columns, at an edge and in the middle: edges alone are often flat.
  return int.from_bytes(np.packbits(rises.T.reshape(2, 4, 8).swapaxes(0, 1)).tobytes(), "big")


def look(pixels: np.ndarray) -> np.ndarray:
  """u8[H,W,3] -> u8[192]: the mean colours of an 8 x 8 grid."""
  return np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BOX)).ravel()


def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """u8[H,W,3] -> f64[3] means of the values in [0, 1] and of their squares, per channel.

  By how often each of the 256 levels is there: floats of all pixels would take as long as decoding them.
  """
  counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.reshape(-1, 3).T])
  levels = np.arange(256) / 255
  return counts @ levels / counts[0].sum(), counts @ levels**2 / counts[0].sum()


def _encode(pixels: np.ndarray, format: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, **FORMATS[format])
  return file.getvalue()


def _describe(path: Path, name: str, records: int) -> dict[str, Any]:
  with path.open("rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    os.fsync(file.fileno())
  return {"file": name, "records": records, "bytes": path.stat().st_size, "sha256": sha256}

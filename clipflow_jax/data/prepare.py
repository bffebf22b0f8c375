"""`clipflow prepare`: any source to shards of clean pictures of one size, every picture decoded once.

The result is a folder as PreparedSource reads it: shards NNNNN.array_record, manifest.json and index.npy; beside them
statistics.json, contact_sheet.png and, where records were bad, data_errors.jsonl.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipflow_jax import files
from clipflow_jax.data import beam, duplicates
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.prepared import INDEX, MANIFEST, PreparedSource, read_manifest
from clipflow_jax.data.shard import FORMATS, PARTS, Filters, Job
from clipflow_jax.data.sources import Source
from clipflow_jax.data.stored import StoredSource
from clipflow_jax.errors import UserError, make_folder

STATISTICS, REQUEST, ERRORS = "statistics.json", "request.json", "data_errors.jsonl"


def prepare(
  source: Source,
  output: str | Path,
  *,
  filters: Filters = Filters(),  # noqa: B008 - frozen
  dedup: bool = False,
  format: str = "png",
  max_bad_fraction: float = 0.1,
  length: int = 4096,
  workers: int | None = None,
  runner: Sequence[str] = (),
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Writes the pictures of `source`, of split "all", as squares of its size, with their texts, to the folder `output`.

  dedup: leaves out the records of which one before has both the words and a picture that looks the same. The same
  picture with other words stays, on the same side of the split. length: records that go into a shard. runner: options
  of an Apache Beam pipeline that writes the shards; without any, `workers` threads do.

  The folder appears whole or not at all: it is written as OUTPUT.partial, shard by shard, and renamed. Killed at any
  point, the same request goes on after the last complete shard, to the same bytes; a shard of which bad records have
  been mended since is made anew. Where `output` already is the result of this request its checksums are compared, and
  nothing else is done. Records keep their ids and their splits.

  Returns the contents of statistics.json. Raises UserError for anything else at `output`, for inputs that changed since
  a killed run began, for more bad records than `max_bad_fraction` and for inputs without a single good one. Of inputs
  the source's own files are compared: pictures that lie beside a JSONL file are not, and if good ones have become
  others, `output` and what a killed run left have to be removed.
  """
  if not isinstance(source, StoredSource) or source.split != "all":
    raise UserError(f"{source!r} cannot be prepared: give a source on disk, of split 'all'")
  if format not in FORMATS:
    raise UserError(f"pictures are stored as one of {', '.join(FORMATS)}, not as {format!r}")
  output = Path(output).resolve()  # "." has a name too
  request = {
    "inputs": source.fingerprint(),
    "source": {key: value for key, value in _settings(source).items() if key != "path"},
    "filters": _settings(filters),
    "dedup": dedup,
    "format": format,
    "length": length,
  }
  request = json.loads(json.dumps(request))  # as it is read again
  if _is_finished(output, request):
    _verify(output)
    shutil.rmtree(output / PARTS, ignore_errors=True)  # killed before it was gone
    try:
      statistics = json.loads((output / STATISTICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise UserError(f"{output / STATISTICS} cannot be read: {error}; remove {output} and prepare it anew") from error
    bad = sum(statistics["bad"].values())
    mended = f"; {bad} records were bad: once they are mended, remove it and prepare it anew" if bad else ""
    say(f"{output} already holds these {statistics['written']} pictures, and its checksums are right{mended}")
    return statistics
  partial = _begin(output.with_name(output.name + ".partial"), request)

  job = Job(source, partial, filters, format, length, workers or min(8, os.cpu_count() or 1))
  bad = BadRecords(partial / ERRORS, max_bad_fraction)
  if runner:
    beam.write(job, runner)
  parts, rows = [], []
  for number in range(len(job)):
    part = job.part(number) or job.write(number)
    bad.add(part["seen"], part["bad"], part["named"])
    rows.append(_columns(part.pop("rows"), dedup))
    parts.append(part)
    say(f"{number + 1} of {len(job)} shards, {bad.seen} of {len(source)} records read, {bad.bad} bad")
  bad.check()
  if not any(part["shard"] for part in parts):
    shutil.rmtree(partial)
    raise UserError(f"nothing to prepare: {bad.summary()}; {len(source) - bad.bad} are left out by filters")

  statistics = _finish(partial, parts, {name: np.concatenate([of[name] for of in rows]) for name in rows[0]}, request)
  partial.rename(output)
  shutil.rmtree(output / PARTS)
  say(f"{output}: {statistics['written']} pictures" + (f"; {bad.summary()}" if bad.bad else ""))
  return statistics


def _finish(
  folder: Path, parts: list[dict[str, Any]], rows: dict[str, np.ndarray], request: dict[str, Any]
) -> dict[str, Any]:
  """What lies beside the shards, from what is known of each and of all records. Returns the statistics."""
  same = np.zeros(0, np.int64)
  if request["dedup"]:
    first = duplicates.find(rows["hash"], rows["look"])
    rows["share"] = rows["share"][first]  # or a picture to train on would be one to test on
    same = _repeated(first, rows["rest"])
    rows["share"][same] = np.nan
  kept = rows["share"] >= 0
  np.save(folder / INDEX, rows["share"])
  manifest = {
    "records": int(kept.sum()),
    "shards": [part["shard"] for part in parts if part["shard"]],
    "index_sha256": _sha256(folder / INDEX),
    "request": request,
  }
  (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
  left_out = sum((collections.Counter(part["left_out"]) for part in parts), collections.Counter())
  statistics = {
    "records": sum(part["seen"] for part in parts),
    "bad": dict(sorted(sum((collections.Counter(part["bad"]) for part in parts), collections.Counter()).items())),
    "left_out": dict(sorted(left_out.items())) | ({"duplicate": len(same)} if len(same) else {}),
    **_statistics(rows, kept),
  }
  (folder / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
  contact_sheet(PreparedSource(folder, 128, "all")).save(folder / "contact_sheet.png")
  return statistics


def _repeated(*columns: np.ndarray) -> np.ndarray:
  """i64[k], ascending: the rows that are equal, in all columns, to one before them."""
  _, once = np.unique(np.stack([column.astype(np.uint64) for column in columns]), axis=1, return_index=True)
  return np.setdiff1d(np.arange(len(columns[0])), once)


def _columns(rows: dict[str, list], looks: bool) -> dict[str, np.ndarray]:
  """The rows of a part, a few bytes of each: share f64[n], hash and rest u64[n], mean and square f32[n,3], side,
  captions and questions i32[n], and words i32 of every caption, record by record; look u8[n,192] only where they are
  wanted."""
  captions = [len(words) for words in rows["words"]]
  return {
    "share": np.array(rows["share"], np.float64),
    "hash": np.array(rows["hash"], np.uint64),
    "rest": np.array(rows["rest"], np.uint64),
    "look": np.frombuffer(bytes.fromhex("".join(rows["look"]) if looks else ""), np.uint8).reshape(-1, 192),
    "mean": np.array(rows["mean"], np.float32).reshape(-1, 3),
    "square": np.array(rows["square"], np.float32).reshape(-1, 3),
    "side": np.array(rows["side"], np.int32),
    "captions": np.array(captions, np.int32),
    "questions": np.array(rows["questions"], np.int32),
    "words": np.array([count for words in rows["words"] for count in words], np.int32),
  }


def _statistics(rows: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, Any]:
  mean, square = (rows[name][kept].mean(0, dtype=np.float64) for name in ("mean", "square"))
  deviation = np.sqrt(np.maximum(square - mean**2, 0))
  return {
    "written": int(kept.sum()),
    "captions": int(rows["captions"][kept].sum()),
    "questions": int(rows["questions"][kept].sum()),
    "caption_words": _spread(rows["words"][np.repeat(kept, rows["captions"])]),
    "shorter_side": _spread(rows["side"][kept]),
    "pixel_mean": mean.round(4).tolist(),
    "pixel_std": deviation.round(4).tolist(),
  }


def _spread(values: np.ndarray) -> dict[str, float] | None:
  if not len(values):
    return None
  return {
    "min": int(values.min()),
    "median": float(np.median(values)),
    "mean": round(float(values.mean()), 3),
    "max": int(values.max()),
  }


def contact_sheet(source: StoredSource) -> Image.Image:
  """Up to 8 x 6 evenly spaced examples, each with the start of what is said of it, for the eye to judge."""
  columns, rows = 8, 6
  chosen = np.linspace(0, len(source) - 1, min(columns * rows, len(source))).astype(int)
  side, lines, line = 128, 3, 12
  sheet = Image.new("RGB", (columns * side, -(-len(chosen) // columns) * (side + lines * line)), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
  for cell, i in enumerate(chosen):
    x, y = cell % columns * side, cell // columns * (side + lines * line)
    example = source[i]
    sheet.paste(Image.fromarray(example.image).resize((side - 8, side - 8)), (x + 4, y + 4))
    text = textwrap.wrap(source.texts(i)[0], 22, max_lines=lines, placeholder=" …")
    draw.multiline_text((x + 4, y + side - 3), "\n".join(text), "black", font, spacing=1)
  return sheet


def _settings(of: Any) -> dict[str, Any]:
  """The fields of a dataclass as JSON has them."""
  values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of) if field.init}
  return {name: None if value == math.inf else value for name, value in values.items()}


def _is_finished(output: Path, request: dict[str, Any]) -> bool:
  """Whether `output` is the result of `request`; UserError where it is anything else than that, or nothing."""
  if not output.exists() or (output.is_dir() and not any(output.iterdir())):
    return False
  try:
    if read_manifest(output)["request"] == request:
      return True
    what = "was prepared from other inputs or settings"
  except UserError:
    what = "exists"
  raise UserError(f"{output} {what}: give another output, or remove it first")


def _verify(folder: Path) -> None:
  manifest = read_manifest(folder)
  expected = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} | {INDEX: manifest["index_sha256"]}
  for name, sha256 in expected.items():
    if not (folder / name).is_file() or _sha256(folder / name) != sha256:
      raise UserError(f"{folder / name} is damaged, its checksum is not that of {MANIFEST}: remove {folder}")


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _begin(partial: Path, request: dict[str, Any]) -> Path:
  """The folder to write in: new, or that of a killed run of the same request; no other is touched."""
  file = partial / PARTS / REQUEST
  if file.is_file():
    if json.loads(file.read_text(encoding="utf-8")) != request:
      raise UserError(f"{partial} was begun from other inputs or settings, or the inputs changed since: remove it")
    (partial / ERRORS).unlink(missing_ok=True)  # written anew from what is known of each shard
    return partial
  if partial.exists() and (not partial.is_dir() or {path.name for path in partial.iterdir()} - {PARTS}):
    raise UserError(f"{partial} is in the way and was not written by prepare: move it")
  make_folder(partial)
  make_folder(partial / PARTS)
  files.write_text(file, json.dumps(request))
  return partial

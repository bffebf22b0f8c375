"""What `clipflow prepare` writes: a folder of ArrayRecord shards with a manifest and an index of splits."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource
from clipflow_jax.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.npy"


@dataclasses.dataclass(frozen=True)
class PreparedSource(StoredSource):
  """Folders that `clipflow prepare` wrote.

  manifest.json lists the shards, {"file", "records", "bytes", "sha256"}; index.npy is f64[M], the share of every
  record, which decides its split: NaN for a duplicate, which is in none. Opening a million records reads these two
  alone.
  """

  _shards: list[Path] = dataclasses.field(init=False, repr=False, compare=False)
  _ends: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)  # i64[S]: records up to a shard's end
  _records: Any = dataclasses.field(init=False, repr=False, compare=False)  # opens each shard at its first record

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    # Only a name: a manifest, as any data, leads nowhere else.
    shards = [(path / Path(shard["file"]).name, shard) for path in paths for shard in read_manifest(path)["shards"]]
    for file, shard in shards:
      size = file.stat().st_size if file.is_file() else "no"
      if size != shard["bytes"]:
        raise UserError(
          f"{file} has {size} bytes, {MANIFEST} says {shard['bytes']}: copy the folder again, or prepare it anew"
        )
    self._set(_shards=[file for file, _ in shards], _ends=np.cumsum([shard["records"] for _, shard in shards]))
    # Told how many records a file has, ArrayRecord need not open it to know.
    self._set(_records=ArrayRecordDataSource([f"{file}[0:{shard['records']}]" for file, shard in shards]))
    return [path / MANIFEST for path in paths]

  def _find_shares(self) -> np.ndarray:
    try:
      shares = np.concatenate([np.load(file.parent / INDEX, allow_pickle=False) for file in self._files])
    except (OSError, ValueError, EOFError) as error:
      raise UserError(
        f"an {INDEX} of {', '.join(str(file.parent) for file in self._files)} cannot be read, copy it again: {error}"
      ) from error
    if len(shares) != len(self._records):
      raise UserError(
        f"{INDEX} of {self._files[0].parent} is of {len(shares)} records, the shards have {len(self._records)}"
      )
    return shares

  def _read(self, row: int) -> Record:
    try:
      return unpack(self._records[row])
    except Exception as error:  # of the shard's own checksums, or what a damaged record unpacks to
      shard = int(np.searchsorted(self._ends, row, side="right"))
      raise BadRecord(f"{self._shards[shard]}:{row}", f"cannot be read: {error}") from error


def pack(record: Record) -> bytes:
  """A record with its pictures in memory, as it lies in a shard: msgpack of {"id", "captions", "turns", "images"}, and
  of an edit "before"."""
  fields = {"id": record.id, "captions": record.captions, "turns": record.turns, "images": record.pictures}
  return msgpack.packb(fields if record.before is None else fields | {"before": record.before})


def unpack(data: bytes) -> Record:
  """Inverse of `pack`. Shards of earlier releases have one "image", and "questions" with their answers for turns."""
  fields = msgpack.unpackb(data, use_list=False)
  if "questions" in fields:
    both = (turn for question, answer in fields["questions"] for turn in (("user", question), ("assistant", answer)))
    fields |= {"turns": tuple(both), "images": (fields["image"],)}
  return Record(fields["id"], fields["captions"], fields["turns"], fields["images"], fields["id"], fields.get("before"))


def read_manifest(folder: Path) -> dict[str, Any]:
  """manifest.json of a prepared folder. Raises UserError where there is none."""
  try:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    operator.itemgetter("shards", "records", "request")(manifest)
    return manifest
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{folder} is not a prepared folder (no {MANIFEST} of one): "
      f"make one with clipflow prepare --source=folder --input={folder} --output=OUTPUT"
    ) from error

"""Parquet files with a column of encoded pictures, as the Hub's data sets keep them."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import records
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource, find_files
from clipflow_jax.errors import UserError

TEXTS = (*records.CAPTION_KEYS, "captions", *records.TURN_KEYS)
GROUPS = 4  # row groups kept decoded: enough for threads that read in order
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ParquetSource(StoredSource):
  """Parquet files with columns `image` (bytes, a struct with `bytes`, or a list of them) and those of `records.record`.

  Covers BLIP3o's image + txt, LLaVA's image + conversations, and pairs of pictures with what was done to the first, as
  MagicBrush's: image="target_img", before="source_img", caption="instruction". Ids are `file name/row`, or those of a
  column `id` where it has one. Needs pyarrow, the [parquet] extra. Parquet has no access to one row: its whole row
  group is decoded, so train on what `clipflow prepare`, which reads in order, makes of it.
  """

  image: str = "image"  # the column of pictures
  before: str = ""  # of edits, the column of the pictures before them
  caption: str = ""  # the column of a caption or a list of them, where it has a name of its own: no other is then read
  # i64[G,4]: file, group in it, first row of all, first row of the file
  _groups: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    files = find_files(paths, ".parquet")
    groups, first = [], 0
    for number, file in enumerate(files):
      parquet, start = _parquet(file), first
      self._check(parquet.schema_arrow.names, file)
      for group in range(parquet.num_row_groups):
        groups.append((number, group, first, start))
        first += parquet.metadata.row_group(group).num_rows
    if not first:
      raise UserError(f"{files[0]} has no rows")
    self._set(_groups=np.array(groups, np.int64))
    return files

  def _ids(self) -> Iterable[str]:
    for file in self._files:
      parquet = _parquet(file)
      if "id" in parquet.schema_arrow.names:
        try:
          own = parquet.read(columns=["id"])["id"].to_pylist()
        except (OSError, ValueError) as error:
          raise UserError(f"the column id of {file} cannot be read: {error}") from error
      else:
        own = [None] * parquet.metadata.num_rows
      yield from (_id(id, file, row) for row, id in enumerate(own))

  def _read(self, row: int) -> Record:
    group = int(np.searchsorted(self._groups[:, 2], row, side="right")) - 1
    number, index, first, start = (int(x) for x in self._groups[group])
    file = self._files[number]
    where = f"{file}:{row - start}"
    try:
      stamp = file.stat()
      with _LOCK:  # not one row group by every thread
        wanted = (*self._own, "id", *self._texts)
        group_of_rows = _read_group(file, stamp.st_size, stamp.st_mtime_ns, index, wanted)
      if row - first >= len(group_of_rows):
        raise BadRecord(where, "cut short: the file has become shorter")
      fields = group_of_rows.slice(row - first, 1).to_pylist()[0]
    except BadRecord:
      raise
    except UnicodeDecodeError as error:
      raise BadRecord(where, f"not UTF-8: {error}") from error
    except Exception as error:  # pyarrow has its own kinds for damage
      raise BadRecord(where, f"cannot be read: {error}") from error
    named = fields.get(self.caption)
    texts = {"captions" if isinstance(named, list) else "caption": named} if self.caption else fields
    texts |= {key: fields.get(key) for key in records.TURN_KEYS}
    shown = fields[self.image]
    shown = shown if isinstance(shown, list) else [] if shown is None and records.talks(fields) else [shown]
    before = _picture(fields[self.before], where) if self.before else None
    id = _id(fields.get("id"), file, row - start)
    return records.record(id, texts, [_picture(picture, where) for picture in shown], where, before=before)

  @property
  def _own(self) -> dict[str, str]:
    """{column: the setting that names it} of those that have to be there."""
    return {getattr(self, name): name for name in ("image", "before", "caption") if getattr(self, name)}

  @property
  def _texts(self) -> tuple[str, ...]:
    return records.TURN_KEYS if self.caption else TEXTS

  def _check(self, names: Sequence[str], file: Path) -> None:
    for column, setting in self._own.items():
      if column not in names:
        raise UserError(f"{file} has no column {column!r}: set data.{setting} to one of {', '.join(names)}")
    if not self.caption and not set(names) & set(TEXTS):
      told = f"set data.caption to one of {', '.join(names)}"
      raise UserError(f"{file} has no column of texts ({', '.join(TEXTS)}): {told}")


def _id(own: Any, file: Path, row: int) -> str:
  return f"{file.stem}/{row}" if own is None else records.clean(str(own))


def _picture(value: Any, where: str) -> bytes:
  """The encoded picture. A path that stands where bytes could is never followed."""
  value = value.get("bytes") if isinstance(value, dict) else value
  if not isinstance(value, bytes):
    raise BadRecord(where, "no file: the picture's bytes are not in the row")
  return value


def _parquet(file: Path) -> Any:
  try:
    import pyarrow.parquet as pq
  except ImportError as error:
    raise UserError("parquet files need pyarrow: pip install 'clipflow_jax[parquet]'") from error
  try:
    return pq.ParquetFile(file)
  except (OSError, ValueError) as error:
    raise UserError(f"{file} is not a parquet file: {error}") from error


@functools.lru_cache(maxsize=GROUPS)
def _read_group(file: Path, size: int, changed: int, group: int, wanted: tuple[str, ...]) -> Any:
  """A row group as a table of those of the wanted columns that are there; of the file as it is now, as its key says."""
  parquet = _parquet(file)
  columns = [name for name in parquet.schema_arrow.names if name in wanted]
  return parquet.read_row_group(group, columns=columns)

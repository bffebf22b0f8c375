"""Pictures as files, with a file of JSON lines beside them: our captions.jsonl, LLaVA's conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import records
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource
from clipflow_jax.errors import UserError

CAPTIONS = "captions.jsonl"
PICTURE_KEYS = ("file", "image")  # ours and LLaVA's
BEFORE = "before"  # of an edit, the picture that the caption tells how to change


@dataclasses.dataclass(frozen=True)
class FolderSource(StoredSource):
  """Folders of pictures with captions.jsonl in them, or JSONL files of any name beside their pictures.

  A line is {"file": "a.png", ...} or {"image": "a.png", ...}, a path relative to the JSONL file's folder, with the
  texts that `records.texts` reads; of an edit {"file": "after.png", "before": "a.png", "caption": "make it red"}. Ids
  are `folder name/file` unless the record has its own; the split goes by the former: lines may share a picture.
  Only byte offsets are kept in memory.
  """

  # i64[M,3]: which file, line number, offset in bytes
  _lines: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
  _names: list[str] = dataclasses.field(init=False, repr=False, compare=False)  # until the splits are known

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    files = [_captions_file(path) for path in paths]
    found = [(index, *line) for index, file in enumerate(files) for line in _scan(file)]
    self._set(_lines=np.array([line[:3] for line in found], np.int64), _names=[line[3] for line in found])
    return files

  def _ids(self) -> Iterable[str]:
    names = self._names
    self._set(_names=[])
    return names

  def _read(self, row: int) -> Record:
    index, number, offset = (int(x) for x in self._lines[row])
    file = self._files[index]
    with file.open("rb") as lines:
      lines.seek(offset)
      fields = records.parse(lines.readline(), f"{file}:{number}")
    picture = _picture(fields, f"{file}:{number}")
    captions, questions = records.texts(fields, f"{file}:{number}")
    name, before = f"{file.parent}/{picture}", fields.get(BEFORE)
    if before is not None and not isinstance(before, str):
      raise BadRecord(name, f"no file: {BEFORE!r} must be the path of the picture before the edit")
    inside = [_inside(file.parent, path, name) for path in (picture, before) if path is not None]
    return Record(_id(fields, file), captions, questions, inside[0], name, *inside[1:])


def _captions_file(path: Path) -> Path:
  if path.is_file():
    return path
  if not path.is_dir():
    raise UserError(
      f"there is no folder {path}: give one with pictures and {CAPTIONS}, or a .jsonl file beside its own"
    )
  if not (path / CAPTIONS).is_file():
    raise UserError(
      f'{path} has no {CAPTIONS}: write one, for each picture a line {{"file": "a.png", "caption": "a cat"}}'
    )
  return path / CAPTIONS


def _scan(file: Path) -> list[tuple[int, int, str]]:
  """(number, offset in bytes, name of its picture) of every line that is not blank; a bad one has a name of its own."""
  rows, offset, usable, why = [], 0, 0, "it is empty"
  folder = file.parent.resolve().name
  try:
    with file.open("rb") as lines:
      for number, line in enumerate(lines, start=1):
        if line.strip():
          where = f"{file}:{number}"
          try:
            fields = records.parse(line, where)
            records.texts(fields, where)
            rows.append((number, offset, f"{folder}/{_picture(fields, where)}"))
            usable += 1
          except BadRecord as error:
            rows.append((number, offset, f"{folder}/{file.name}:{number}"))
            why = f"the last line is bad, {error.why}"
        offset += len(line)
  except OSError as error:
    raise UserError(f"cannot read {file}: {error}") from error
  if not usable:
    raise UserError(
      f'{file} has no usable record ({why}): write for each picture a line {{"file": "a.png", "caption": "a cat"}}'
    )
  return rows


def _picture(fields: dict[str, Any], where: str) -> str:
  picture = next((fields[key] for key in PICTURE_KEYS if key in fields), None)
  if not isinstance(picture, str) or not picture or picture != records.encodable(picture):
    raise BadRecord(where, "no file: 'file' (or 'image') must be the path of a picture")
  return picture


def _id(fields: dict[str, Any], file: Path) -> str:
  id = fields.get("id")
  return f"{file.parent.resolve().name}/{records.clean(_picture(fields, ''))}" if id is None else records.clean(str(id))


def _inside(folder: Path, file: str, name: str) -> Path:
  """The path of a record's file. Nothing outside the folder is ever read, whatever the JSONL says."""
  try:
    path = (folder / file).resolve()
    inside = path.is_relative_to(folder.resolve()) and ".." not in Path(file).parts and not Path(file).is_absolute()
    there = path.is_file()
  except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, a loop of links
    raise BadRecord(name, f"not a path: {error}") from error
  if not inside:
    raise BadRecord(name, "outside its folder: files are named relative to their JSONL file, without .. or links")
  if not there:
    raise BadRecord(name, "missing file")
  return path

"""Pictures as files, with a file of JSON beside them: our captions.jsonl, LLaVA's conversations."""

from __future__ import annotations

import codecs
import dataclasses
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import records
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource
from clipflow_jax.errors import UserError

CAPTIONS = "captions.jsonl"
PICTURE_KEYS = ("file", "image", "images")  # ours and LLaVA's, and that of others for several
CHUNK = 2**22  # characters
_BETWEEN = re.compile(r"[\s,\[\]]*")
BEFORE = "before"  # of an edit, the picture that the caption tells how to change


@dataclasses.dataclass(frozen=True)
class FolderSource(StoredSource):
  """Folders of pictures with captions.jsonl in them, or JSONL files of any name beside their pictures.

  A line is {"file": "a.png", ...} or {"image": "a.png", ...}, a path relative to the JSONL file's folder, or a list of
  them, with the texts that `records.record` reads; of an edit {"file": "after.png", "before": "a.png", "caption": "make
  it red"}. A conversation may have no picture. A file may also be one JSON array of such objects, as LLaVA's are. Ids
  are `folder name/file` unless the record has its own; the split goes by the former: lines may share a picture.
  Only byte offsets are kept in memory.
  """

  # i64[M,4]: which file, number of the line or of the array's element, offset and length in bytes
  _lines: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
  _names: list[str] = dataclasses.field(init=False, repr=False, compare=False)  # until the splits are known

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    files = [_captions_file(path) for path in paths]
    found = [(index, *line) for index, file in enumerate(files) for line in _scan(file)]
    self._set(_lines=np.array([line[:4] for line in found], np.int64), _names=[line[4] for line in found])
    return files

  def _ids(self) -> Iterable[str]:
    names = self._names
    self._set(_names=[])
    return names

  def _read(self, row: int) -> Record:
    index, number, offset, length = (int(x) for x in self._lines[row])
    file = self._files[index]
    where = f"{file}:{number}"
    with file.open("rb") as lines:
      lines.seek(offset)
      fields = records.parse(lines.read(length), where)
    pictures = _pictures(fields, where)
    name, before = f"{file.parent}/{pictures[0]}" if pictures else where, fields.get(BEFORE)
    if before is not None and not isinstance(before, str):
      raise BadRecord(name, f"no file: {BEFORE!r} must be the path of the picture before the edit")
    inside = [_inside(file.parent, path, name) for path in pictures]
    id = records.clean(str(fields["id"])) if fields.get("id") is not None else _name(file, number, pictures)
    changed = None if before is None else _inside(file.parent, before, name)
    return records.record(id, fields, inside, where, name, changed)


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


def _scan(file: Path) -> list[tuple[int, int, int, str]]:
  """(number, offset and length in bytes, name) of every record; a bad one has a name too.

  A picture has one name, however its path is spelled: by it all of its records are of one split.
  """
  rows, usable, why = [], 0, "it is empty"
  try:
    for number, (offset, text) in enumerate(_texts(file), start=1):
      if not text.strip():
        continue
      pictures: list[str] = []
      try:
        where = f"{file}:{number}"
        fields = records.parse(text, where)
        pictures = _pictures(fields, where)
        records.record("", fields, [Path(picture) for picture in pictures], where)
        usable += 1
      except BadRecord as error:
        why = f"the last line is bad, {error.why}"
        pictures = []
      rows.append((number, offset, len(text), _name(file, number, [posixpath.normpath(path) for path in pictures[:1]])))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {file}: {error}") from error
  if not usable:
    raise UserError(
      f'{file} has no usable record ({why}): write for each picture a line {{"file": "a.png", "caption": "a cat"}}'
    )
  return rows


def _texts(file: Path) -> Iterator[tuple[int, bytes]]:
  """(offset in bytes, text) of every line, or of every element of a JSON array."""
  with file.open("rb") as lines:
    offset = 0
    for line in lines:
      if not offset and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        break
      yield offset, line
      offset += len(line)
    else:
      return
  yield from _elements(file)


def _elements(file: Path) -> Iterator[tuple[int, bytes]]:
  """The same of a JSON array, of which little more than an element is held; what cannot be read ends it, as one."""
  decoder = json.JSONDecoder()
  with file.open("rb") as opened:
    offset = len(codecs.BOM_UTF8) if opened.read(3) == codecs.BOM_UTF8 else 0
  with file.open(encoding="utf-8-sig", newline="") as opened:
    text, at = "", 0
    while more := opened.read(CHUNK):
      text, at = text[at:] + more, 0
      while True:
        start = _BETWEEN.match(text, at).end()
        try:
          _, end = decoder.raw_decode(text, start)
        except ValueError:  # it may go on in what is read next
          break
        offset += len(text[at:start].encode())
        yield offset, (element := text[start:end].encode())
        offset, at = offset + len(element), end
  start = _BETWEEN.match(text, at).end()
  yield offset + len(text[at:start].encode()), text[start:].encode()


def _pictures(fields: dict[str, Any], where: str) -> list[str]:
  """The paths that a record names; none where it is a conversation that names none."""
  named: Any = next((fields[key] for key in PICTURE_KEYS if fields.get(key)), [])
  pictures = named if isinstance(named, list) else [named]
  if not all(isinstance(path, str) and path and path == records.encodable(path) for path in pictures) or not (
    pictures or records.talks(fields)
  ):
    raise BadRecord(where, "no file: 'file' (or 'image') must be the path of a picture")
  return pictures


def _name(file: Path, number: int, pictures: list[str]) -> str:
  """What a record without an id is called, and what decides its split: its first picture, or its place."""
  return f"{file.parent.resolve().name}/{records.clean(pictures[0]) if pictures else f'{file.name}:{number}'}"


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

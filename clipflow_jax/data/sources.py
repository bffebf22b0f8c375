"""Where captioned pictures come from: random access by index, one Example at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipflow_jax.data import images, records
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError

CAPTIONS = "captions.jsonl"
SPLITS = ("train", "test", "all")


class Source(Protocol):
  """Random access to examples. `__getitem__` raises BadRecord for a record that cannot be read."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Pictures in a folder with captions.jsonl beside them, one record a line (see `records.parse`).

  An example belongs to the test split when the hash of its id says so: the split depends on no order and no
  other record, and every caption of a picture falls on the same side. Ids are `folder name/file` unless the
  record has its own. A line that cannot be read keeps its place and raises BadRecord when it is asked for.
  Only byte offsets are kept in memory.
  """

  path: str | Path | Sequence[str | Path]  # a folder, several with commas between, or a sequence of them
  size: int = 60  # height and width in pixels
  split: str = "train"  # or "test", or "all"
  test_fraction: float = 0.05
  fit: str = "crop"  # how a picture becomes square: "crop" or "pad"
  _folders: tuple[Path, ...] = dataclasses.field(init=False, repr=False)
  # i64[N,3]: which folder, line number, offset in bytes
  _lines: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    if self.split not in SPLITS:
      raise UserError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")
    if self.fit not in images.FITS:
      raise UserError(f"data.fit is {self.fit!r}: choose one of {', '.join(images.FITS)}")
    if not 0 <= self.test_fraction < 1:
      raise UserError(f"data.test_fraction is {self.test_fraction}: give a fraction from 0 to less than 1")
    if self.size < 1:
      raise UserError(f"data.size is {self.size}: give the height and width in pixels")
    object.__setattr__(self, "_folders", tuple(_folder(path) for path in folder_paths(self.path)))
    object.__setattr__(self, "path", tuple(map(str, self._folders)))
    object.__setattr__(self, "_lines", self._index())

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, i: int) -> Example:
    record = self.record(i)
    folder = self._folders[self._lines[i, 0]]
    path = _inside(folder, record.file)
    image = images.decode(path, self.size, fit=self.fit, name=f"{folder}/{record.file}")
    return Example(record.id, image, record.captions, record.captions[0], record.questions)

  def record(self, i: int) -> records.Record:
    """The texts of item i, without its picture. Raises BadRecord."""
    index, number, offset = (int(x) for x in self._lines[i])
    with (self._folders[index] / CAPTIONS).open("rb") as file:
      file.seek(offset)
      return records.parse(file.readline(), self._folders[index], number)

  def _index(self) -> np.ndarray:
    """The lines of this split, from one reading of every captions.jsonl."""
    rows = [
      (index, number, offset)
      for index, folder in enumerate(self._folders)
      for number, offset, id in _scan(folder)
      if self.split == "all" or (self.split == "test") == (_share(id) < self.test_fraction)
    ]
    if not rows:
      raise UserError(
        f"the {self.split} split of {', '.join(map(str, self._folders))} has no record at "
        f"test_fraction {self.test_fraction}: give a larger folder or another data.test_fraction"
      )
    return np.array(rows, np.int64)


KINDS: dict[str, type] = {"shapes": ShapesSource, "folder": FolderSource}


def make(config: Mapping[str, Any], split: str) -> Source:
  """The source that `config.kind` names; the other keys are the fields of its class."""
  options = dict(config)
  kind = options.pop("kind", None)
  if kind not in KINDS:
    raise UserError(f"data.kind is {kind!r}: choose one of {', '.join(KINDS)}")
  settings = {field.name: field for field in dataclasses.fields(KINDS[kind]) if field.init}
  del settings["split"]
  unknown = sorted(options.keys() - settings.keys())
  if unknown:
    raise UserError(f"data.{unknown[0]} is no setting of {kind!r} data; there are {', '.join(settings)}")
  for name, field in settings.items():
    if name not in options and field.default is dataclasses.MISSING:
      raise UserError(f"data.{name} is missing: {kind!r} data needs it")
  return KINDS[kind](split=split, **options)


def folder_paths(path: str | Path | Iterable[str | Path]) -> list[Path]:
  """The folders of "a,b", of Path("a") or of ("a", "b")."""
  parts = path.split(",") if isinstance(path, str) else [path] if isinstance(path, Path) else path
  paths = [Path(str(part).strip()).expanduser() for part in parts if str(part).strip()]
  if not paths:
    raise UserError("data.path is empty: give a folder with pictures and captions.jsonl")
  return paths


def _folder(path: Path) -> Path:
  if not path.is_dir():
    raise UserError(f"there is no folder {path}: give one with pictures and {CAPTIONS}")
  if not (path / CAPTIONS).is_file():
    raise UserError(
      f'{path} has no {CAPTIONS}: write one, for each picture a line {{"file": "a.png", "caption": "a cat"}}'
    )
  return path


def _scan(folder: Path) -> list[tuple[int, int, str]]:
  """(number, offset in bytes, id) of every line that is not blank; one that cannot be read is its own id."""
  rows, offset, usable, why = [], 0, 0, "it is empty"
  with (folder / CAPTIONS).open("rb") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        try:
          rows.append((number, offset, records.parse(line, folder, number).id))
          usable += 1
        except BadRecord as error:
          rows.append((number, offset, f"{folder.resolve().name}/{CAPTIONS}:{number}"))
          why = f"the last line is bad, {error.why}"
      offset += len(line)
  if not usable:
    raise UserError(
      f"{folder / CAPTIONS} has no usable record ({why}): "
      'write for each picture a line {"file": "a.png", "caption": "a cat"}'
    )
  return rows


def _inside(folder: Path, file: str) -> Path:
  """The path of a record's file. Nothing outside the folder is ever read, whatever captions.jsonl says."""
  name = f"{folder}/{file}"
  try:
    path = (folder / file).resolve()
    inside = path.is_relative_to(folder.resolve()) and ".." not in Path(file).parts and not Path(file).is_absolute()
    there = path.is_file()
  except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, a loop of links
    raise BadRecord(name, f"not a path: {error}") from error
  if not inside:
    raise BadRecord(name, "outside its folder: files are named relative to captions.jsonl, without .. or links")
  if not there:
    raise BadRecord(name, "missing file")
  return path


def _share(id: str) -> float:
  """A number in [0, 1) that depends on the id alone."""
  return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") / 2**64

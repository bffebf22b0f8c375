"""What all sources on disk share: which records are of a split, and how one becomes an Example."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import images
from clipflow_jax.data.example import Dialogue, Example, said
from clipflow_jax.data.records import Record
from clipflow_jax.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "test", "all")
Paths = str | Path | Sequence[str | Path]


@dataclasses.dataclass(frozen=True)
class StoredSource:
  """Captioned pictures, and conversations, on disk in any order; each format says where its records lie and reads one.

  An example belongs to the test split when a hash says so, of its id or, where pictures have names, of its picture's:
  the split depends on no order and no other record, and every caption of a picture falls on the same side. A record
  that cannot be read keeps its place and raises BadRecord when it is asked for. Pictures and texts stay on disk,
  and no file stays open unless it may be shared among threads: a source travels to worker processes.
  """

  path: Paths  # a file or folder, several with commas between, or a sequence of them
  size: int = 60  # height and width in pixels
  split: str = "train"  # or "test", or "all"
  test_fraction: float = 0.05
  fit: str = "crop"  # how a picture becomes square: "crop" or "pad"
  _files: tuple[Path, ...] = dataclasses.field(init=False, repr=False)  # what the records were found in
  _shares: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)  # f64[M] of every record
  _rows: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)  # i64[N]: the records of this split

  def __post_init__(self) -> None:
    if self.split not in SPLITS:
      raise UserError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")
    if self.fit not in images.FITS:
      raise UserError(f"data.fit is {self.fit!r}: choose one of {', '.join(images.FITS)}")
    if not 0 <= self.test_fraction < 1:
      raise UserError(f"data.test_fraction is {self.test_fraction}: give a fraction from 0 to less than 1")
    if self.size < 1:
      raise UserError(f"data.size is {self.size}: give the height and width in pixels")
    paths = tuple(split_paths(self.path))
    self._set(path=tuple(map(str, paths)))
    self._set(_files=tuple(self._open(paths)))
    shares = self._find_shares()
    border = max(self.test_fraction, np.nextafter(0.0, 1.0))  # those of a data set's own test split have share 0
    wanted = {"train": shares >= border, "test": shares < border, "all": shares >= 0}
    self._set(_shares=shares, _rows=np.flatnonzero(wanted[self.split]))
    if not len(self._rows):
      raise UserError(
        f"the {self.split} split of {', '.join(map(str, paths))} has no record at "
        f"test_fraction {self.test_fraction}: give more data or another data.test_fraction"
      )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Example:
    record = self.record(i)
    shown = [images.decode(file, self.size, fit=self.fit, name=record.name) for file in record.pictures]
    before = None if record.before is None else images.decode(record.before, self.size, fit=self.fit, name=record.name)
    every = np.stack(shown) if shown else np.zeros((0, self.size, self.size, 3), np.uint8)
    return Example(
      record.id,
      shown[0] if shown else np.zeros(every.shape[1:], np.uint8),
      record.captions,
      "".join(record.captions[:1]),
      record.questions,
      before,
      Dialogue(record.turns, every) if record.turns else None,
    )

  def texts(self, i: int) -> tuple[str, ...]:
    """What is said in example i, its picture not decoded. Raises BadRecord."""
    record = self.record(i)
    return said(record.captions, "".join(record.captions[:1]), (), record.turns)

  def record(self, i: int) -> Record:
    """Item i as it is stored, its picture not decoded. Raises BadRecord."""
    return self._read(int(self._rows[i]))

  def share(self, i: int) -> float:
    """The number in [0, 1) that decides the split of item i: test where it is less than test_fraction."""
    return float(self._shares[self._rows[i]])

  def fingerprint(self) -> list[dict[str, Any]]:
    """What makes files the same input: name, size, and a hash of both ends (the whole, up to two MiB)."""
    return [{"file": path.name, "bytes": path.stat().st_size, "sha256": _hash_ends(path)} for path in self._files]

  # What a format adds.

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    """Finds every record; the files that they are in. Raises UserError for what is not such data."""
    raise NotImplementedError

  def _ids(self) -> Iterable[str]:
    """What decides the split of every record, in order, without reading it."""
    raise NotImplementedError

  def _read(self, row: int) -> Record:
    """Record `row` of all. Raises BadRecord."""
    raise NotImplementedError

  def _find_shares(self) -> np.ndarray:
    return np.array([share(id) for id in self._ids()], np.float64)

  def _set(self, **values: Any) -> None:
    """Sets fields, of a frozen class that is still being made."""
    for name, value in values.items():
      object.__setattr__(self, name, value)


def share(id: str) -> float:
  """A number in [0, 1) that depends on the id alone."""
  # A folder's name may hold bytes that are no UTF-8.
  return int.from_bytes(hashlib.blake2b(id.encode(errors="surrogateescape"), digest_size=8).digest(), "big") / 2**64


def split_paths(path: Paths) -> list[Path]:
  """The paths of "a,b", of Path("a") or of ("a", "b")."""
  parts = path.split(",") if isinstance(path, str) else [path] if isinstance(path, Path) else path
  paths = [Path(str(part).strip()).expanduser() for part in parts if str(part).strip()]
  if not paths:
    raise UserError("data.path is empty: give a file or folder of captioned pictures")
  return paths


def find_files(paths: Iterable[Path], suffix: str) -> list[Path]:
  """The paths that are files, and the files named *`suffix` in those that are folders, sorted. UserError where none is.

  Upper case is as lower. A link inside a folder that leads out of it is not followed, with a warning.
  """
  found: list[Path] = []
  for path in paths:
    try:
      there = path.exists()
    except OSError as error:  # a name that is too long
      raise UserError(f"cannot read {path}: {error}") from error
    if not there:
      raise UserError(
        f"there is no {path}: give {suffix} files or a folder of them "
        "(from the Hub: hf download OWNER/NAME --repo-type=dataset --local-dir=FOLDER)"
      )
    if path.is_file():
      found.append(path)
      continue
    root = path.resolve()
    named = [file for file in sorted(path.rglob("*")) if file.name.lower().endswith(suffix) and file.is_file()]
    inside: list[Path] = []
    outside: list[Path] = []
    for file in named:
      (inside if file.resolve().is_relative_to(root) else outside).append(file)
    if not inside:
      links = f", but for {len(outside)} links that lead out of it: name their targets" if outside else ""
      raise UserError(f"the folder {path} has no {suffix} file{links}")
    if outside:
      log.warning("%d links such as %s lead out of %s and are not followed", len(outside), outside[0], path)
    found += inside
  return found


def _hash_ends(path: Path) -> str:
  size, length = path.stat().st_size, 2**20
  with path.open("rb") as file:
    sha256 = hashlib.sha256(file.read(length))
    file.seek(max(length, size - length))
    sha256.update(file.read(length))
  return sha256.hexdigest()

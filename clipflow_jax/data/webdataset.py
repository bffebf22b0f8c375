"""WebDataset: samples as neighbouring members of tar files, read where they lie."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from clipflow_jax.data import records
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource, find_files
from clipflow_jax.errors import UserError

log = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp")
# ending of a member: its place in a sample
PLACES = {
  **dict.fromkeys(PICTURES, 0),
  "txt": 1,
  "json": 2,
  **{f"before.{ending}": 3 for ending in PICTURES},
}
NONE = (-1, 0)


@dataclasses.dataclass(frozen=True)
class WebDatasetSource(StoredSource):
  """Tar files of NAME.jpg (.jpeg, .png, .webp) beside NAME.txt, a caption, or NAME.json, fields for `records.record`.

  Of an edit NAME.before.jpg is the picture before it, and the caption tells what shall become of that.
  Nothing is unpacked: the headers are walked through once per process, and a record is a few reads at known offsets.
  Member names are ids, `tar name/NAME`, and never paths; links and devices are passed over. Where a name comes again in
  a tar, as in those that were joined, it begins another sample, NAME.2. A sample whose picture or text is missing is a
  bad record. A tar that is cut short is read up to there, with a warning.
  """

  _names: list[str] = dataclasses.field(init=False, repr=False, compare=False)
  _tars: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)  # i64[M]: which of the files
  # i64[M,4,2]: (offset, length) in bytes of picture, .txt, .json and the picture before
  _places: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    files = find_files(paths, ".tar")
    stamps = [file.stat() for file in files]
    found = [_index(file, stamp.st_size, stamp.st_mtime_ns) for file, stamp in zip(files, stamps, strict=True)]
    self._set(
      _names=[name for names, _ in found for name in names],
      _tars=np.repeat(np.arange(len(files)), [len(names) for names, _ in found]),
      _places=np.concatenate([places for _, places in found]),
    )
    if not self._names:
      raise UserError(f"{files[0]} has no picture: a sample is NAME.jpg, .png or .webp beside NAME.txt or NAME.json")
    return files

  def _ids(self) -> Iterable[str]:
    return (self._id(row) for row in range(len(self._names)))

  def _id(self, row: int) -> str:
    return records.encodable(f"{self._files[self._tars[row]].stem}/{self._names[row]}")

  def _read(self, row: int) -> Record:
    file = self._files[self._tars[row]]
    where = records.encodable(f"{file}/{self._names[row]}")
    places = self._places[row].tolist()
    picture, caption, rest, before = (_bytes(file, start, length, where) for start, length in places)
    if picture is None:
      raise BadRecord(where, f"no file: none of .{', .'.join(PICTURES)} is beside its text")
    fields = {} if rest is None else records.parse(rest, where)
    # Both may be there: then the JSON tells where the picture is from.
    if caption is not None and (text := records.decode_text(caption, where)).strip():
      fields = {"caption": text} | {key: fields.get(key) for key in records.TURN_KEYS}
    return records.record(self._id(row), fields, [picture], where, before=before)


def _bytes(path: Path, start: int, length: int, where: str) -> bytes | None:
  if start < 0:
    return None
  try:
    with path.open("rb") as file:
      file.seek(start)
      data = file.read(length)
  except OSError as error:
    raise BadRecord(where, f"missing file: {error}") from error
  if len(data) < length:
    raise BadRecord(where, "cut short: the tar ends inside it")
  return data


@functools.lru_cache(maxsize=4096)
def _index(path: Path, size: int, changed: int) -> tuple[list[str], np.ndarray]:
  """(names, places) of a tar's samples, in order; of the file as it is now: its size and time are of the key."""
  samples: dict[str, list[tuple[int, int]]] = {}
  again: dict[str, int] = {}  # how many samples of a name there are, where it is more than one
  dotted: list[str] = []  # pictures and texts whose names have another dot before their ending
  behind = b""  # the members: zeros where the tar is whole
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        folder, _, file = member.name.rpartition("/")
        name, _, ending = file.partition(".")
        place = PLACES.get(ending.lower())
        if place is None and PLACES.get(ending.lower().rpartition(".")[2]) is not None:
          dotted.append(member.name)
        if member.isreg() and name and place is not None:
          name = f"{folder}/{name}" if folder else name
          places = samples.setdefault(_numbered(name, again), [NONE] * 4)
          if places[place] != NONE:  # as in tars that were joined
            again[name] = again.get(name, 1) + 1
            places = samples[_numbered(name, again)] = [NONE] * 4
          places[place] = (member.offset_data, member.size)
        tar.members = []  # type: ignore[attr-defined]  # which tarfile would keep, all of them
      tar.fileobj.seek(tar.offset)
      behind = tar.fileobj.read(2 * tarfile.RECORDSIZE)
  except OSError as error:
    raise UserError(f"cannot read {path}: {error}") from error
  except (tarfile.TarError, ValueError) as error:  # also numbers in its headers that are none
    if not samples:
      raise UserError(
        f"{path} is not a tar file: {error}; a compressed one cannot be read at random, gunzip it"
      ) from error
  if dotted:
    log.warning(
      "%s: %d members such as %s are passed over: a sample's name ends at its first dot, as WebDataset has it",
      path,
      len(dotted),
      dotted[0],
    )
  if again:
    log.warning(
      "%s: %d samples have a name that another before them has, such as %s: they are read as %s and so on",
      path,
      sum(again.values()) - len(again),
      next(iter(again)),
      _numbered(next(iter(again)), again),
    )
  if behind[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
    log.warning(
      "%s ends without tar's end mark: it may be cut short, as by a download that broke off; %d samples found",
      path,
      len(samples),
    )
  elif behind.strip(tarfile.NUL):
    log.warning("%s goes on behind tar's end mark, as one joined by cat does: the rest is not read", path)
  return list(samples), np.array(list(samples.values()), np.int64).reshape(-1, 4, 2)


def _numbered(name: str, again: dict[str, int]) -> str:
  """The name of the last sample so far of that name in a tar: no other has a dot behind its folder."""
  return f"{name}.{again[name]}" if name in again else name

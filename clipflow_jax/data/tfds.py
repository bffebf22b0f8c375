"""TensorFlow Datasets that are on this disk in array_record format, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import records
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.records import Record
from clipflow_jax.data.stored import StoredSource, share
from clipflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fields:
  """Where a data set keeps what we need."""

  image: str = "image"
  text: str = "label"  # a text, a list of texts or a class; "objects/label" is a field of a field
  caption: str = "{}"  # with the text in it
  train: str = "train"
  test: str = ""  # its own split for testing; without one, the hash of the id decides as everywhere


KNOWN: dict[str, Fields] = {
  "cifar10": Fields(test="test"),
  "cifar100": Fields(test="test"),
  "imagenet2012": Fields(test="validation"),  # its own test split has no labels; classes are WordNet ids: give names
  "oxford_flowers102": Fields(test="test"),
  "coco_captions": Fields(text="captions/text", test="test"),
  "celeb_a_hq": Fields(text="", caption="a portrait"),
}


@dataclasses.dataclass(frozen=True)
class TfdsSource(StoredSource):
  """A data set by its TFDS name, "cifar10" or "name/config" or "name/config:version", from the folder `path`.

  The fields after `names` are those of Fields: empty ones are as KNOWN says. With a test split of its own, train and
  test are the data set's; without, the hash of an id decides. Ids are `name/split/number`. Nothing is downloaded: a
  data set that is not there is an error with the command that gets it, and its size. Needs the [tfds] extra.
  """

  path: str | Path = ""  # by default where TFDS itself keeps them: $TFDS_DATA_DIR or ~/tensorflow_datasets
  name: str = ""
  names: str = ""  # a text file with the classes' names, one a line, for sets that have none for people
  image: str = ""
  text: str = ""
  caption: str = ""
  train: str = ""
  test: str = ""
  _fields: Fields = dataclasses.field(init=False, repr=False)
  _parts: list[tuple[str, Any]] = dataclasses.field(init=False, repr=False, compare=False)  # (split, data source)
  _classes: tuple[str, ...] = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Fields) if getattr(self, field.name)}
    known = KNOWN.get(_base(self.name), Fields())
    self._set(_fields=dataclasses.replace(known, **given))
    self._set(path=str(self.path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    super().__post_init__()

  def _open(self, paths: tuple[Path, ...]) -> Sequence[Path]:
    builder = _builder(self.name, paths[0])
    tfds, fields = _tfds(), self._fields
    wanted = [fields.train, fields.test] if fields.test else [fields.train]
    missing = [split for split in wanted if split not in builder.info.splits]
    if missing:
      raise UserError(f"{self.name} has no split {missing[0]!r}: there are {', '.join(builder.info.splits)}")
    skip = _nested(fields.image, tfds.decode.SkipDecoding())
    try:
      parts = [(split, builder.as_data_source(split, decoders=skip)) for split in wanted]
    except (NotImplementedError, KeyError) as error:
      raise UserError(
        f"{builder.data_path} cannot be read at random: {error}; build it again: {_command(self.name, paths[0])}"
      ) from error
    self._set(_parts=parts, _classes=self._find_classes(builder.info.features))
    return [Path(builder.data_path) / "dataset_info.json"]

  def _find_classes(self, features: Any) -> tuple[str, ...]:
    for name in filter(None, (self._fields.image, self._fields.text)):
      if not _has(features, name):
        raise UserError(
          f"{self.name} has no field {name!r}: there are {', '.join(features)}; set data.image, data.text"
        )
    if self.names:
      try:
        return tuple(Path(self.names).expanduser().read_text(encoding="utf-8").splitlines())
      except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data.names {self.names}: {error}") from error
    feature = _get(features, self._fields.text) if self._fields.text else None
    return tuple(name.replace("_", " ") for name in getattr(feature, "names", None) or ())

  def _find_shares(self) -> np.ndarray:
    if self._fields.test:  # their own splits
      return np.concatenate([np.full(len(part), float(i == 0)) for i, (_, part) in enumerate(self._parts)])
    return np.array([share(id) for id in self._ids()])

  def _ids(self) -> Iterator[str]:
    return (f"{self.name}/{split}/{i}" for split, part in self._parts for i in range(len(part)))

  def _read(self, row: int) -> Record:
    split, part = self._parts[0]
    if row >= len(part):
      row, (split, part) = row - len(part), self._parts[1]
    id = f"{self.name}/{split}/{row}"
    try:
      fields = part[row]
    except Exception as error:  # of the shard's own checksums, of what a damaged record says
      raise BadRecord(id, f"cannot be read: {error}") from error
    found = _texts(_get(fields, self._fields.text) if self._fields.text else "", self._classes, id)
    captions = {"captions": [self._fields.caption.replace("{}", text) for text in found]}
    picture = _get(fields, self._fields.image)
    return records.record(id, captions, [picture if isinstance(picture, bytes) else _png(picture)], id)


def _texts(value: Any, classes: tuple[str, ...], id: str) -> list[str]:
  """A class, a text or several, as texts."""
  values = value.tolist() if isinstance(value, np.ndarray) else value
  texts = []
  for one in values if isinstance(values, list) else [values]:
    if isinstance(one, bytes):
      texts.append(records.decode_text(one, id))
    elif isinstance(one, str):
      texts.append(one)
    elif classes and 0 <= int(one) < len(classes):
      texts.append(classes[int(one)])
    else:
      raise BadRecord(id, f"no caption: {one} is no text and no class that has a name")
  return texts


def _png(pixels: np.ndarray) -> bytes:
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def _tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError("TFDS data needs tensorflow-datasets: pip install 'clipflow_jax[tfds]'") from error
  logging.getLogger("absl").setLevel(logging.WARNING)  # TFDS tells there of every file it reads
  return tfds


def _builder(name: str, folder: Path) -> Any:
  """The data set's description from its files alone: none of its own code runs."""
  from etils import epath

  if not name:
    raise UserError("data.name is missing: say which data set, for instance kind='tfds:cifar10'")
  tfds = _tfds()
  from tensorflow_datasets.core import read_only_builder

  try:
    return read_only_builder.builder_from_files(name, data_dir=epath.Path(folder))
  except tfds.core.DatasetNotFoundError:
    pass
  raise UserError(f"{name} is not in {folder}: {_size(name)}; get it with: {_command(name, folder)}")


def _command(name: str, folder: Path) -> str:
  return f"pip install tensorflow && tfds build {name} --data_dir={folder} --file_format=array_record"


def _size(name: str) -> str:
  """What downloading it means, by the checksums that TFDS comes with."""
  tfds = _tfds()
  try:
    builder = tfds.builder_cls(_base(name))
  except tfds.core.DatasetNotFoundError:
    return "TFDS knows no data set of this name"
  except Exception:  # the code of a data set may need anything, TensorFlow first
    return "TFDS does not tell the size of its download"
  size = sum(info.size for info in builder.url_infos.values())
  by_hand = (
    "; part of it must be fetched by hand first, as TFDS will say" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
  )
  return (f"a download of {size:,} bytes" if size else "TFDS does not tell the size of its download") + by_hand


def _base(name: str) -> str:
  """A data set's name without its config and version."""
  return name.partition("/")[0].partition(":")[0]


def _get(fields: Any, name: str) -> Any:
  """fields["a"]["b"] for "a/b", where "a/b" is no name itself."""
  for part in [name] if name in fields else name.split("/"):
    fields = fields[part]
  return fields


def _has(features: Any, name: str) -> bool:
  try:
    _get(features, name)
  except (KeyError, TypeError, AttributeError):
    return False
  return True


def _nested(name: str, value: Any) -> Any:
  for part in reversed(name.split("/")):
    value = {part: value}
  return value

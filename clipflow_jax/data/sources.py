"""Where captioned pictures come from: random access by index, one Example at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.folder import FolderSource
from clipflow_jax.data.parquet import ParquetSource
from clipflow_jax.data.prepared import PreparedSource
from clipflow_jax.data.shapes_edits import ShapesEditsSource
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.tfds import TfdsSource
from clipflow_jax.data.webdataset import WebDatasetSource
from clipflow_jax.errors import UserError, resolve


class Source(Protocol):
  """Random access to examples. `__getitem__` raises BadRecord for a record that cannot be read."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Example: ...


KINDS: dict[str, type] = {
  "shapes": ShapesSource,
  "shapes_edits": ShapesEditsSource,
  "folder": FolderSource,
  "prepared": PreparedSource,
  "parquet": ParquetSource,
  "webdataset": WebDatasetSource,
  "tfds": TfdsSource,
}


def make(config: Mapping[str, Any], split: str) -> Source:
  """The source that `config.kind` names; the other keys are the fields of its class.

  kind: of KINDS ("tfds:NAME" also says its name), or "module:Class" of your own: a dataclass that is a Source, with a
  field `split`. UserError for a kind or settings that are not there.
  """
  options = dict(config)
  kind = options.pop("kind", None)
  if str(kind).startswith("tfds:"):
    kind, options["name"] = kind.split(":", 1)
  found: type = KINDS[kind] if kind in KINDS else _own(kind)
  settings = {field.name: field for field in dataclasses.fields(found) if field.init}
  del settings["split"]
  unknown = sorted(options.keys() - settings.keys())
  if unknown:
    raise UserError(f"data.{unknown[0]} is no setting of {kind!r} data; there are {', '.join(settings)}")
  for name, field in settings.items():
    if name not in options and field.default is dataclasses.MISSING:
      raise UserError(f"data.{name} is missing: {kind!r} data needs it")
    if isinstance(field.default, int | float) and isinstance(value := options.get(name, 0), str):
      try:
        options[name] = type(field.default)(value)
      except ValueError as error:
        raise UserError(f"data.{name} is {value!r}: give a number") from error
  return found(split=split, **options)


def readable(source: Source, order: Iterable[int], n: int) -> list[Example]:
  """The first n of those examples that can be read, in that order, or as many as there are."""
  examples: list[Example] = []
  for i in order:
    if len(examples) == n:
      break
    try:
      examples.append(source[int(i)])
    except BadRecord:
      continue
  return examples


def _own(kind: Any) -> Any:
  """The class that "module:Class" names."""
  if ":" not in str(kind):
    raise UserError(f"data.kind is {kind!r}: choose one of {', '.join(KINDS)}, or name your own class as module:Class")
  found = resolve("data.kind", kind)
  if not dataclasses.is_dataclass(found) or "split" not in {field.name for field in dataclasses.fields(found)}:
    raise UserError(f"data.kind is {kind!r}, which is no source: make it a dataclass with a field `split`")
  return found

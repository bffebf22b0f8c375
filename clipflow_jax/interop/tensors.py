"""Tensors of safetensors files to parameters and back, by a table of rows. No code here knows a family.

Reading is lazy: what a device keeps is read from the file when its array is made, and nothing else is in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from clipflow_jax.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
SHOWN = 20  # names of each kind that a message lists


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one tensor lies here and there: two functions of a NumPy array, inverse to each other.

  sliced: `ours` turns slices too, so that a part of the tensor can be read from the file alone.
  """

  ours: Callable[[np.ndarray], np.ndarray]
  theirs: Callable[[np.ndarray], np.ndarray]
  sliced: bool = False


def _to_convolution(kernel: np.ndarray) -> np.ndarray:
  patch = round((kernel.shape[0] / 3) ** 0.5)
  return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x, sliced=True)
LINEAR = Layout(np.transpose, np.transpose, sliced=True)  # [in,out] here, [out,in] in PyTorch
PATCHES = Layout(
  lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _to_convolution
)  # [(p p 3),out]; [out,3,p,p]
LED = Layout(lambda x: x[0], lambda x: x[None])  # there with a leading axis of 1
LED_TWICE = Layout(lambda x: x[0, 0], lambda x: x[None, None])


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter here and its tensor there.

  ours: its path; with a "layers" part it is stacked over layers, and {} in `theirs` is the layer's number.
  part, of: it is the part-th of `of` equal parts along their first axis (queries, keys and values in one matrix).
  """

  ours: str
  theirs: str
  layout: Layout = SAME
  part: int = 0
  of: int = 1

  @property
  def stacked(self) -> bool:
    return "{}" in self.theirs

  def names(self, shape: tuple[int, ...]) -> list[str]:
    """Their names for our parameter of this shape, one a layer."""
    return [self.theirs.format(i) for i in range(shape[0])] if self.stacked else [self.theirs]

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Their shape for ours."""
    one = np.broadcast_to(np.float32(0), ours[1:] if self.stacked else ours)
    first, *rest = (*self.layout.theirs(one).shape, None)
    return () if first is None else (first * self.of, *rest[:-1])


class Files:
  """The tensors of a folder's safetensors files, read lazily. UserError names what is wrong with the folder."""

  def __init__(self, folder: Path):
    self.where: dict[str, Path] = {}  # tensor -> file
    for file in _weight_files(folder):
      try:
        with safe_open(file, framework="np") as opened:
          self.where |= dict.fromkeys(opened.keys(), file)
      except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); download it again") from error

  def __getitem__(self, name: str) -> Any:
    """A slice of the safetensors library: shape, dtype, and values when indexed.

    From a file that is opened for it alone: what was read of one that stays open stays in this process's memory.
    """
    with safe_open(self.where[name], framework="np") as opened:
      return opened.get_slice(name)


def _weight_files(folder: Path) -> list[Path]:
  single = folder / "model.safetensors"
  if single.is_file():  # as transformers does: an index beside it is of what was there before
    return [single]
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    try:
      files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{index} is no index of tensors ({error!r}); download it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
      raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; download it again")
    return files
  found = sorted(folder.glob("*.safetensors"))
  if len(found) == 1:
    return found
  if found:
    raise UserError(f"{folder} has several safetensors files and no model.safetensors.index.json; leave one of them")
  pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
  if pickled:
    raise UserError(
      f"{folder} has only {', '.join(pickled[:3])}: pickled files can run any program and are never opened here; "
      "take a revision with safetensors, or convert them where you trust them with transformers' save_pretrained"
    )
  raise UserError(f"{folder} has no safetensors file; give the folder of a model that save_pretrained wrote")


def plan(rows: tuple[Row, ...], abstract: Mapping[str, Any]) -> dict[str, Row]:
  """{path: its row} of flat parameters. ValueError where a parameter has no row: the table is incomplete."""
  table = {row.ours: row for row in rows}
  lacking = [path for path in abstract if path not in table]
  if lacking:
    raise ValueError(f"no row for the parameters {', '.join(lacking[:SHOWN])}")
  return {path: table[path] for path in abstract}


def check(files: Files, rows: Mapping[str, Row], abstract: Mapping[str, Any], ignored: str, where: Path) -> None:
  """UserError that lists every tensor that is missing, misshapen, not a float, or not expected."""
  missing, misshapen, wanted = [], [], set()
  for path, row in rows.items():
    shape = row.shape(abstract[path].shape)
    for name in row.names(abstract[path].shape):
      wanted.add(name)
      if name not in files.where:
        missing.append(name)
        continue
      found, dtype = tuple(files[name].get_shape()), files[name].get_dtype()
      if found != shape:
        misshapen.append(f"{name} is {list(found)}, not {list(shape)}")
      elif dtype not in FLOATS:
        misshapen.append(f"{name} is {dtype}, not one of {', '.join(FLOATS)}")
  extra = [name for name in files.where if name not in wanted and not re.fullmatch(ignored, name)]
  found_wrong = {"missing": missing, "misshapen": misshapen, "not expected": extra}
  complaints = [f"{what}: {_listed(sorted(set(names)))}" for what, names in found_wrong.items() if names]
  if complaints:
    raise UserError(f"{where}: its tensors do not fit its config.json; nothing was read. {'; '.join(complaints)}")


def _listed(names: list[str]) -> str:
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more


def read(
  files: Files,
  rows: Mapping[str, Row],
  abstract: Mapping[str, Any],
  dtype: Any,
  shardings: Mapping[str, jax.sharding.Sharding] | None,
) -> dict[str, jax.Array]:
  """{path: array}, each part of it read when and where a device asks for it. dtype None: as in the file."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def make(path: str, row: Row) -> jax.Array:
    shape = abstract[path].shape
    names = row.names(shape)
    kind = np.dtype(dtype or FLOATS[files[names[0]].get_dtype()])

    def part(index: tuple[slice, ...]) -> np.ndarray:
      whole = tuple(slice(*at.indices(size)) for at, size in zip(index, shape, strict=True))
      out = np.empty([at.stop - at.start for at in whole], kind)
      if not row.stacked:
        out[...] = _piece(files[names[0]], row, whole)
        return out
      for slot, layer in enumerate(range(whole[0].start, whole[0].stop)):
        out[slot] = _piece(files[names[layer]], row, whole[1:])
      return out

    place = here if shardings is None else shardings[path]
    # One at a time: what is on its way to a device is in memory twice.
    return jax.block_until_ready(jax.make_array_from_callback(shape, place, part))

  return {path: make(path, row) for path, row in rows.items()}


def _piece(tensor: Any, row: Row, index: tuple[slice, ...]) -> np.ndarray:
  """Our `index` of one tensor of theirs."""
  shape = tensor.get_shape()
  if not row.layout.sliced or not shape:
    whole = np.asarray(tensor[...] if shape else tensor[()])
    size = whole.shape[0] // row.of if row.of > 1 else 0
    return row.layout.ours(whole[row.part * size : (row.part + 1) * size] if size else whole)[index]
  first, *rest = index if row.layout is SAME else index[::-1]
  offset = row.part * (shape[0] // row.of)
  return row.layout.ours(np.asarray(tensor[(slice(first.start + offset, first.stop + offset), *rest)]))


@dataclasses.dataclass
class Tensor:
  """One tensor of theirs that is yet to be made of our parameters."""

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: list[tuple[int, Row, Any, int]]  # part, its row, our parameter, the layer

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def make(self) -> np.ndarray:
    made = []
    for _, row, leaf, layer in sorted(self.parts, key=lambda part: part[0]):
      whole = np.asarray(leaf)
      made.append(row.layout.theirs(whole[layer] if row.stacked else whole))
    return np.ascontiguousarray(made[0] if len(made) == 1 else np.concatenate(made)).reshape(self.shape)


def theirs(rows: Mapping[str, Row], params: Mapping[str, Any]) -> dict[str, Tensor]:
  """{their name: Tensor} of flat parameters."""
  made: dict[str, Tensor] = {}
  for path, row in rows.items():
    leaf = params[path]
    for layer, name in enumerate(row.names(leaf.shape)):
      tensor = made.setdefault(name, Tensor(row.shape(leaf.shape), np.dtype(leaf.dtype), []))
      tensor.parts.append((row.part, row, leaf, layer))
  return made


def flatten(params: Any) -> dict[str, Any]:
  """Nested parameters -> {"a/b/kernel": leaf}."""
  return flax.traverse_util.flatten_dict(params, sep="/")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(dict(flat), sep="/")

"""The text of a compiled program as instructions: what there is to read in it, and nothing of what it costs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[sufc]\d+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: dtype, dims, and whether it lies in main memory (not in a chip's fast scratchpad)."""

  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> float:
    size = BYTES.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype[1:])) / 8
    return size * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shape op(operands), attributes`."""

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """({computation: {name: instruction}}, in the text's order; which computation is the entry).

  ValueError when the text is no compiled module.
  """
  computations, entry = {}, ""
  for name, is_entry, lines in _computations(text):
    computations[name] = {i.name: i for i in map(_instruction, lines) if i}
    entry = name if is_entry else entry
  if not entry:
    raise ValueError("the text is no compiled module: it has no ENTRY computation")
  return computations, entry


def group(attributes: str, devices: int) -> tuple[int, ...]:
  """The first group of a collective (of a permutation: the first pair that differs), as positions in the mesh."""
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    found = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)", "{" + pairs[1].lstrip("{"))]
    return next((pair for pair in found if pair[0] != pair[1]), ())
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? \{([^}]*)\}", attributes
  )
  if named:
    axes = re.findall(r"'([^']+)'=(\d+)", named[1])
    ids = _iota(named[2], devices) if named[2] else np.arange(devices)
    ids = ids.reshape([int(size) for _, size in axes])
    chosen = re.findall(r"'([^']+)'", named[3])
    return tuple(ids[tuple(slice(None) if name in chosen else 0 for name, _ in axes)].ravel().tolist())
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
  if iota:
    return tuple(_iota(iota[3], devices).reshape(int(iota[1]), int(iota[2]))[0].tolist())
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  return tuple(map(int, listed[1].split(","))) if listed else tuple(range(devices))


def _iota(text: str, devices: int) -> np.ndarray:
  """Device numbers of "[4,64]T(1,0)": counted in that shape, then transposed, then flat."""
  dims = [int(d) for d in re.search(r"\[([\d,]+)\]", text)[1].split(",")]
  order = re.search(r"T\(([\d,]+)\)", text)
  ids = np.arange(math.prod(dims)).reshape(dims)
  return (ids.transpose([int(d) for d in order[1].split(",")]) if order else ids).ravel()


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
  """(name, whether it is the entry, its instructions). One may go over several lines: a kernel's has its own words."""
  name, is_entry = "", False
  lines: list[str] = []
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head:
      name, is_entry, lines = head[2], bool(head[1]), []
    elif line == "}" and name:
      yield name, is_entry, lines
      name = ""
    elif name and line.startswith("  "):
      lines.append(line)
    elif name and lines:
      lines[-1] += line


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  shape, rest = _shape(line[head.end() :])
  call = re.match(r"\s*([\w\-]+)\(", rest)
  if not call:
    return None
  inside, attributes = _parentheses(rest[call.end() - 1 :])
  arrays = tuple(
    Array(dtype, tuple(int(d) for d in dims.split(",") if d), not re.search(r"S\([1-9]", layout))
    for dtype, dims, layout in SHAPE.findall(shape)
  )
  # A constant's value stands where others have operands.
  operands = () if call[1] == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
  attributes = inside if call[1] in ("constant", "parameter") else attributes
  return Instruction(head[2], call[1], arrays, operands, attributes, bool(head[1]))


def _shape(text: str) -> tuple[str, str]:
  """(the shape that the text begins with, the rest)."""
  if text.startswith("("):
    inside, rest = _parentheses(text)
    return inside, rest
  found = re.match(r"[\w]+\[[^\]]*\](\{[^}]*\})?", text)
  return (found[0], text[found.end() :]) if found else ("", text)


def _parentheses(text: str) -> tuple[str, str]:
  """(what the parentheses that the text begins with hold, what follows them)."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[1:i], text[i + 1 :]
  return text[1:], ""

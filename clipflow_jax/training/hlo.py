"""What a compiled program does on one device, read from its text: FLOPs, memory traffic, collectives, time.

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. Here a body counts as often as
its loop runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from clipflow_jax.training import hlo_text
from clipflow_jax.training.hlo_text import Array, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Attention kernels: how many products of all queries with all keys each makes. Operands of a TPU's: f[B,h,Q,k],
# f[B,g,K,k], ...; a chip with one row has no B. Of `models.flash`: what bounds the blocks, f[B,Q,h,k], f[B,K,g,k], ...
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
FLASH = {"flash_out": 2, "flash_queries": 3, "flash_keys": 4}
PREFETCH = ("copy-start", "slice-start", "async-start")  # traffic that takes no time of its own
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "copy-done")
CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, executed `times` a step. bytes: what a device receives each time.

  group: positions, in the mesh's order of devices, of the members of one of its groups. hidden: it runs beside compute.
  """

  kind: str
  bytes: float
  group: tuple[int, ...]
  hidden: bool
  times: int = 1


@dataclasses.dataclass
class Cost:
  """What one device does in a step.

  busy_s: compute. hidden_s: collectives that run beside it. exposed_s: collectives that it waits for. seconds: all of
  it, where hidden collectives overlap the compute of the same loop body, and exposed ones come on top.
  """

  flops: float = 0.0
  hbm_bytes: float = 0.0
  busy_s: float = 0.0
  hidden_s: float = 0.0
  exposed_s: float = 0.0
  seconds: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)

  def add(self, other: Cost, times: int = 1) -> None:
    """Adds what runs `other` so often."""
    for name in ("flops", "hbm_bytes", "busy_s", "hidden_s", "exposed_s", "seconds"):
      setattr(self, name, getattr(self, name) + times * getattr(other, name))
    self.collectives += [dataclasses.replace(c, times=c.times * times) for c in other.collectives]


class Program:
  """A compiled module's text, parsed.

  devices: how many run it. flops_per_s, bytes_per_s: what an instruction takes the longer of, of matrix products and of
  main memory. transfer: seconds of one collective.
  """

  def __init__(
    self, text: str, *, devices: int, flops_per_s: float, bytes_per_s: float, transfer: Callable[[Collective], float]
  ):
    self.devices, self.transfer = devices, transfer
    self.flops_per_s, self.bytes_per_s = flops_per_s, bytes_per_s
    self.computations, self.entry = hlo_text.parse(text)

  def cost(self) -> Cost:
    """Of the whole program."""
    return self._computation(self.entry)

  @functools.cache  # noqa: B019 (a program lives as long as its costs)
  def _computation(self, name: str) -> Cost:
    """A loop ends before what follows it begins: hidden collectives overlap what stands in the same body alone.

    One that is started and awaited is hidden as far as what stands between takes time; links take one after the other.
    """
    own, loops = Cost(), Cost()
    scope = self.computations[name]
    ends: dict[str, float] = {}  # when what has been started will have arrived, by the start's name
    free = 0.0  # when all of them will
    for instruction in scope.values():
      inner, times = self._inner(instruction)
      if inner:
        loops.add(inner, times)
        continue
      before = own.hidden_s
      self._execute(instruction, scope, own)
      now = own.busy_s + own.exposed_s + loops.seconds
      if instruction.op.endswith("-start") and own.hidden_s > before:
        free = max(free, now) + own.hidden_s - before
        ends[instruction.name] = free
      elif instruction.op.endswith("-done"):
        waited = max([0.0, *(ends[operand] - now for operand in instruction.operands if operand in ends)])
        own.exposed_s += waited
        own.hidden_s -= waited
    own.seconds = max(own.busy_s, own.hidden_s) + own.exposed_s
    own.add(loops)
    return own

  def _inner(self, instruction: Instruction) -> tuple[Cost | None, int]:
    """(what an instruction of control flow runs, how often); of branches the longest."""
    op, attributes = instruction.op, instruction.attributes
    if op == "while":
      body, condition = (re.search(rf"{key}=%?([\w.\-]+)", attributes)[1] for key in ("body", "condition"))
      return self._computation(body), self._trips(instruction, condition)
    if op == "call":
      return self._computation(CALLED.search(attributes)[1]), 1
    if op == "conditional":
      listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
      names = listed[1].split(",") if listed else re.findall(r"_computation=%?([\w.\-]+)", attributes)
      costs = [self._computation(name.strip().lstrip("%")) for name in names]
      return max(costs, key=lambda cost: cost.seconds), 1
    return None, 0

  def _execute(self, instruction: Instruction, scope: dict[str, Instruction], total: Cost) -> None:
    if instruction.op in FREE or instruction.op.endswith("-done"):
      return
    for collective in self._collectives(instruction, scope):
      seconds = self.transfer(collective)
      total.hidden_s += seconds if collective.hidden else 0.0
      total.exposed_s += 0.0 if collective.hidden else seconds
      total.collectives.append(collective)
    # The start and the end of a collective that runs beside compute hand its arrays on, and touch none.
    if not _kind(instruction.op) and not any("AsyncCollective" in targets for _, targets in self._targets(instruction)):
      flops, traffic = self._flops(instruction, scope), self._traffic(instruction, scope)
      total.flops += flops
      total.hbm_bytes += traffic
      if instruction.op not in PREFETCH:
        total.busy_s += max(flops / self.flops_per_s, traffic / self.bytes_per_s)

  def _trips(self, loop: Instruction, condition: str) -> int:
    """How often a loop runs: as the compiler says, or the one constant that its counter is compared with."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    found = set()
    for name in [condition, *self._called(condition)]:
      for instruction in self.computations[name].values():
        if instruction.op == "constant" and instruction.arrays[0].dtype in ("s32", "u32", "s64", "u64"):
          found.add(int(instruction.attributes))
    return found.pop() if len(found) == 1 else 1

  def _called(self, name: str) -> list[str]:
    found = []
    for instruction in self.computations.get(name, {}).values():
      for called in CALLED.findall(instruction.attributes):
        found += [called, *self._called(called)]
    return found

  def _collectives(
    self, instruction: Instruction, scope: dict[str, Instruction], hidden: bool = False, scattered: bool = False
  ) -> Iterator[Collective]:
    """Its own, and those inside it: hidden where it is started early.

    A TPU writes a reduce-scatter as a fusion of an all-reduce with the slice that is kept. A gather that runs beside
    matrix products is written once where it starts, once in each product's fusion and once where it is done.
    """
    kind = _kind(instruction.op)
    if kind:
      group = hlo_text.group(instruction.attributes, self.devices)
      kind = "reduce-scatter" if scattered else kind
      if len(group) > 1:
        received = _received(kind, instruction, scope, len(group))
        yield Collective(kind, received, group, hidden or instruction.op.endswith("-start"))
    elif instruction.op in ("fusion", "async-start", "custom-call"):
      for called, targets in self._targets(instruction):
        if called.startswith("async_collective_fusion") or "AsyncCollectiveDone" in targets:
          continue
        started = instruction.op == "async-start" or "AsyncCollectiveStart" in targets
        inner = self.computations.get(called, {})
        for one in inner.values():
          yield from self._collectives(one, inner, hidden or started, called.startswith("all-reduce-scatter"))

  def _targets(self, instruction: Instruction) -> Iterator[tuple[str, str]]:
    """(each computation that an instruction calls, what the custom calls in it say of themselves)."""
    for called in CALLED.findall(instruction.attributes):
      inner = self.computations.get(called, {})
      yield called, " ".join(one.attributes for one in inner.values() if one.op == "custom-call")

  def _flops(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """Two a multiply-add, of matrix products alone (also fused ones)."""
    if instruction.op in ("dot", "convolution"):
      left, right = (scope[name].arrays[0].dims for name in instruction.operands[:2])
      out = instruction.arrays[0].dims
      if instruction.op == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2.0 * math.prod(out) * math.prod(left[int(a)] for a in axes[1].split(",") if a)
      return _convolution(out, left, right, instruction.attributes)
    if instruction.op == "custom-call":
      return self._kernel_flops(instruction, [scope[name].arrays[0].dims for name in instruction.operands])
    if instruction.op == "fusion":
      inner = self.computations[CALLED.search(instruction.attributes)[1]]
      return sum(self._flops(one, inner) for one in inner.values())
    return 0.0

  def _kernel_flops(self, instruction: Instruction, operands: list[tuple[int, ...]]) -> float:
    """Of attention all products, also of what a kernel leaves out because nobody sees it: that, data decides."""
    if '"__cublas' in instruction.attributes:
      axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
      summed = math.prod(operands[0][int(axis)] for axis in re.findall(r"\d+", axes[1]))
      return 2.0 * math.prod(instruction.arrays[0].dims) * summed
    for name, products in SPLASH.items():
      if instruction.name.startswith(name):
        return 2.0 * products * math.prod(operands[0]) * operands[1][-2]
    for name, products in FLASH.items():
      if f"/{name}/" in instruction.attributes:
        return 2.0 * products * math.prod(operands[3]) * operands[4][1]
    return 0.0

  def _traffic(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """Bytes read from and written to main memory. Of what is only sliced, or updated in place, the part counts."""
    if instruction.op == "copy-start":
      return sum(array.bytes for array in instruction.arrays[:2] if array.in_hbm)
    if instruction.op == "dynamic-slice":
      return 2 * sum(array.bytes for array in instruction.arrays if array.in_hbm)
    if instruction.op == "dynamic-update-slice":
      return 2 * scope[instruction.operands[1]].arrays[0].bytes
    read = [_hbm(scope[name].arrays) if name in scope else 0.0 for name in instruction.operands]
    written = _hbm(instruction.arrays[:1] if '"__cublas' in instruction.attributes else instruction.arrays)
    if instruction.op == "fusion":
      called = CALLED.search(instruction.attributes)[1]
      for i, whole in enumerate(read):
        part = self._part(called, i)
        if part and whole:
          read[i], updated = min(whole, part[0]), part[1]
          written += min(0.0, updated - whole) if updated else 0.0
    return sum(read) + max(written, 0.0)

  def _part(self, computation: str, number: int) -> tuple[float, float] | None:
    """Of a fusion's operand that is only sliced or updated in place, also by fusions inside: bytes (read, updated)."""
    inner = self.computations[computation]
    same = {one.name for one in inner.values() if one.op == "parameter" and int(one.attributes) == number}
    read = updated = 0.0
    for one in inner.values():
      at = [i for i, name in enumerate(one.operands) if name in same]
      if not at:
        continue
      if one.op == "bitcast" and not one.is_root:
        same.add(one.name)
      elif one.op in ("slice", "dynamic-slice"):
        read += one.arrays[0].bytes
      elif one.op == "dynamic-update-slice" and at == [0]:
        updated += inner[one.operands[1]].arrays[0].bytes
      elif one.op == "fusion":
        parts = [self._part(CALLED.search(one.attributes)[1], i) for i in at]
        if None in parts:
          return None
        read, updated = read + sum(part[0] for part in parts), updated + sum(part[1] for part in parts)
      else:
        return None
    return (read, updated) if read or updated else None


def _kind(op: str) -> str | None:
  return next((kind for kind in KINDS if op in (kind, f"{kind}-start")), None)


def _hbm(arrays: tuple[Array, ...]) -> float:
  return sum(array.bytes for array in arrays if array.in_hbm)


def _received(kind: str, instruction: Instruction, scope: dict[str, Instruction], members: int) -> float:
  """Bytes that one device receives, by the ring algorithm of each kind."""
  arrays = instruction.arrays
  sent = sum(array.bytes for name in instruction.operands if name in scope for array in scope[name].arrays)
  share = (members - 1) / members
  if kind == "all-gather":
    return members * sent * share
  if kind == "all-reduce":
    return 2 * sent * share
  if kind in ("reduce-scatter", "all-to-all"):
    return sent * share
  return arrays[0].bytes


def _convolution(out: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], attributes: str) -> float:
  """FLOPs of a convolution, which is how TPU programs write matrix products: padding and holes do not count."""
  of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(item.split("=") for item in window[1].split()) if window else {}
  pairs = 1
  for i, label in enumerate(sorted(set(of_out) - {"b", "f"})):

    def field(name: str, default: str, i=i) -> str:
      return fields.get(name, "x".join([default] * (i + 1))).split("x")[i]

    low = int(field("pad", "0_0").split("_")[0])
    stride, hole, step = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(out[of_out.index(label)])[:, None] * stride + np.arange(int(field("size", "1"))) * step - low
    inside = (at >= 0) & (at <= (left[of_left.index(label)] - 1) * hole) & (at % hole == 0)
    pairs *= int(inside.sum())
  features = math.prod(out[of_out.index(label)] for label in "bf")
  return 2.0 * features * right[of_right.index("i")] * pairs


def by_kind(collectives: list[Collective], axes: Callable[[tuple[int, ...]], str]) -> dict[str, dict[str, float]]:
  """{kind: {mesh axes: bytes a device receives in a step}}."""
  table: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
  for one in collectives:
    table[one.kind][axes(one.group)] += one.bytes * one.times
  return {kind: dict(of) for kind, of in table.items()}

"""Which sources a run reads, and in which order their examples come: mixed by weight, a pure function of an index."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.data import sources
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import said
from clipflow_jax.data.feature_cache import FeatureSource
from clipflow_jax.data.sequence import ASK, CAPTION, EDIT, PICTURE, QUESTION
from clipflow_jax.data.sources import Source
from clipflow_jax.errors import UserError

DESCRIBE = "describe the picture."
# What an example may be put to, by the role of its source: names of `pipeline.TASKS`.
ROLES: dict[str, tuple[str, ...]] = {
  "both": ("caption", "draw", "converse", "ask"),
  "understand": ("caption", "converse", "ask"),
  "generate": ("caption", "draw"),
  "edit": ("edit",),
  "text": ("talk",),
}
BLOCK = 1000  # items in which every part has its share


@dataclasses.dataclass(frozen=True)
class Part:
  """One source of a run, and how its examples are put.

  weight: its share of the examples, beside the others'. role: what its examples are for, of ROLES; "text" takes their
  words alone. epochs: after so many passes its share goes to the others (0: it never ends). describe: the question that
  the description answers, in several phrasings. ask: how a question stands beside its picture, QUESTION and PICTURE
  standing for them: behind its question a picture is read for what is asked; before, for all questions that follow.
  draw: what asks for a picture, CAPTION standing for its caption. edit: how PICTURE and what shall become of it,
  CAPTION, stand together.
  UserError for a value that makes no sense.
  """

  source: Source
  name: str = "data.source"
  weight: float = 1.0
  role: str = "both"
  epochs: int = 0
  describe: tuple[str, ...] = (DESCRIBE,)
  ask: tuple[str, ...] = (ASK,)
  draw: tuple[str, ...] = (CAPTION,)
  edit: tuple[str, ...] = (EDIT,)

  def __post_init__(self) -> None:
    if not 0 < self.weight < float("inf"):
      raise UserError(f"{self.name}: weight is {self.weight}: give a number above 0, or leave the source out")
    if self.role not in ROLES:
      raise UserError(f"{self.name}: role is {self.role!r}: choose one of {', '.join(ROLES)}")
    if self.epochs < 0 or self.epochs != int(self.epochs):
      raise UserError(f"{self.name}: epochs is {self.epochs}: give a whole number of passes, or 0 for no end")
    wanted = {"describe": (), "ask": (PICTURE, QUESTION), "draw": (CAPTION,), "edit": (PICTURE, CAPTION)}
    for name, needed in wanted.items():
      phrasings = getattr(self, name)
      if (
        isinstance(phrasings, str)
        or not phrasings
        or not all(str(one).strip() and all(word in str(one) for word in needed) for one in phrasings)
        or any(str(one).count(PICTURE) > 1 for one in phrasings)
      ):
        raise UserError(
          f"{self.name}: {name} is {phrasings!r}: give a list of phrasings"
          f"{', each with ' + ' and '.join(needed) if needed else ''}"
        )

  @property
  def tasks(self) -> tuple[str, ...]:
    """What its examples may be put to."""
    return ROLES[self.role]


def make(settings: Mapping[str, Any], split: str, features: str = "") -> tuple[Part, ...]:
  """The sources of `config.data.source`, in the order of their names.

  features: a folder of `feature_cache.write`, whose examples take the place of all of them.

  One source: `kind` and the fields of its class, and those of Part. Several: kind="mixture", and every other key is a
  source's name with such settings of its own. UserError, which names the source, for settings that do not fit.
  """
  return tuple(_part(name, own, split, features) for name, own in _named(settings).items())


class Wording(NamedTuple):
  """The first phrasing of the first source that is put to it: how a model is asked what it was taught.

  edit is "" where no source says how, for then none was taught.
  """

  ask: str
  draw: str
  edit: str


def wording(settings: Mapping[str, Any]) -> Wording:
  """Of `config.data.source`."""

  def first(task: str, otherwise: str) -> str:
    parts = (own for own in _named(settings).values() if task in own or task in ROLES[own.get("role", Part.role)])
    return next((own.get(task, getattr(Part, task))[0] for own in parts), otherwise)

  return Wording(first("ask", ASK), first("draw", CAPTION), first("edit", ""))


def _named(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """{name: settings of its own} of the sources. UserError where one has none."""
  if settings.get("kind") != "mixture":
    return {"data.source": settings}
  named = {name: value for name, value in sorted(settings.items()) if name != "kind"}
  if not named:
    raise UserError("data.source is a mixture of nothing: give it sources, each a name with dict(kind=..., weight=...)")
  for name, value in named.items():
    # A ConfigDict is no Mapping.
    if not isinstance(value, Mapping | ConfigDict) or value.get("kind") == "mixture":
      raise UserError(f"data.source.{name} is no source: in a mixture each key but kind is one, dict(kind=..., ...)")
  return {f"data.source.{name}": value for name, value in named.items()}


def _part(name: str, settings: Mapping[str, Any], split: str, features: str) -> Part:
  settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
  own = {field.name for field in dataclasses.fields(Part)} - {"source", "name"}
  options = {key: settings.pop(key) for key in own & settings.keys()}
  try:
    if not features:
      return Part(sources.make(settings, split), name, **options)
    source = FeatureSource(Path(features), name)
    _check_cached(source, name, settings)
    return Part(source, name, **options)
  except UserError as error:
    raise error if name in str(error) or name == "data.source" else UserError(f"{name}: {error}") from error


def _check_cached(features: FeatureSource, name: str, settings: Mapping[str, Any]) -> None:
  """UserError where features were cached of a source that is set otherwise, but for where it lies now."""
  own = {field.name for field in dataclasses.fields(Part)} | {"path"}
  cached = _named(features.manifest["request"]["source"])[name]
  here, there = ({k: v for k, v in of.items() if k not in own} for of in (json.loads(json.dumps(settings)), cached))
  for key in sorted(here.keys() | there.keys()):
    if here.get(key) != there.get(key):
      raise UserError(
        f"{name}.{key} is {here.get(key)!r}, but {features.folder} was cached with {there.get(key)!r}: set it so, or "
        "cache the features of this config"
      )


def shown(settings: Mapping[str, Any]) -> Source:
  """The source whose test split a run is looked at by: that of the first part with pictures."""
  parts = make(settings, "test")
  return next((part for part in parts if part.role != "text"), parts[0]).source


def texts(parts: Sequence[Part], count: int) -> Iterator[tuple[str, ...]]:
  """What is said in each of the first `count` examples of all parts in turn, or in all; without those that are bad.

  Where a source has `texts`, no picture is read for it.
  """
  longest = max(len(part.source) for part in parts)
  every = ((part.source, i) for i in range(min(count, longest)) for part in parts if i < len(part.source))
  guarded = BadRecords(None, 1.0).guard(_texts)
  for _, (source, i) in zip(range(count), every, strict=False):
    if (found := guarded(source, i)) is not None:
      yield found


def _texts(source: Source, i: int) -> tuple[str, ...]:
  if hasattr(source, "texts"):
    return source.texts(i)
  example = source[i]
  turns = example.dialogue.turns if example.dialogue else ()
  return said(example.captions, example.description, example.questions, turns)


class Order(grain.transforms.DatasetSelectionMap):
  """Item i of the endless stream is example k of part p: a function of i alone, so that any host can begin anywhere.

  Items are cut into blocks in which every part has exactly its share, in random order: taken in turn, as Grain's own
  mix does it, two parts of equal weight would give the even shards (`Pipeline.shards`) one part and the odd the other.
  k counts up from 0 for each part, without gap or repetition.
  """

  def __init__(self, parts: Sequence[Part], slots: Sequence[Sequence[int]], seed: int):
    """slots[s]: which parts fill the items s, s + len(slots), s + 2 len(slots), ... UserError where all of them end."""
    own = [sum(part in slot for slot in slots) for part in range(len(parts))]
    rank: collections.Counter[int] = collections.Counter()
    self._slots = []
    for number, slot in enumerate(slots):
      turns = {part: (rank[part], own[part]) for part in slot}
      rank.update(slot)
      self._slots.append(_Slot({part: parts[part] for part in slot}, turns, (seed, number)))

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, i: int) -> tuple[int, int]:
    row, slot = divmod(i, len(self._slots))
    return self._slots[slot][row]


class _Slot:
  """The same for one place of a row, of which each part shares its examples with `turns` = (rank, count) others."""

  def __init__(self, parts: Mapping[int, Part], turns: Mapping[int, tuple[int, int]], seed: tuple[int, int]):
    self._parts, self._turns, self._seed = list(parts), turns, seed
    weights = np.array([part.weight for part in parts.values()])
    least = min(parts.values(), key=lambda part: part.weight)
    if least.weight < weights.sum() / BLOCK:
      raise UserError(f"{least.name}: weight {least.weight} is less than a {BLOCK}th of all: raise it")
    # How many examples each part has left, and from which block on which share of a block is each part's.
    room = np.array(
      [
        np.ceil((part.epochs * len(part.source) - turns[p][0]) / turns[p][1]) if part.epochs else np.inf
        for p, part in parts.items()
      ]
    )
    if np.isfinite(room).all():
      raise UserError(
        f"{', '.join(part.name for part in parts.values())}: epochs ends every source: set one's to 0, for no end"
      )
    self._begins, self._used, self._counts = [], [], []
    block, used = 0, np.zeros(len(weights), np.int64)
    while True:
      counts = np.minimum(_shares(np.where(used < room, weights, 0), BLOCK), room - used).astype(np.int64)
      counts += _shares(np.where(np.isinf(room), weights, 0), BLOCK - counts.sum())
      self._begins.append(block)
      self._used.append(used)
      self._counts.append(tuple(counts.tolist()))
      ending = np.isfinite(room) & (counts > 0)
      if not ending.any():
        return
      blocks = int(((room - used)[ending] // counts[ending]).min())
      block, used = block + blocks, used + blocks * counts

  def __getitem__(self, i: int) -> tuple[int, int]:
    block, place = divmod(i, BLOCK)
    phase = bisect.bisect_right(self._begins, block) - 1
    which, before = _shuffled(self._counts[phase], *self._seed, block)
    part = int(which[place])
    done = self._used[phase][part] + (block - self._begins[phase]) * self._counts[phase][part] + before[place]
    rank, count = self._turns[self._parts[part]]
    return self._parts[part], int(done) * count + rank


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
  """i64[P]: whole numbers that add up to `total`, as near as can be to the weights (the largest remainders' way)."""
  exact = weights / weights.sum() * total
  counts = np.floor(exact).astype(np.int64)
  counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
  return counts


@functools.lru_cache(maxsize=64)
def _shuffled(counts: tuple[int, ...], seed: int, slot: int, block: int) -> tuple[np.ndarray, np.ndarray]:
  """i64[BLOCK] which part each item of a block is of, and how many of the block's items of that part are before it."""
  which = np.random.default_rng([seed, slot, block]).permutation(np.repeat(np.arange(len(counts)), counts))
  before = np.empty_like(which)
  for part, count in enumerate(counts):
    before[which == part] = np.arange(count)
  return which, before

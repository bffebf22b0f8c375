"""Are the objects in the picture that the prompt names? GenEval's rules, on whatever detector one has.

The built-in detector reads pictures of shapes; for photographs give your own, `module:function`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clipflow_jax.data import shapes
from clipflow_jax.data.shapes_text import Caption
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import compositional
from clipflow_jax.evaluation.items import Item

_APART = 0.1  # of both extents together: objects nearer than that are in no direction from each other
_SURE, _SURE_TO_COUNT = 0.3, 0.9  # the score above which an object is there, and where the prompt is about how many
_MOST = 16  # objects of a name that count
TAGS = {
  "one": "single_object",
  "two": "two_object",
  "counting": "counting",
  "colours": "colors",
  "position": "position",
  "attribution": "color_attr",
}
"""Our categories of prompts about shapes, and what GenEval calls them."""


@dataclasses.dataclass(frozen=True)
class Detection:
  """One object in a picture. box: left, top, right, bottom in any one unit, rows counted downwards. score: 0 to 1."""

  name: str
  box: tuple[float, float, float, float]
  colour: str | None = None
  score: float = 1.0


# u8[n,H,W,3] -> the objects of each picture, in any order. Which of them are sure enough is `right`'s to say.
Detector = Callable[[np.ndarray], Sequence[Sequence[Detection]]]


def make_detector(name: str) -> Detector:
  """The detector "shapes", or what calling `function` of "module:function" returns. UserError where there is none."""
  if name == "shapes":
    return detect_shapes
  module, colon, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)() if colon else _no_detector(name)
  except (ImportError, AttributeError) as error:
    raise UserError(f"the detector {name!r} cannot be had: {error}") from error


def _no_detector(name: str) -> Detector:
  raise UserError(f"the detector {name!r} is unknown; choose shapes, or write module:function of your own")


def detect_shapes(images: np.ndarray) -> list[list[Detection]]:
  """The objects of pictures of shapes u8[n,H,H,3], by the rule-based reader."""
  found = []
  for image in images:
    reading = compositional.read(image)
    found.append([Detection(thing.shape, _box(thing.place, len(image)), thing.colour) for thing in reading.objects])
  return found


def _box(place: int, side: int) -> tuple[float, float, float, float]:
  rows, columns = shapes.cell(place, side)
  return columns.start, rows.start, columns.stop, rows.stop


def right(wanted: Mapping[str, Any], detected: Sequence[Detection], category: str = "") -> tuple[bool, str]:
  """(whether a picture with these objects is what is wanted, else why not), as GenEval's script judges.

  wanted: {"include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier entry]}], "exclude":
  [{"class", "count"}]}: at least `count` of what is included, of that colour, and fewer than `count` of what is
  excluded. category: of the prompt, of TAGS' values. Source: Ghosh et al. 2023, evaluate_images.py.
  """
  sure = _SURE_TO_COUNT if category == TAGS["counting"] else _SURE
  found = [thing for thing in sorted(detected, key=lambda one: -one.score) if thing.score > sure]
  groups: list[Sequence[Detection] | None] = []
  wrong = []
  for entry in wanted.get("include", []):
    things = [thing for thing in found if thing.name == entry["class"]][: entry["count"]]
    why = _lacks(entry, things, groups)
    groups.append(None if why else things)
    wrong += [why] if why else []
  for entry in wanted.get("exclude", []):
    count = min(_MOST, sum(thing.name == entry["class"] for thing in found))
    if count >= entry["count"]:
      wrong.append(f"{count} {entry['class']}, fewer than {entry['count']} wanted")
  return not wrong, "; ".join(wrong)


def _lacks(entry: Mapping[str, Any], things: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]) -> str:
  """Why the things are not what an entry includes, or nothing."""
  name, count = entry["class"], entry["count"]
  if len(things) < count:
    return f"{len(things)} {name}, {count} wanted"
  if "color" in entry and sum(thing.colour == entry["color"] for thing in things) < count:
    return f"{name} is {', '.join(str(thing.colour) for thing in things)}, {entry['color']} wanted"
  if "position" in entry:
    relation, index = entry["position"]
    others = groups[index]
    if others is None:
      return f"nothing for {name} to be {relation}"
    if not all(relation in relations(thing, other) for thing in things for other in others):
      return f"{name} is not {relation} it"
  return ""


def relations(a: Detection, b: Detection) -> set[str]:
  """Where a is as seen from b: of "left of", "right of", "above", "below"; none where they lie too near."""
  boxes = np.array([a.box, b.box], np.float64).reshape(2, 2, 2)
  offset = np.subtract(*boxes.mean(axis=1))
  extents = np.abs(np.diff(boxes, axis=1)[:, 0]).sum(axis=0)
  apart = np.maximum(np.abs(offset) - _APART * extents, 0) * np.sign(offset)
  if np.all(np.abs(apart) < 1e-3):
    return set()
  x, y = apart / np.linalg.norm(offset)
  names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
  return {name for name, there in names.items() if there}


def shapes_items(n: int, seed: int) -> list[Item]:
  """n prompts about shapes of every category that GenEval has, with what they want in GenEval's words."""
  return [
    Item(f"{category}/{i}", question=caption.text, category=TAGS[category], more=_wanted(caption))
    for category in TAGS
    for i, caption in enumerate(compositional.prompts(category, n, seed))
  ]


def _wanted(caption: Caption) -> dict[str, Any]:
  """What a caption says: things alike are counted together, and the second of two related ones comes first."""
  entries: list[dict[str, Any]] = [
    {"class": mention.shape, "color": mention.colour, "count": 1} for mention in caption.mentions
  ]
  if caption.relation is not None:
    entries[0]["position"] = [caption.relation, 0]
    return {"include": entries[::-1]}
  alike = {(entry["class"], entry["color"]): entry for entry in reversed(entries)}
  return {"include": [{**entry, "count": entries.count(entry)} for entry in alike.values()]}

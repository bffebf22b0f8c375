"""Parts of a model that have learned nothing: what they give is noise, and looks like a bad model's."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from clipflow_jax.training.state import Params, flatten

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

# What is said of a part -> how its parameters' paths begin.
DRAWS, DECODES, TALKS = "what draws", "the pixel decoder", "the language model"
PARTS = {
  DRAWS: ("language_model/flow", "flow_head/", "separate_drawer/", "queries"),
  DECODES: ("decoder/",),
  TALKS: ("language_model/text",),
}
TAUGHT_BY = {
  DRAWS: "train it by configs/generation.py or configs/joint.py",
  DECODES: "train it by configs/decoder.py, and begin from that run",
  TALKS: "train it by configs/understanding.py or configs/joint.py, or begin from an imported one",
}
BEGIN = {"/scale": 1.0, "/bias": 0.0}  # a parameter's ending -> its value before any step


def untaught(params: Params, learned: Collection[str]) -> frozenset[str]:
  """The PARTS whose gains and biases are all as they begin, and of which nothing is in `learned`, what the run trained.

  What is trained moves them, and in what is imported they are never so. Adapters alone, and a train table that freezes
  all of them, leave them, which `learned` tells of this run. A part that is not there is not among them.
  """
  flat = flatten(params)

  def as_it_begins(part: str) -> bool:
    of_part = [path for path in flat if path.startswith(PARTS[part])]
    kept = [(flat[path], value) for path in of_part for ending, value in BEGIN.items() if path.endswith(ending)]
    return bool(kept) and all((np.asarray(leaf) == value).all() for leaf, value in kept)

  return frozenset(
    part
    for part, begins in PARTS.items()
    if not any(path.startswith(begins) for path in learned) and as_it_begins(part)
  )


def warn(model: ClipFlow, *parts: str) -> None:
  """One line on stderr where some of these PARTS have learned nothing."""
  if found := [part for part in parts if part in model.untaught]:
    have = "have" if len(found) > 1 else "has"
    told = f"{' and '.join(found)} of this checkpoint {have} learned nothing, so this is noise: {TAUGHT_BY[found[0]]}"
    print(f"clipflow: {told}", file=sys.stderr)

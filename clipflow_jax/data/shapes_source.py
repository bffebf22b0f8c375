"""The world of shapes as a source of captioned pictures."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipflow_jax.data.example import Example
from clipflow_jax.data.shapes import IDENTICAL, Scene, render, scene
from clipflow_jax.data.shapes_text import NUMBERS, caption, describe, questions
from clipflow_jax.errors import UserError

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class ShapesSource:
  """An endless set of captioned pictures of shapes; item i is a pure function of (seed, split, i).

  The splits draw from different random streams of the same world, and neither shows or names an UNSEEN pair.
  """

  size: int = 60  # height and width in pixels
  split: str = "train"  # or "test"
  seed: int = 0
  counts: tuple[float, ...] = (0.4, 0.4, 0.1, 0.1)  # weights of 1, 2, 3 and 4 objects
  questions: int = 4  # per example

  def __post_init__(self) -> None:
    object.__setattr__(self, "counts", tuple(self.counts))
    if self.split not in _SPLITS:
      raise UserError(f"data.split is {self.split!r}: choose one of {', '.join(_SPLITS)}")
    if len(self.counts) >= len(NUMBERS) or min(self.counts, default=0) < 0 or sum(self.counts) <= 0:
      raise UserError(f"data.counts is {self.counts}: give weights >= 0 of one to four objects, not all zero")
    if self.seed < 0:
      raise UserError(f"data.seed is {self.seed}: give 0 or more")
    if self.size < 24:
      raise UserError(f"data.size is {self.size}: shapes can be told apart from 24 pixels on")

  def __len__(self) -> int:
    return 2**31 - 1

  def __getitem__(self, i: int) -> Example:
    drawn, rng = self._draw(i)
    return Example(
      id=f"shapes-{self.split}-{self.seed}-{i}",
      image=render(drawn, self.size),
      captions=(caption(drawn, rng).text,),  # one: no picture comes twice
      description=describe(drawn).text,
      questions=tuple(questions(drawn, rng, self.questions)),
    )

  def scene(self, i: int) -> Scene:
    """What is in picture i."""
    return self._draw(i)[0]

  def _draw(self, i: int) -> tuple[Scene, np.random.Generator]:
    """The scene of item i and the random stream from which its texts follow."""
    rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), int(i)])
    # The first count whose cumulative share exceeds a uniform number.
    shares = np.cumsum(self.counts) / sum(self.counts)
    objects = 1 + int(np.searchsorted(shares, rng.random(), side="right"))
    return scene(rng, objects=objects, identical=bool(rng.random() < IDENTICAL)), rng

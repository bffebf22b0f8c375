"""What a source of captioned pictures hands out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One captioned picture."""

  id: str
  image: np.ndarray  # u8[H,W,3], or its cached features bf16[T,C]
  captions: tuple[str, ...]  # texts it may be drawn from
  description: str  # the answer to "describe the picture."
  questions: tuple[tuple[str, str], ...]  # (question, answer)
  before: np.ndarray | None = None  # as `image`: of an edit, the picture of which captions tell what shall become of it


def said(captions: Sequence[str], description: str, questions: Sequence[tuple[str, str]]) -> tuple[str, ...]:
  """All texts of an example."""
  return (*captions, description, *itertools.chain.from_iterable(questions))


class BadRecord(Exception):
  """A record that cannot be read, raised by a source's `__getitem__` with its name and the reason."""

  def __init__(self, name: str, why: str):
    super().__init__(name, why)
    self.name = name
    self.why = why

  @property
  def kind(self) -> str:
    """What stands before the colon of the reason: few distinct ones, to count by."""
    return self.why.partition(":")[0]

  def __str__(self) -> str:
    return f"{self.name}: {self.why}"

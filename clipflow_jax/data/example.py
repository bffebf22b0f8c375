"""What a source of captioned pictures hands out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

IMAGE_MARKER = "<image>"  # stands in the turns of a Dialogue for the next picture, as LLaVA has it
Turns = tuple[tuple[str, str], ...]  # (role, text); the role is system, user or assistant


@dataclasses.dataclass(frozen=True, eq=False)
class Dialogue:
  """A conversation as it was held: its turns in order, each of which may refer to all before it.

  The IMAGE_MARKERs in the turns stand for the images in order. A single one without marker belongs to the first words.
  """

  turns: Turns  # the last is the assistant's
  images: np.ndarray  # u8[n,H,W,3], n from 0 on, or their cached features bf16[n,T,C]

  def until(self, answer: int) -> Dialogue:
    """As far as its answer of that number, from 0."""
    ends = [i + 1 for i, (role, _) in enumerate(self.turns) if role == "assistant"]
    turns = self.turns[: ends[answer]]
    shown = sum(text.count(IMAGE_MARKER) for _, text in turns)
    return Dialogue(turns, self.images[:shown] if self.marked else self.images)

  @property
  def answers(self) -> int:
    return sum(role == "assistant" for role, _ in self.turns)

  @property
  def marked(self) -> bool:
    """Whether the turns say where the images stand."""
    return any(IMAGE_MARKER in text for _, text in self.turns)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One captioned picture, or a conversation about one, several or none."""

  id: str
  image: np.ndarray  # u8[H,W,3], or its cached features bf16[T,C]; the first of several, a black one in place of none
  captions: tuple[str, ...] = ()  # texts it may be drawn from
  description: str = ""  # the answer to "describe the picture."
  questions: tuple[tuple[str, str], ...] = ()  # (question, answer), each of which stands alone
  before: np.ndarray | None = None  # as `image`: of an edit, the picture of which captions tell what shall become of it
  dialogue: Dialogue | None = None  # what is learned in the place of `questions`, where it is there


def said(
  captions: Sequence[str], description: str, questions: Sequence[tuple[str, str]], turns: Turns
) -> tuple[str, ...]:
  """All texts of an example: those of the turns of its dialogue in the place of the questions, where it has one."""
  told = (text for _, text in turns) if turns else itertools.chain.from_iterable(questions)
  return tuple(filter(None, (*captions, description, *told)))


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

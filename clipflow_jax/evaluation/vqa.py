"""Does the model answer what it is asked? Exact match, by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def kind(question: str) -> str:
  """The first two words, such as "how many" or "is there", which name the kinds of question asked here."""
  return " ".join(question.lower().split()[:2])


def accuracy(questions: Sequence[str], answers: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
  """Exact match: `question_accuracy` over all, and an entry like `question_how_many` for each kind."""
  right = defaultdict(list)
  for question, answer, expected in zip(questions, answers, truth, strict=True):
    right[kind(question)].append(answer.strip() == expected.strip())
  everything = [hit for hits in right.values() for hit in hits]
  by_kind = {f"question_{name.replace(' ', '_')}": sum(hits) / len(hits) for name, hits in sorted(right.items())}
  return {"question_accuracy": sum(everything) / len(everything), **by_kind}

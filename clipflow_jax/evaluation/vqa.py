"""Does the model answer what it is asked? Exact and soft accuracy, choices, yes or no, words in pictures."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import tasks
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer, Scores

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What follows a question, word for word as lmms-eval's tasks vqav2, pope, docvqa (the first) and mmbench, seedbench,
# mmmu (the second) have it, after LLaVA-1.5 (Liu et al. 2024): another wording is another benchmark.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class Answerer:
  """Asks for an answer in the model's words; `measure` (written, answers) -> scores."""

  summary = staticmethod(tasks.means)

  def __init__(self, model: ClipFlow, measure: Callable[[str, Sequence[str]], dict[str, float]], suffix: str = ""):
    self.model, self.measure, self.suffix = model, measure, suffix

  def score(self, items: Sequence[Item]) -> list[Answer]:
    _need_answers(items)
    images = np.stack([item.look(self.model.image_size) for item in items])
    written = self.model.answer(images, [item.question + self.suffix for item in items])
    return [
      Answer(self.measure(text, item.answers), text, item.answers[0]) for text, item in zip(written, items, strict=True)
    ]


class YesNo(Answerer):
  """Questions answered by yes or no, with the statistics of POPE (Li et al. 2023): yes is the positive class."""

  def __init__(self, model: ClipFlow, suffix: str = ""):
    super().__init__(model, yes_no_counts, suffix)

  @staticmethod
  def summary(scores: Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
    means = tasks.means(scores, weights, categories)
    hit, false_alarm, miss, rejected = (means[name] for name in ("hit", "false_alarm", "miss", "rejected"))
    precision, recall = _ratio(hit, hit + false_alarm), _ratio(hit, hit + miss)
    return {
      "accuracy": hit + rejected,
      "precision": precision,
      "recall": recall,
      "f1": _ratio(2 * precision * recall, precision + recall),
      "yes_ratio": hit + false_alarm,
    }


class Chooser:
  """Multiple choice by likelihood: of each choice's words, or by=letter of its letter under a list of the choices.

  accuracy takes the likeliest choice; accuracy_per_token divides by its number of tokens (SEED-Bench's way), which for
  letters is the same. An item's answer is the choice's words or its letter. suffix: what follows the listed choices,
  which stand as LLaVA-1.5's model_vqa_mmbench.py and lmms-eval's seedbench and mmmu list them; a hint of MMBench's is
  the question's first line. circular: each item is asked once with each choice first, and counts where all of them are
  answered rightly (Liu et al. 2023, MMBench's CircularEval).
  """

  summary = staticmethod(tasks.means)
  HOW = ("words", "letter")

  def __init__(self, model: ClipFlow, by: str = "words", circular: bool = False, suffix: str = LETTER):
    if by not in self.HOW:
      raise UserError(f"choices are compared by {' or '.join(self.HOW)}, not by {by!r}")
    if circular and by == "words":
      raise UserError("circular asks with each choice first, which words alone do not show; set by=letter")
    self.model, self.by, self.circular, self.suffix = model, by, circular, suffix

  def score(self, items: Sequence[Item]) -> list[Answer]:
    turned = [list(_turned(item) if self.circular else [item]) for item in items]
    answers = self._each([item for turns in turned for item in turns])
    made, start = [], 0
    for turns in turned:
      own = answers[start : start + len(turns)]
      scores = {name: min(one.scores[name] for one in own) for name in own[0].scores}
      # Of several, the first that is wrong says what went wrong.
      told = min(own, key=lambda one: one.scores["accuracy"])
      made.append(Answer(scores, told.written, told.truth))
      start += len(turns)
    return made

  def _each(self, items: Sequence[Item]) -> list[Answer]:
    truths = [_choice(item) for item in items]
    asked: list[str] = []
    answers: list[str] = []
    images: list[np.ndarray] = []
    for item in items:
      letters = LETTERS[: len(item.choices)]
      lines = [f"{letter}. {text}" for letter, text in zip(letters, item.choices, strict=True)]
      listed = "\n".join([item.question, *lines]) + self.suffix
      asked += [listed if self.by == "letter" else item.question] * len(item.choices)
      answers += letters if self.by == "letter" else item.choices
      images += [item.look(self.model.image_size)] * len(item.choices)
    found = self.model.likelihood(asked, answers, np.stack(images))
    ends = np.cumsum([len(item.choices) for item in items])[:-1]
    made = []
    for item, truth, log_p, tokens in zip(
      items, truths, np.split(found.log_p, ends), np.split(found.tokens, ends), strict=True
    ):
      picked = int(log_p.argmax())
      scores = {"accuracy": float(picked == truth), "accuracy_per_token": float((log_p / tokens).argmax() == truth)}
      made.append(Answer(scores, item.choices[picked], item.choices[truth]))
    return made


def exact(written: str, answers: Sequence[str]) -> dict[str, float]:
  """Whether it is one of the answers, blanks aside."""
  return {"accuracy": float(written.strip() in {answer.strip() for answer in answers})}


def soft(written: str, answers: Sequence[str]) -> dict[str, float]:
  """VQAv2's accuracy: a third for each of the other people who said the same, at most 1, the mean over who is left out.

  Where all people agree the words are compared as they are, and with fewer than three it is the share that agrees.
  Source: Goyal et al. 2017 and its official script, GT-Vision-Lab/VQA's vqaEval.py.
  """
  written, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (written, *answers))
  if len(set(answers)) > 1:
    written, answers = normalise(written), [normalise(answer) for answer in answers]
  same = [answer == written for answer in answers]
  if len(answers) < 3:
    return {"accuracy": float(np.mean(same))}
  return {"accuracy": float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))}


def normalise(answer: str) -> str:
  """An answer as VQAv2's official script compares it: without punctuation and articles, numbers as digits."""
  text = answer
  for mark in ';/[]"{}()=+\\_-><@`,?!':
    parts = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,\d", answer)
    text = text.replace(mark, "" if parts else " ")
  text = re.sub(r"\.(?!\d)", "", text)
  kept = [_NUMBERS.get(word, word) for word in text.lower().split()]
  return " ".join(_CONTRACTIONS.get(word, word) for word in kept if word not in ("a", "an", "the"))


def anls(written: str, answers: Sequence[str]) -> dict[str, float]:
  """Average normalised Levenshtein similarity: 1 minus the edits over the longer length, 0 below a half.

  Case and blanks at the ends are no difference. Source: Biten et al. 2019 (ST-VQA), DocVQA.
  """

  def similar(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    share = 1 - _edits(a, b) / longer if longer else 1.0
    return share if share >= 0.5 else 0.0

  said = " ".join(written.lower().split())
  return {"anls": max(similar(said, " ".join(answer.lower().split())) for answer in answers)}


def yes_no_counts(written: str, answers: Sequence[str]) -> dict[str, float]:
  """Which of the four cells it falls into.

  As AoiDragon/POPE's evaluate.py reads an answer: no, where No, no or not is a word of its first sentence, commas taken
  away and words what blanks part; all else, silence too, is yes.
  """
  sentence = set(written.split(".")[0].replace(",", "").split(" "))
  said, truth = not sentence & {"No", "no", "not"}, answers[0].strip().lower() == "yes"
  cells = {"hit": said and truth, "false_alarm": said and not truth, "miss": not said and truth}
  return {name: float(value) for name, value in (cells | {"rejected": not said and not truth}).items()}


MEASURES: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {"exact": exact, "soft": soft, "anls": anls}


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


def _need_answers(items: Sequence[Item]) -> None:
  for item in items:
    if not item.answers or not item.question:
      raise UserError(f"item {item.id} has no {'answers' if item.question else 'question'}: this task needs both")


def _choice(item: Item) -> int:
  """The number of the right choice."""
  if not 2 <= len(item.choices) <= len(LETTERS):
    raise UserError(f"item {item.id} has {len(item.choices)} choices: from 2 to {len(LETTERS)} are needed")
  answer = item.answers[0] if item.answers else ""
  if answer in item.choices:
    return item.choices.index(answer)
  if len(answer) == 1 and answer in LETTERS[: len(item.choices)]:
    return LETTERS.index(answer)
  raise UserError(f"item {item.id} is answered by {answer!r}, which is none of its choices, nor the letter of one")


def _turned(item: Item) -> Iterator[Item]:
  """The item with each of its choices first, the others behind it in their order."""
  right = item.choices[_choice(item)]
  for first in range(len(item.choices)):
    yield dataclasses.replace(item, choices=item.choices[first:] + item.choices[:first], answers=(right,))


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0


def _edits(a: str, b: str) -> int:
  """Levenshtein's distance."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a):
    before = row
    row = [i + 1]
    for j, y in enumerate(b):
      row.append(min(before[j] + (x != y), before[j + 1] + 1, row[j] + 1))
  return row[-1]


_NUMBERS = {
  word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"

# What the official script mends: words that lost their apostrophe, and those of two that lost one.
_LOST = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_LOST_ONE = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _LOST.split()} | {
  word[: mark.start()] + word[mark.end() :]: word for word in _LOST_ONE.split() for mark in re.finditer("'", word)
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the script's one entry that takes the apostrophe away

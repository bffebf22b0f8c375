"""Does the model say what it sees? Captions against what people wrote, or against the one canonical description."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clipflow_jax.data import shapes
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer, Scores

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

_ATTRIBUTES = frozenset(
  [*shapes.SHAPES, *shapes.COLOURS, *shapes.BACKGROUNDS, *shapes.SIZES, "outlined"]
  + [word for place in shapes.PLACES for word in place.split()]
)
_ORDERS = (1, 2, 3, 4)  # of n-grams
_SIGMA = 6.0  # of CIDEr-D's penalty on lengths
_BETA = 1.2  # of ROUGE-L: how much more recall counts

Ngram = tuple[str, ...]


class Captioner:
  """Describes pictures: BLEU-4 of the corpus, CIDEr, ROUGE-L, exact match with an item's answers, the references.

  question: what asks for a description; "" as the model was taught to be asked.
  """

  def __init__(self, model: ClipFlow, items: Sequence[Item], question: str = ""):
    lacking = [item.id for item in items if not item.answers]
    if lacking:
      raise UserError(f"item {lacking[0]} has no answers: captions are compared with what people wrote")
    self.model, self.question = model, question
    self.cider = Cider([[words(text) for text in item.answers] for item in items])

  def score(self, items: Sequence[Item]) -> list[Answer]:
    images = np.stack([item.look(self.model.image_size) for item in items])
    question = self.question
    written = self.model.answer(images, [question] * len(images)) if question else self.model.caption(images)
    return [self._compare(text, item.answers) for text, item in zip(written, items, strict=True)]

  def _compare(self, text: str, references: Sequence[str]) -> Answer:
    said, wanted = words(text), [words(reference) for reference in references]
    scores = {
      "exact": float(text.strip() in {reference.strip() for reference in references}),
      "cider": self.cider.score(said, wanted),
      "rouge_l": rouge_l(said, wanted),
      **bleu_counts(said, wanted),
    }
    return Answer(scores, text, references[0])

  def summary(self, scores: Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
    sums = {name: float(weights @ values) for name, values in scores.items()}
    means = {name: sums[name] / float(weights.sum()) for name in ("exact", "cider", "rouge_l")}
    return {"bleu_4": bleu(sums), **means}


def words(text: str) -> list[str]:
  """Words in lower case without punctuation, n't and 's apart: what Penn Treebank's rules leave of most captions."""
  return re.findall(r"\w+(?=n't\b)|n't\b|'\w+|\w+(?:[-.]\w+)*", text.lower().replace("’", "'"))


def bleu_counts(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
  """What of one text BLEU sums over a corpus: n-grams that match, n-grams that could, both lengths."""
  counts = {"bleu_length": float(len(said))}
  # Of references equally near in length the shorter one, as the official scripts do.
  counts["bleu_reference"] = float(min((abs(len(r) - len(said)), len(r)) for r in references)[1])
  for n in _ORDERS:
    most: Counter[Ngram] = Counter()
    for reference in references:
      most |= _ngrams(reference, n)
    own = _ngrams(said, n)
    counts[f"bleu_match_{n}"] = float((own & most).total())
    counts[f"bleu_could_{n}"] = float(own.total())
  return counts


def bleu(sums: dict[str, float]) -> float:
  """BLEU-4 of the sums of `bleu_counts`, smoothed as pycocoevalcap does. Source: Papineni et al. 2002."""
  product = 1.0
  for n in _ORDERS:
    product *= (sums[f"bleu_match_{n}"] + 1e-15) / (sums[f"bleu_could_{n}"] + 1e-9)
  ratio = (sums["bleu_length"] + 1e-15) / (sums["bleu_reference"] + 1e-9)
  return float(product ** (1 / len(_ORDERS)) * (np.exp(1 - 1 / ratio) if ratio < 1 else 1))


def rouge_l(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
  """F of the longest common subsequence, the best precision and the best recall over references. Source: Lin 2004."""
  common = [_longest_common(said, reference) for reference in references]
  precision = max(c / max(1, len(said)) for c in common)
  recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
  if not precision:
    return 0.0
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
  row = [0] * (len(b) + 1)
  for word in a:
    before = row[:]
    for i, other in enumerate(b):
      row[i + 1] = before[i] + 1 if word == other else max(row[i], before[i + 1])
  return row[-1]


class Cider:
  """CIDEr-D x 10 as pycocoevalcap computes it, rarity counted over all items' references.

  Source: Vedantam et al. 2015.
  """

  def __init__(self, references: Sequence[Sequence[Sequence[str]]]):
    self.documents: Counter[Ngram] = Counter()
    for texts in references:
      self.documents.update({ngram for text in texts for n in _ORDERS for ngram in _ngrams(text, n)})
    self.rarest = np.log(max(1.0, float(len(references))))

  def score(self, said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Of one text against the references of its item."""
    own = self._vectors(said)
    each = [self._similar(own, len(said), self._vectors(text), len(text)) for text in references]
    return float(10 * np.mean(each))

  def _vectors(self, text: Sequence[str]) -> list[dict[Ngram, float]]:
    def weight(ngram: Ngram, count: int) -> float:
      return count * (self.rarest - np.log(max(1, self.documents[ngram])))

    return [{ngram: weight(ngram, count) for ngram, count in _ngrams(text, n).items()} for n in _ORDERS]

  def _similar(self, a, length_a: int, b, length_b: int) -> float:
    penalty = np.exp(-((length_a - length_b) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for x, y in zip(a, b, strict=True):
      overlap = sum(min(value, y.get(ngram, 0.0)) * y.get(ngram, 0.0) for ngram, value in x.items())
      norms = np.linalg.norm(list(x.values())) * np.linalg.norm(list(y.values()))
      total += overlap / norms if norms else overlap
    return float(total / len(_ORDERS) * penalty)


def _ngrams(text: Sequence[str], n: int) -> Counter[Ngram]:
  return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def exact(written: Sequence[str], truth: Sequence[str]) -> float:
  """Share of texts that equal the truth, surrounding blanks aside."""
  return sum(a.strip() == b.strip() for a, b in zip(written, truth, strict=True)) / len(truth)


def attributes(written: Sequence[str], truth: Sequence[str]) -> float:
  """F1 of the attribute words (shape, colour, size, outline, place, background), over all captions together.

  Words are counted, not bound to objects: it tells a caption wrong in one word from one wrong in all of them.
  """
  hits = said = true = 0
  for a, b in zip(map(_attributes, written), map(_attributes, truth), strict=True):
    hits += (a & b).total()
    said += a.total()
    true += b.total()
  return 2 * hits / max(1, said + true)


def _attributes(text: str) -> Counter[str]:
  return Counter(word for word in re.findall(r"[a-z]+", text.lower()) if word in _ATTRIBUTES)

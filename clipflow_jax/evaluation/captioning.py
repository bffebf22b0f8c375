"""Does the model say what it sees? Captions against the one canonical description."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from clipflow_jax.data import shapes

_ATTRIBUTES = frozenset(
  [*shapes.SHAPES, *shapes.COLOURS, *shapes.BACKGROUNDS, *shapes.SIZES, "outlined"]
  + [word for place in shapes.PLACES for word in place.split()]
)


def exact(written: Sequence[str], truth: Sequence[str]) -> float:
  """Share of texts that equal the truth, surrounding blanks aside."""
  return sum(a.strip() == b.strip() for a, b in zip(written, truth, strict=True)) / len(truth)


def attributes(written: Sequence[str], truth: Sequence[str]) -> float:
  """F1 of the attribute words (shape, colour, size, outline, place, background), over all captions together.

  Words are counted, not bound to objects: it tells a caption wrong in one word from one wrong in all of them.
  """
  hits = said = true = 0
  for a, b in zip(map(_words, written), map(_words, truth), strict=True):
    hits += (a & b).total()
    said += a.total()
    true += b.total()
  return 2 * hits / max(1, said + true)


def _words(text: str) -> Counter[str]:
  return Counter(word for word in re.findall(r"[a-z]+", text.lower()) if word in _ATTRIBUTES)

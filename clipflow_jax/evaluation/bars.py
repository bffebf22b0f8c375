"""What the quickstart must reach: each bar once, for the terminal and the page alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Bar:
  """A limit on one metric; with `times`, the limit is so many times another metric."""

  metric: str
  text: str
  sense: Literal["≥", "≤"]
  limit: float
  times: str | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
  """A bar beside what was measured. value is None where it was not."""

  bar: Bar
  value: float | None
  limit: float

  @property
  def reached(self) -> bool | None:
    if self.value is None:
      return None
    return self.value >= self.limit if self.bar.sense == "≥" else self.value <= self.limit


QUICKSTART = (
  Bar("minutes_total", "minutes, all stages, installation included", "≤", 15),
  Bar("compositional_one", "compositional accuracy, one object", "≥", 0.95),
  Bar("compositional_two", "compositional accuracy, two objects", "≥", 0.80),
  Bar("compositional_unseen", "compositional accuracy, held-out combinations", "≥", 0.60),
  Bar("question_accuracy", "question accuracy", "≥", 0.95),
  Bar("caption_exact", "caption exactness", "≥", 0.80),
  Bar("zero_shot_accuracy", "zero-shot accuracy over shape × colour", "≥", 0.95),
  Bar("feature_distance", "Fréchet distance in feature space, 3 × real-vs-real", "≤", 3, "feature_distance_real"),
  Bar("decoder_psnr", "decoder reconstruction from features, dB", "≥", 22),
  Bar("peak_memory_gib", "peak memory, GiB", "≤", 4),
)


def standings(metrics: Mapping[str, Any], bars: tuple[Bar, ...] = QUICKSTART) -> list[Standing]:
  """Each bar with what was measured and the limit as a number."""
  return [
    Standing(bar, metrics.get(bar.metric), bar.limit * (metrics.get(bar.times, 0.0) if bar.times else 1))
    for bar in bars
  ]


def table(metrics: Mapping[str, Any], bars: tuple[Bar, ...] = QUICKSTART) -> str:
  """What was measured beside its bar as text; without bars, every number."""
  if not bars:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return "\n".join(f"{name:<28} {value:10.4g}" for name, value in numbers.items())
  lines = []
  for standing in standings(metrics, bars):
    bar, value = standing.bar, "not measured" if standing.value is None else f"{standing.value:.4g}"
    mark = {True: "reached", False: "missed", None: ""}[standing.reached]
    lines.append(f"{bar.text:<52} {value:>12}  {bar.sense} {standing.limit:<8.4g} {mark}")
  return "\n".join(lines)

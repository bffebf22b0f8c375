"""Drawing for those who look on: the pictures of `ClipFlow.draw_features`, seen a few times while they form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from clipflow_jax.flow import path
from clipflow_jax.inference import image
from clipflow_jax.inference.batching import jitted, keys_of, padded, seeds_of
from clipflow_jax.inference.pipeline import ClipFlow

ROOM = 128  # programs are compiled for so many times, or a multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
  """What N drawings are foreseen to become after some of their steps; after the last one, what they are."""

  step: int
  features: np.ndarray  # standardised f32[N,T,C]


class Forming:
  """A model that is looked at while it draws. One program serves every number of steps and every guidance: turning
  those knobs waits for no compiler."""

  def __init__(self, model: ClipFlow):
    self._model = model
    self._begin = jitted(self._compute_begin, static_argnames="sampling")
    self._go_on = jitted(self._compute_go_on, static_argnames="sampling", donate_argnames="drawing")

  def draw(
    self,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    looks: int = 8,
    images: np.ndarray | None = None,
  ) -> Iterator[Look]:
    """Draws the prompts in one batch and looks so often, evenly over the steps. Arguments as `draw_features`."""
    model = self._model
    sampling, rows, empty = model.to_draw(prompts, steps, guidance, images)
    n = len(prompts)
    part = padded(n)
    rows, seeds = jax.tree.map(lambda x: x[part], (rows, seeds_of(n, seed)))
    empty = jax.tree.map(lambda x: np.repeat(x, len(part), axis=0), empty)
    times = np.zeros(-(-(sampling.steps + 1) // ROOM) * ROOM, np.float32)
    times[: sampling.steps + 1] = path.grid(sampling.steps, model.model.alpha)
    # Whether there is any guidance is all that the programs know of it.
    kind = dataclasses.replace(sampling, steps=1, guidance=float(sampling.guidance == 1.0))

    drawing = self._begin(model.params, rows, empty, seeds, sampling=kind)
    last = sampling.steps - 1  # from its time one step leads to the end
    for step in np.unique(np.linspace(0, last, looks + 1)[1:].round().astype(np.int32)):
      scale = np.float32(sampling.guidance)
      drawing, features = self._go_on(model.params, drawing, seeds, times, step, scale, sampling=kind)
      yield Look(int(step) + 1, np.asarray(features)[:n])

  def _compute_begin(self, params, rows, empty, seeds, *, sampling):
    return image.begin(self._model.model, params, rows, empty, keys_of(seeds), sampling)

  def _compute_go_on(self, params, drawing, seeds, times, last, scale, *, sampling):
    return image.go_on(self._model.model, params, drawing, keys_of(seeds), times, last, scale, sampling=sampling)

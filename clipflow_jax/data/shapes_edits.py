"""Edits of scenes of shapes: a picture, what shall change in it, and the picture after that."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np

from clipflow_jax.data.example import Example
from clipflow_jax.data.shapes import (
  BACKGROUNDS,
  COLOURS,
  PLACES,
  SEEN_PAIRS,
  SHAPES,
  SIZES,
  Object,
  Scene,
  pick,
  render,
  scene,
)
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.shapes_text import article, describe, look, where

MOST = 4  # objects of a scene


@dataclasses.dataclass(frozen=True)
class Edit:
  """What is asked of a scene, and what has to become of it: all else stays as it was."""

  kind: str  # of KINDS
  text: str
  before: Scene
  after: Scene

  def example(self, id: str, size: int) -> Example:
    """Both pictures, and the words between them."""
    return Example(
      id=id,
      image=render(self.after, size),
      captions=(self.text,),
      description=describe(self.after).text,
      questions=(),
      before=render(self.before, size),
    )


@dataclasses.dataclass(frozen=True)
class ShapesEditsSource(ShapesSource):
  """An endless set of edits of shapes, a field of `ShapesSource` being what it is there; item i is a pure function of
  (seed, split, i). `image` is the picture after the edit, `before` the one before, its caption what was asked."""

  def __getitem__(self, i: int) -> Example:
    return edit(*self._draw(i)).example(f"edits-{self.split}-{self.seed}-{i}", self.size)


def edit(before: Scene, rng: np.random.Generator) -> Edit:
  """One edit of the scene, of a kind that it allows. No result shows an UNSEEN pair."""
  while (found := _try(pick(rng, tuple(KINDS)), before, rng)) is None:
    pass
  return found


def edits(kind: str, n: int, seed: int) -> list[Edit]:
  """n edits of a kind, of scenes of one to three objects; a function of the arguments alone."""
  rng = np.random.default_rng([seed, tuple(KINDS).index(kind)])
  scenes = (scene(rng, objects=int(rng.integers(1, 4))) for _ in itertools.count())
  return list(itertools.islice(filter(None, (_try(kind, before, rng) for before in scenes)), n))


def _try(kind: str, before: Scene, rng: np.random.Generator) -> Edit | None:
  found = KINDS[kind](before, rng)
  return Edit(kind, found[0], before, found[1]) if found else None


def _recolour(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if (thing := _named(before, rng)) is None:
    return None
  colour = pick(rng, [c for c in COLOURS if c != thing.colour and (c, thing.shape) in SEEN_PAIRS])
  return f"make {_the(thing)} {colour}", _with(before, thing, dataclasses.replace(thing, colour=colour))


def _reshape(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if (thing := _named(before, rng)) is None:
    return None
  shape = pick(rng, [s for s in SHAPES if s != thing.shape and (thing.colour, s) in SEEN_PAIRS])
  return f"turn {_the(thing)} into {article(shape)}", _with(before, thing, dataclasses.replace(thing, shape=shape))


def _resize(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if (thing := _named(before, rng)) is None:
    return None
  (size,) = (size for size in SIZES if size != thing.size)
  return f"make {_the(thing)} {size}", _with(before, thing, dataclasses.replace(thing, size=size))


def _move(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if (thing := _named(before, rng)) is None:
    return None
  moved = dataclasses.replace(thing, place=_free(before, rng))
  return f"move {_the(thing)} to the {PLACES[moved.place]}", _with(before, thing, moved)


def _remove(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if len(before.objects) == 1 or (thing := _named(before, rng)) is None:
    return None
  return f"remove {_the(thing)}", _with(before, thing, None)


def _add(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  if len(before.objects) == MOST:
    return None
  (new,) = scene(rng, objects=1).objects
  new = dataclasses.replace(new, place=_free(before, rng))
  text = f"add {article(f'{new.size} {look(new)}')}{where(new.place)}"
  return text, _with(before, None, new)


def _repaint(before: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
  ground = pick(rng, [name for name in BACKGROUNDS if name != before.background])
  return f"make the background {ground}", dataclasses.replace(before, background=ground)


KINDS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, Scene] | None]] = {
  "colour": _recolour,
  "shape": _reshape,
  "size": _resize,
  "place": _move,
  "remove": _remove,
  "add": _add,
  "background": _repaint,
}
"""Kind -> (text, scene after it) of a scene, or None where it has nothing that the words would name alone."""


def _named(before: Scene, rng: np.random.Generator) -> Object | None:
  """One of the things that differ from all others in what is said of them."""
  counts = Counter(map(look, before.objects))
  things = [thing for thing in before.objects if counts[look(thing)] == 1]
  return pick(rng, things) if things else None


def _the(thing: Object) -> str:
  return f"the {look(thing)}"


def _free(before: Scene, rng: np.random.Generator) -> int:
  taken = {thing.place for thing in before.objects}
  return pick(rng, [place for place in range(len(PLACES)) if place not in taken])


def _with(before: Scene, old: Object | None, new: Object | None) -> Scene:
  """The scene with `new` in place of `old`."""
  things = [thing for thing in before.objects if thing is not old] + ([new] if new else [])
  return dataclasses.replace(before, objects=tuple(sorted(things, key=lambda thing: thing.place)))

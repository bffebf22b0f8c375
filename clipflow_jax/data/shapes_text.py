"""What is said of a scene of shapes: captions of several templates, questions and their answers.

Everything is lower case without digits, made of the few words of WORDS. Every caption names every object by
colour and shape, and as outlined when it is; what a text says of a scene is always true of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

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
  related,
)

# Captions.
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


@dataclasses.dataclass(frozen=True)
class Mention:
  """What a caption fixes of one object; None is free."""

  shape: str
  colour: str
  outlined: bool
  size: str | None = None
  place: int | None = None


@dataclasses.dataclass(frozen=True)
class Caption:
  """A text and what it says."""

  text: str
  mentions: tuple[Mention, ...]  # one for every object
  relation: str | None = None  # a key of RELATIONS: mentions[0] is there of mentions[1]
  background: str | None = None


def describe(scene: Scene) -> Caption:
  """The canonical full caption: everything about every object in reading order, and the background."""
  return _write([_mention(thing, size=True, place=True) for thing in scene.objects], background=scene.background)


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
  """One true caption of several templates, naming every object; size, place and background only at times.

  Of three and more different objects no size or place is said: captions stay within some 24 words.
  """
  few = len(scene.objects) <= 2
  style = rng.random()
  if few and style < 0.3:
    return describe(scene)
  plain = style > 0.7  # colours and shapes alone
  background = scene.background if not plain and rng.random() < 0.4 else None
  things = [scene.objects[k] for k in rng.permutation(len(scene.objects))]
  if _identical(things):
    size = not plain and len({thing.size for thing in things}) == 1 and rng.random() < 0.5
    return _write([_mention(thing, size=size) for thing in things], background=background)
  if len(things) == 2 and rng.random() < 0.5:
    relation = pick(rng, [name for name in RELATIONS if related(things[0], name, things[1])])
    return _write([_mention(thing) for thing in things], relation, background)
  size, place = (few and not plain and rng.random() < 0.5 for _ in range(2))
  return _write([_mention(thing, size=size, place=place) for thing in things], None, background)


def _identical(things: Sequence[Object]) -> bool:
  """Whether several things differ in nothing that a caption must say."""
  return len(things) > 1 and len({(thing.shape, thing.colour, thing.outlined) for thing in things}) == 1


def _mention(thing: Object, size: bool = False, place: bool = False) -> Mention:
  return Mention(
    thing.shape, thing.colour, thing.outlined, thing.size if size else None, thing.place if place else None
  )


def _write(mentions: Sequence[Mention], relation: str | None = None, background: str | None = None) -> Caption:
  phrases = [article(_look_words(mention)) + where(mention.place) for mention in mentions]
  if relation is not None:
    text = f"{phrases[0]} {RELATIONS[relation]} {phrases[1]}"
  elif len(set(phrases)) == 1 and len(phrases) > 1:
    text = f"{NUMBERS[len(phrases)]} {_plural(_look_words(mentions[0]))}"
  else:
    text = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
  if background is not None:
    text += f" on {article(background)} background"
  return Caption(text, tuple(mentions), relation, background)


def _look_words(mention: Mention) -> str:
  return f"{mention.size} {look(mention)}" if mention.size else look(mention)


def look(thing: Object | Mention) -> str:
  """What every text says of an object: "outlined red circle"."""
  return f"{'outlined ' if thing.outlined else ''}{thing.colour} {thing.shape}"


def where(place: int | None) -> str:
  """ " at the top left", or nothing."""
  return "" if place is None else f" at the {PLACES[place]}"


def article(words: str) -> str:
  """The words behind their article."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(words: str) -> str:
  return words + ("es" if words.endswith("s") else "s")


# Questions.
def questions(scene: Scene, rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
  """n questions of mixed kinds with short answers, unambiguous.

  "is there" is yes as often as no. What is not there is a near miss, right in colour or shape, never UNSEEN.
  """
  asked: list[tuple[str, str]] = []
  while len(asked) < n:
    asked += [pair for k in rng.permutation(len(_KINDS)) if (pair := _KINDS[k](scene, rng))]
  return asked[:n]


def _ask_colour_of_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
  thing = _unique(scene, rng, lambda thing: thing.shape)
  return (f"what colour is the {thing.shape}?", thing.colour) if thing else None


def _ask_colour_at_place(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  thing = pick(rng, scene.objects)
  return f"what colour is the shape{where(thing.place)}?", thing.colour


def _ask_shape_at_place(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  thing = pick(rng, scene.objects)
  return f"which shape is{where(thing.place)}?", thing.shape


def _ask_shape_of_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
  thing = _unique(scene, rng, lambda thing: thing.colour)
  return (f"which shape is {thing.colour}?", thing.shape) if thing else None


def _ask_place(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
  thing = _unique(scene, rng, _pair)
  return (f"where is the {thing.colour} {thing.shape}?", PLACES[thing.place]) if thing else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  return "how many shapes are there?", NUMBERS[len(scene.objects)]


def _ask_count_of_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  shape = _shape(scene, rng, absent=0.25)
  return f"how many {_plural(shape)} are there?", NUMBERS[sum(thing.shape == shape for thing in scene.objects)]


def _ask_count_of_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  pair = _near_miss(scene, rng) if rng.random() < 0.25 else _pair(pick(rng, scene.objects))
  count = sum(_pair(thing) == pair for thing in scene.objects)
  return f"how many {_plural(' '.join(pair))} are there?", NUMBERS[count]


def _ask_presence_of_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  shape = _shape(scene, rng, absent=0.5)
  return f"is there {article(shape)}?", "yes" if any(thing.shape == shape for thing in scene.objects) else "no"


def _ask_presence_of_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  there = rng.random() < 0.5
  pair = _pair(pick(rng, scene.objects)) if there else _near_miss(scene, rng)
  return f"is there {article(' '.join(pair))}?", "yes" if there else "no"


def _ask_background(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  return "what is the background colour?", scene.background


_KINDS = (
  _ask_colour_of_shape,
  _ask_shape_of_colour,
  _ask_colour_at_place,
  _ask_shape_at_place,
  _ask_place,
  _ask_count,
  _ask_count_of_shape,
  _ask_count_of_pair,
  _ask_presence_of_shape,
  _ask_presence_of_pair,
  _ask_background,
)


def _pair(thing: Object) -> tuple[str, str]:
  return thing.colour, thing.shape


def _unique(scene: Scene, rng: np.random.Generator, key: Callable[[Object], Hashable]) -> Object | None:
  """One of the things that share their key with no other, if there are any."""
  counts = Counter(map(key, scene.objects))
  things = [thing for thing in scene.objects if counts[key(thing)] == 1]
  return pick(rng, things) if things else None


def _shape(scene: Scene, rng: np.random.Generator, absent: float) -> str:
  """A shape of the scene's things or, with the probability `absent`, one that none of them has."""
  there = [thing.shape for thing in scene.objects]
  return pick(rng, [shape for shape in SHAPES if shape not in there] if rng.random() < absent else there)


def _near_miss(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
  """A pair that is not in the scene, but its colour or its shape is."""
  there = {_pair(thing) for thing in scene.objects}
  colours, shapes = map(set, zip(*there))
  return pick(rng, [(c, s) for c, s in SEEN_PAIRS if (c, s) not in there and (c in colours or s in shapes)])


_NAMES = (*SHAPES, *map(_plural, SHAPES), *COLOURS, *BACKGROUNDS, *SIZES, *NUMBERS, *PLACES)
_GLUE = "a an and at the on background outlined to of above below"
_ASKED = "what colour is shape shapes how many are there where which yes no"
WORDS = frozenset(" ".join((*_NAMES, _GLUE, _ASKED)).split())
"""Every word of every text; besides them there are only spaces, commas and question marks."""

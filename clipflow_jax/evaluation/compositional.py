"""Is in the picture what the prompt says? A rule-based reader of pictures of shapes, and its score.

Categories as in GenEval (Ghosh et al. 2023), with the pairs of colour and shape held out from training.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np

from clipflow_jax.data import shapes
from clipflow_jax.data.shapes_text import Caption, Mention, caption, describe

CATEGORIES = ("one", "two", "counting", "colours", "position", "attribution", "unseen")

_FOREGROUND = 60.0  # distance in RGB from the background's colour; the palette keeps 100 between any two
_EMPTY = 0.02  # share of foreground up to which a cell counts as empty
_READABLE = 0.75  # share of a cell's contrast that the best template must explain; of half a shape it is 0.5
_GAIN = (0.6, 1.15)  # blur pales thin strokes, but a pale red must not pass for pink


@dataclasses.dataclass(frozen=True)
class Reading:
  """What is seen in a picture."""

  objects: tuple[shapes.Object, ...]  # by place
  background: str | None  # None: no colour that backgrounds have
  unreadable: tuple[int, ...] = ()  # places that hold something else than one known object


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
  """One prompt, the picture drawn from it, what is seen there, and whether that is what the prompt says."""

  category: str
  caption: Caption
  image: np.ndarray  # u8[H,W,3]
  reading: Reading
  right: bool


def read(image: np.ndarray) -> Reading:
  """Finds the objects of a picture u8[H,H,3]; tolerates slightly soft edges, noise and shifts by one pixel.

  Each cell that is not empty is compared with every object it may hold. A cell that no object explains well,
  such as one with a fragment, a smear or two colours, is unreadable.
  """
  pixels = image.astype(np.float32)
  ground = np.median(pixels.reshape(-1, 3), axis=0)  # objects never cover half of a picture
  contrast = pixels - ground
  foreground = np.einsum("hwc,hwc->hw", contrast, contrast) > _FOREGROUND**2
  objects, unreadable = [], []
  for place in range(len(shapes.PLACES)):
    cell = shapes.cell(place, len(image))
    if foreground[cell].mean() <= _EMPTY:
      continue
    if (thing := _recognise(contrast[cell], ground, place, len(image))) is not None:
      objects.append(thing)
    else:
      unreadable.append(place)
  return Reading(tuple(objects), _background(ground), tuple(unreadable))


def matches(caption: Caption, reading: Reading) -> bool:
  """Whether the reading is what the caption says: its objects and no others, its relation, its background."""
  if reading.unreadable or len(reading.objects) != len(caption.mentions):
    return False
  if caption.background not in (None, reading.background):
    return False
  # Each mention needs an object of its own, so try every assignment; there are at most four objects.
  return any(
    all(map(_agrees, caption.mentions, things))
    and (caption.relation is None or shapes.related(things[0], caption.relation, things[1]))
    for things in itertools.permutations(reading.objects)
  )


def prompts(category: str, n: int, seed: int) -> list[Caption]:
  """n captions of a category, a function of the arguments alone."""
  rng = np.random.default_rng([seed, CATEGORIES.index(category)])
  return [_prompt(category, rng) for _ in range(n)]


def judge(draw: Callable[[list[str]], np.ndarray], n: int, seed: int) -> list[Verdict]:
  """Draws n prompts of every category by one call of draw (N texts -> u8[N,H,H,3]) and reads the pictures."""
  asked = [(category, wanted) for category in CATEGORIES for wanted in prompts(category, n, seed)]
  images = draw([wanted.text for _, wanted in asked])
  readings = map(read, images)
  return [
    Verdict(category, wanted, image, reading, matches(wanted, reading))
    for (category, wanted), image, reading in zip(asked, images, readings, strict=True)
  ]


def accuracy(verdicts: list[Verdict]) -> dict[str, float]:
  """Share of right pictures in every category."""
  return {
    category: float(np.mean([verdict.right for verdict in verdicts if verdict.category == category]))
    for category in CATEGORIES
  }


def score(draw: Callable[[list[str]], np.ndarray], n: int, seed: int) -> dict[str, float]:
  """Accuracy of every category over n prompts each."""
  return accuracy(judge(draw, n, seed))


def _prompt(category: str, rng: np.random.Generator) -> Caption:
  while True:
    if category == "counting":
      scene = shapes.scene(rng, objects=int(rng.integers(2, 5)), identical=True)
    elif category in ("two", "position", "attribution"):
      scene = shapes.scene(rng, objects=2, identical=category == "two" and rng.random() < shapes.IDENTICAL)
    else:
      scene = shapes.scene(rng, objects=1, unseen=category == "unseen")
    said = describe(scene) if category == "attribution" else caption(scene, rng)
    fits = {
      "counting": said.mentions[0].place is None,
      "colours": said.background is not None,
      "position": said.relation is not None,
    }
    if fits.get(category, True):
      return said


def _agrees(mention: Mention, thing: shapes.Object) -> bool:
  return (
    (mention.shape, mention.colour, mention.outlined) == (thing.shape, thing.colour, thing.outlined)
    and mention.size in (None, thing.size)
    and mention.place in (None, thing.place)
  )


_PALETTE = {name: np.array(rgb, np.float32) for name, rgb in (shapes.COLOURS | shapes.BACKGROUNDS).items()}
_LOOKS = tuple(itertools.product(shapes.SHAPES, shapes.SIZES, (False, True)))


@functools.lru_cache(maxsize=64)
def _templates(place: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """The K looks' masks, shifted by up to a pixel, f32[9K,h*w], and energies, f32[9K]. Looks vary fastest."""
  masks = [shapes.mask(shape, size, outlined, place, side) for shape, size, outlined in _LOOKS]
  shifts = itertools.product((-1, 0, 1), repeat=2)
  templates = np.stack([np.roll(mask, shift, axis=(0, 1)).ravel() for shift in shifts for mask in masks])
  return templates, np.square(templates).sum(axis=1)


def _recognise(contrast: np.ndarray, ground: np.ndarray, place: int, side: int) -> shapes.Object | None:
  """The look and colour whose template, times the best gain, leaves least of a cell's contrast f32[h,w,3]."""
  templates, energies = _templates(place, side)
  colours = np.stack(list(_PALETTE.values())) - ground
  energy = energies[:, None] * np.square(colours).sum(axis=1) + 1.0  # [9K, colours]
  overlap = templates @ (contrast.reshape(-1, 3) @ colours.T)
  gain = np.clip(overlap / energy, *_GAIN)
  explained = gain * (2 * overlap - gain * energy) / np.square(contrast).sum()
  best, colour = map(int, np.unravel_index(np.argmax(explained), explained.shape))
  if explained[best, colour] < _READABLE or tuple(_PALETTE)[colour] not in shapes.COLOURS:
    return None
  shape, size, outlined = _LOOKS[best % len(_LOOKS)]
  return shapes.Object(shape, tuple(_PALETTE)[colour], size, outlined, place)


def _background(ground: np.ndarray) -> str | None:
  """The nearest colour of the palette, if it is one of the backgrounds."""
  nearest = min(_PALETTE, key=lambda name: float(np.square(_PALETTE[name] - ground).sum()))
  return nearest if nearest in shapes.BACKGROUNDS else None

"""The world of shapes: what a scene may hold, and its picture.

A scene is one to four objects on a plain background, each centred in its own cell of a 3x3 grid. Six pairs of
colour and shape (UNSEEN) are never drawn nor named unless asked for, so that composition is really tested.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageDraw

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
COLOURS = {
  "red": (215, 30, 35),
  "orange": (250, 135, 20),
  "yellow": (250, 230, 50),
  "green": (30, 160, 60),
  "cyan": (40, 215, 225),
  "blue": (35, 75, 225),
  "purple": (140, 25, 170),
  "pink": (250, 130, 200),
}
BACKGROUNDS = {
  "white": (250, 250, 250),
  "gray": (128, 128, 128),
  "black": (10, 10, 10),
  "brown": (100, 65, 35),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
UNSEEN = frozenset(
  {
    ("red", "star"),
    ("orange", "square"),
    ("green", "circle"),
    ("cyan", "triangle"),
    ("blue", "diamond"),
    ("purple", "cross"),
  }
)

OUTLINED = 0.12  # share of the objects
IDENTICAL = 0.15  # share of the scenes of several objects in which all look the same

SEEN_PAIRS = tuple(pair for pair in itertools.product(COLOURS, SHAPES) if pair not in UNSEEN)


@dataclasses.dataclass(frozen=True)
class Object:
  shape: str
  colour: str
  size: str
  outlined: bool
  place: int  # index into PLACES


@dataclasses.dataclass(frozen=True)
class Scene:
  objects: tuple[Object, ...]  # by place
  background: str


def scene(rng: np.random.Generator, *, objects: int, unseen: bool = False, identical: bool = False) -> Scene:
  """A random scene of so many objects.

  unseen: all objects are of UNSEEN pairs; otherwise none is. identical: all objects look the same.
  """
  pairs = sorted(UNSEEN) if unseen else SEEN_PAIRS
  looks = [_look(rng, pairs) for _ in range(1 if identical else objects)]
  places = sorted(rng.permutation(len(PLACES))[:objects].tolist())
  return Scene(
    objects=tuple(Object(*look, place) for look, place in zip(itertools.cycle(looks), places)),
    background=pick(rng, tuple(BACKGROUNDS)),
  )


def related(a: Object, relation: str, b: Object) -> bool:
  """Whether a is `relation` b, strictly: by columns for left and right, by rows for above and below."""
  (row_a, column_a), (row_b, column_b) = divmod(a.place, 3), divmod(b.place, 3)
  return {
    "left of": column_a < column_b,
    "right of": column_a > column_b,
    "above": row_a < row_b,
    "below": row_a > row_b,
  }[relation]


def _look(rng: np.random.Generator, pairs: Sequence[tuple[str, str]]) -> tuple[str, str, str, bool]:
  colour, shape = pick(rng, pairs)
  return shape, colour, pick(rng, SIZES), bool(rng.random() < OUTLINED)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
  """One of the options, all equally likely; several times faster than rng.choice."""
  return options[int(rng.integers(len(options)))]


# Pictures. All lengths are in units of the picture's side.
_RADIUS = {"small": 0.115, "large": 0.16}
_STROKE = {"small": 0.03, "large": 0.042}
_SUPERSAMPLING = 8  # masks are cached, so smooth edges are free


def _polygon(corners: int, *radii: float, turn: float = 0.0, down: float = 0.0) -> np.ndarray:
  """(x, y) of corners at even angles from the top on, the radii in turn; turned by degrees, moved down."""
  angles = np.radians(turn) + np.arange(corners) * 2 * np.pi / corners
  x, y = np.resize(radii, corners) * (np.sin(angles), -np.cos(angles))
  return np.stack([x, y + down], axis=1)


# Half of a cross; the other half is opposite.
_CROSS = [(-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36)]
# Corners in units of the radius, of about equal weight to the eye.
_CORNERS = {
  "circle": _polygon(64, 0.96),
  "square": _polygon(4, 1.2, turn=45),
  "triangle": _polygon(3, 1.15, down=0.29),
  "diamond": _polygon(4, 1.03) * (0.85, 1),
  "cross": np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),
  "star": _polygon(10, 1.05, 0.48, down=0.1),
}


def cell(place: int, side: int) -> tuple[slice, slice]:
  """Rows and columns of a place in a picture of this side, in pixels."""
  row, column = divmod(place, 3)
  edges = [round(k * side / 3) for k in range(4)]
  return slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])


@functools.lru_cache(maxsize=1024)
def mask(shape: str, size: str, outlined: bool, place: int, side: int) -> np.ndarray:
  """How much of each pixel of its cell an object covers: f32[h,w] in 0..1. Cached: do not write to it."""
  rows, columns = cell(place, side)
  height, width = rows.stop - rows.start, columns.stop - columns.start
  row, column = divmod(place, 3)
  centre = np.array([(column + 0.5) * side / 3 - columns.start, (row + 0.5) * side / 3 - rows.start])
  corners = (centre + _CORNERS[shape] * _RADIUS[size] * side) * _SUPERSAMPLING - 0.5
  path = [tuple(corner) for corner in corners]
  canvas = (width * _SUPERSAMPLING, height * _SUPERSAMPLING)
  filled = Image.new("L", canvas)
  ImageDraw.Draw(filled).polygon(path, fill=255)
  if outlined:
    # The inner half of a line of twice the stroke: the outline keeps the outer form of the filled shape.
    line = Image.new("L", canvas)
    width_of_line = round(2 * _STROKE[size] * side * _SUPERSAMPLING)
    ImageDraw.Draw(line).line([*path, *path[:2]], fill=255, width=width_of_line, joint="curve")
    filled = ImageChops.darker(filled, line)
  return np.asarray(filled.reduce(_SUPERSAMPLING), np.float32) / 255


def render(scene: Scene, size: int = 60) -> np.ndarray:
  """The picture of a scene: u8[size,size,3]."""
  background = np.array(BACKGROUNDS[scene.background], np.float32)
  image = np.empty((size, size, 3), np.uint8)
  image[:] = BACKGROUNDS[scene.background]
  for thing in scene.objects:
    cover = mask(thing.shape, thing.size, thing.outlined, thing.place, size)[..., None]
    colour = np.array(COLOURS[thing.colour], np.float32)
    image[cell(thing.place, size)] = (background + cover * (colour - background) + 0.5).astype(np.uint8)
  return image

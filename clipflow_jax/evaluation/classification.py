"""Does CLIP know what it sees? Zero-shot classification and retrieval."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from clipflow_jax.data import shapes

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

PAIRS = tuple(itertools.product(shapes.COLOURS, shapes.SHAPES))
"""Every (colour, shape): the 48 classes."""

NAMES = tuple(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in PAIRS)
"""What CLIP is asked to choose from, in the order of PAIRS."""


def zero_shot(model: ClipFlow, *, n: int, seed: int, size: int) -> dict[str, float]:
  """Zero-shot accuracy over shape x colour on n pictures of one filled object, every pair equally often.

  size: height and width of the pictures. zero_shot_accuracy counts all 48 pairs; zero_shot_seen and
  zero_shot_unseen split them by whether training showed the pair.
  """
  rng = np.random.default_rng([seed, n])
  labels = np.arange(n) % len(PAIRS)
  images = np.stack([shapes.render(_alone(PAIRS[label], rng), size) for label in labels])
  right = np.asarray(model.classify(images, list(NAMES))) == labels
  unseen = np.array([pair in shapes.UNSEEN for pair in PAIRS])[labels]
  parts = {"zero_shot_accuracy": right, "zero_shot_seen": right[~unseen], "zero_shot_unseen": right[unseen]}
  return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def retrieval(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
  """Share of pictures whose nearest text is their own. Both f[N,E], unit norm; the texts must be distinct."""
  nearest = np.argmax(image_embeddings @ text_embeddings.T, axis=1)
  return float(np.mean(nearest == np.arange(len(nearest))))


def _alone(pair: tuple[str, str], rng: np.random.Generator) -> shapes.Scene:
  """One filled object of this colour and shape; everything else at random."""
  colour, shape = pair
  thing = shapes.Object(
    shape=shape,
    colour=colour,
    size=str(rng.choice(shapes.SIZES)),
    outlined=False,  # what is outlined is named so: it is of no class
    place=int(rng.integers(len(shapes.PLACES))),
  )
  return shapes.Scene(objects=(thing,), background=str(rng.choice(list(shapes.BACKGROUNDS))))

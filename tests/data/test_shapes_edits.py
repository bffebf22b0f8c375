"""Edits of shapes: one thing changes, as the words say, and nothing else."""

from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest

from clipflow_jax.data import shapes
from clipflow_jax.data.shapes_edits import KINDS, Edit, ShapesEditsSource, edit, edits
from tests.data.test_shapes import COLOUR, GROUND, PLACE, SETTINGS, SHAPE, generators, scenes

LOOK = rf"(outlined )?({COLOUR}) ({SHAPE})"


def carried_out(text: str, scene: shapes.Scene) -> shapes.Scene:
  """The scene after what the text asks for, from its words alone; fails where they name not just one thing."""

  def the(outlined: str | None, colour: str, shape: str) -> shapes.Object:
    (thing,) = (o for o in scene.objects if (o.outlined, o.colour, o.shape) == (bool(outlined), colour, shape))
    return thing

  def changed(old: shapes.Object | None, **new: object) -> shapes.Scene:
    fields = dict(vars(old) if old else {}, **new)
    kept = [thing for thing in scene.objects if thing is not old] + ([shapes.Object(**fields)] if new else [])
    return shapes.Scene(tuple(sorted(kept, key=lambda thing: thing.place)), scene.background)

  def said(pattern: str) -> tuple[str, ...] | None:
    found = re.fullmatch(pattern, text)
    return found.groups() if found else None

  if words := said(rf"make the background ({GROUND})"):
    return shapes.Scene(scene.objects, words[0])
  if words := said(rf"make the {LOOK} ({COLOUR})"):
    return changed(the(*words[:3]), colour=words[3])
  if words := said(rf"make the {LOOK} (small|large)"):
    return changed(the(*words[:3]), size=words[3])
  if words := said(rf"turn the {LOOK} into an? ({SHAPE})"):
    return changed(the(*words[:3]), shape=words[3])
  if words := said(rf"move the {LOOK} to the ({PLACE})"):
    return changed(the(*words[:3]), place=shapes.PLACES.index(words[3]))
  if words := said(rf"remove the {LOOK}"):
    return changed(the(*words))
  words = said(rf"add a (small|large) {LOOK} at the ({PLACE})")
  assert words, text
  size, outlined, colour, shape, place = words
  new = dict(shape=shape, colour=colour, size=size, outlined=bool(outlined), place=shapes.PLACES.index(place))
  return changed(None, **new)


def check(found: Edit) -> None:
  assert carried_out(found.text, found.before) == found.after != found.before
  places = [thing.place for thing in found.after.objects]
  assert 1 <= len(places) <= 4 and places == sorted(set(places))


@hypothesis.given(scenes(), generators())
@SETTINGS
def test_what_becomes_of_a_scene_is_what_the_words_say_and_nothing_else(scene, rng):
  check(edit(scene, rng))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_asked_for_and_shows_no_held_out_pair(kind):
  found = edits(kind, 50, seed=3)
  assert [one.kind for one in found] == [kind] * 50
  for one in found:
    check(one)
    assert not shapes.UNSEEN & {(thing.colour, thing.shape) for thing in one.after.objects}
  assert found == edits(kind, 50, seed=3) != edits(kind, 50, seed=4)


def test_the_source_gives_both_pictures_and_every_kind():
  source = ShapesEditsSource(size=24, seed=1)
  example = source[5]
  assert example.image.shape == example.before.shape == (24, 24, 3)
  assert not np.array_equal(example.image, example.before)
  np.testing.assert_array_equal(example.image, ShapesEditsSource(size=24, seed=1)[5].image)
  assert source[5].captions != ShapesEditsSource(size=24, seed=1, split="test")[5].captions
  first = [source[i].captions[0].split()[0] for i in range(100)]
  assert set(first) == {"make", "turn", "move", "remove", "add"}

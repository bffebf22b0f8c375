"""The reader of pictures against rendered truth, and the score against drawers whose faults are known."""

from __future__ import annotations

import dataclasses
import itertools
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import ndimage

from clipflow_jax.data import shapes
from clipflow_jax.data.shapes_text import Caption, Mention, caption, describe
from clipflow_jax.evaluation import compositional
from clipflow_jax.evaluation.compositional import Reading, matches, prompts, read

SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=200)


def random_scenes(n: int, seed: int = 0) -> list[shapes.Scene]:
  rng = np.random.default_rng(seed)
  return [shapes.scene(rng, objects=1 + k % 4, unseen=k % 5 == 0, identical=k % 7 == 0) for k in range(n)]


def all_looks() -> list[shapes.Scene]:
  """Every shape, colour, size, fill and background, the places in turn."""
  looks = itertools.product(shapes.SHAPES, shapes.COLOURS, shapes.SIZES, (False, True), shapes.BACKGROUNDS)
  return [shapes.Scene((shapes.Object(*look, k % 9),), ground) for k, (*look, ground) in enumerate(looks)]


def perfect(scene: shapes.Scene) -> Reading:
  return Reading(scene.objects, scene.background)


def share_read(wanted: list[shapes.Scene], images: list[np.ndarray]) -> float:
  return float(np.mean([read(image) == perfect(scene) for scene, image in zip(wanted, images)]))


def soften(image: np.ndarray, rng: np.random.Generator, blur: float, noise: float, tint: float) -> np.ndarray:
  """What a decoder may do to a picture."""
  blurred = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
  dirty = blurred + rng.normal(0, noise, image.shape) + rng.uniform(-tint, tint, 3)
  return np.clip(np.rint(dirty), 0, 255).astype(np.uint8)


def draw_truth(texts: list[str], wanted: dict[str, Caption]) -> np.ndarray:
  """A perfect drawer: what the caption leaves free is filled in."""
  return np.stack([shapes.render(_fulfil(wanted[text])) for text in texts])


def _fulfil(said: Caption) -> shapes.Scene:
  for places in itertools.permutations(range(9), len(said.mentions)):
    things = [
      shapes.Object(m.shape, m.colour, m.size or "large", m.outlined, place) for m, place in zip(said.mentions, places)
    ]
    scene = shapes.Scene(tuple(sorted(things, key=lambda thing: thing.place)), said.background or "white")
    if matches(said, perfect(scene)):
      return scene
  raise AssertionError(said)


class TestReader:
  def test_reads_every_look_on_every_background(self):
    wanted = all_looks()
    assert share_read(wanted, [shapes.render(scene) for scene in wanted]) >= 0.99

  @pytest.mark.parametrize("size", [48, 60, 64, 96])
  def test_reads_rendered_truth(self, size):
    wanted = random_scenes(300)
    assert share_read(wanted, [shapes.render(scene, size) for scene in wanted]) >= 0.99

  @pytest.mark.parametrize("tint", [0, 20])
  def test_reads_soft_noisy_and_tinted_pictures(self, tint):
    rng = np.random.default_rng(0)
    wanted = random_scenes(400) + all_looks()[::3]
    images = [soften(shapes.render(scene), rng, blur=0.5, noise=5, tint=tint) for scene in wanted]
    assert share_read(wanted, images) >= 0.97

  def test_reads_objects_that_sit_a_pixel_off(self):
    wanted = random_scenes(200)
    images = [np.roll(shapes.render(scene), (1, -1), axis=(0, 1)) for scene in wanted]
    assert share_read(wanted, images) >= 0.97

  def test_finds_nothing_on_an_empty_picture(self):
    image = np.full((60, 60, 3), shapes.BACKGROUNDS["gray"], np.uint8)
    assert read(image) == Reading((), "gray")

  def test_background_of_no_known_colour_is_none(self):
    assert read(np.full((60, 60, 3), shapes.COLOURS["cyan"], np.uint8)).background is None

  @pytest.mark.parametrize("shape", shapes.SHAPES)
  def test_half_a_shape_is_unreadable(self, shape):
    scene = shapes.Scene((shapes.Object(shape, "blue", "large", False, 4),), "white")
    image = shapes.render(scene).copy()
    image[20:40, 20:30] = shapes.BACKGROUNDS["white"]
    assert read(image) == Reading((), "white", unreadable=(4,))

  def test_object_of_a_background_colour_is_unreadable(self):
    image = np.full((60, 60, 3), shapes.BACKGROUNDS["white"], np.uint8)
    image[22:38, 22:38] = shapes.BACKGROUNDS["gray"]
    assert read(image).unreadable == (4,)

  def test_object_across_two_cells_is_unreadable(self):
    scene = shapes.Scene((shapes.Object("circle", "red", "large", False, 4),), "black")
    assert read(np.roll(shapes.render(scene), 10, axis=1)).unreadable == (4, 5)

  def test_stray_fragment_makes_the_reading_wrong_and_a_speck_does_not(self):
    scene = shapes.Scene((shapes.Object("circle", "red", "large", False, 4),), "white")
    fragment, speck = shapes.render(scene).copy(), shapes.render(scene).copy()
    fragment[5:9, 5:9] = shapes.COLOURS["red"]
    speck[5:7, 5:7] = shapes.COLOURS["red"]
    assert not matches(describe(scene), read(fragment))
    assert matches(describe(scene), read(speck))


class TestMatches:
  @SETTINGS
  @hypothesis.given(st.integers(0, 2**32), st.integers(1, 4), st.booleans(), st.booleans())
  def test_caption_matches_its_scene_and_no_changed_one(self, seed, objects, unseen, identical):
    rng = np.random.default_rng(seed)
    scene = shapes.scene(rng, objects=objects, unseen=unseen, identical=identical)
    said = caption(scene, rng)
    assert matches(said, perfect(scene))

    k = int(rng.integers(objects))
    thing, others = scene.objects[k], scene.objects[:k] + scene.objects[k + 1 :]
    free = next(place for place in range(9) if all(place != other.place for other in scene.objects))
    shape = shapes.SHAPES[shapes.SHAPES.index(thing.shape) - 1]
    colour = list(shapes.COLOURS)[list(shapes.COLOURS).index(thing.colour) - 1]
    for changed in (
      others,
      (*scene.objects, dataclasses.replace(thing, place=free)),
      (*others, dataclasses.replace(thing, shape=shape)),
      (*others, dataclasses.replace(thing, colour=colour)),
      (*others, dataclasses.replace(thing, outlined=not thing.outlined)),
    ):
      assert not matches(said, Reading(changed, scene.background))
    assert not matches(said, dataclasses.replace(perfect(scene), unreadable=(free,)))

  @SETTINGS
  @hypothesis.given(st.integers(0, 2**32), st.integers(1, 4))
  def test_caption_matches_the_reading_of_its_picture(self, seed, objects):
    rng = np.random.default_rng(seed)
    scene = shapes.scene(rng, objects=objects)
    assert matches(caption(scene, rng), read(shapes.render(scene)))

  def test_size_place_and_background_count_only_where_said(self):
    thing = shapes.Object("star", "pink", "small", False, 2)
    seen = Reading((thing,), "white")
    bare = Mention("star", "pink", False)
    for mention, background, right in (
      (bare, None, True),
      (dataclasses.replace(bare, size="small", place=2), "white", True),
      (dataclasses.replace(bare, size="large"), None, False),
      (dataclasses.replace(bare, place=3), None, False),
      (bare, "black", False),
    ):
      assert matches(Caption("", (mention,), None, background), seen) == right

  def test_things_of_one_description_need_an_object_each(self):
    circle = shapes.Object("circle", "red", "small", False, 0)
    two = Caption("two red circles", (Mention("circle", "red", False),) * 2)
    assert matches(two, Reading((circle, dataclasses.replace(circle, place=8)), "white"))
    assert not matches(two, Reading((circle, shapes.Object("square", "red", "small", False, 8)), "white"))

  def test_relation_must_hold(self):
    circle = shapes.Object("circle", "red", "small", False, 3)
    square = shapes.Object("square", "blue", "small", False, 5)
    seen = Reading((circle, square), "white")
    mentions = (Mention("circle", "red", False), Mention("square", "blue", False))
    held = [
      relation
      for relation in ("left of", "right of", "above", "below")
      if matches(Caption("", mentions, relation), seen)
    ]
    assert held == ["left of"]
    assert matches(Caption("", mentions[::-1], "right of"), seen)


class TestPrompts:
  @pytest.mark.parametrize("category", compositional.CATEGORIES)
  def test_are_a_function_of_category_number_and_seed(self, category):
    assert prompts(category, 20, 1) == prompts(category, 20, 1)
    assert prompts(category, 20, 1) != prompts(category, 20, 2)
    assert prompts(category, 20, 1)[:5] == prompts(category, 5, 1)

  def test_ask_for_what_their_category_says(self):
    asked = {category: prompts(category, 100, 0) for category in compositional.CATEGORIES}
    numbers = {"one": {1}, "colours": {1}, "unseen": {1}, "counting": {2, 3, 4}}
    for category, all_said in asked.items():
      assert {len(said.mentions) for said in all_said} == numbers.get(category, {2})
    assert all(re.match("(two|three|four) ", said.text) for said in asked["counting"])
    assert all(len(set(said.mentions)) == 1 for said in asked["counting"])
    assert all(said.background for said in asked["colours"])
    assert all(said.relation for said in asked["position"])
    assert all(None not in (m.size, m.place) for said in asked["attribution"] for m in said.mentions)
    assert {said.relation is None for said in asked["two"]} == {True, False}
    for category, all_said in asked.items():
      named = [(mention.colour, mention.shape) in shapes.UNSEEN for said in all_said for mention in said.mentions]
      assert set(named) == {category == "unseen"}


class TestScore:
  def test_perfect_drawer_is_right_everywhere_in_one_call(self):
    wanted = {said.text: said for category in compositional.CATEGORIES for said in prompts(category, 12, 0)}
    calls = []

    def draw(texts: list[str]) -> np.ndarray:
      calls.append(len(texts))
      return draw_truth(texts, wanted)

    assert compositional.score(draw, 12, 0) == dict.fromkeys(compositional.CATEGORIES, 1.0)
    assert calls == [12 * len(compositional.CATEGORIES)]

  def test_blank_pictures_score_nothing(self):
    blank = compositional.score(lambda texts: np.full((len(texts), 60, 60, 3), 250, np.uint8), 5, 0)
    assert blank == dict.fromkeys(compositional.CATEGORIES, 0.0)

  def test_verdicts_tell_what_was_asked_and_what_was_seen(self):
    scene = shapes.Scene((shapes.Object("circle", "red", "large", False, 4),), "white")
    verdicts = compositional.judge(lambda texts: np.stack([shapes.render(scene)] * len(texts)), 30, 0)
    assert len(verdicts) == 30 * len(compositional.CATEGORIES)
    for verdict in verdicts:
      assert verdict.reading == perfect(scene)
      assert verdict.right == matches(verdict.caption, perfect(scene))
    assert compositional.accuracy(verdicts)["two"] == 0

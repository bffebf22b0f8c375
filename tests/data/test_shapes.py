"""The world of shapes: what is drawn, what is said of it, and what is never shown."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import ndimage

from clipflow_jax.data import shapes, shapes_text
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError

SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
# Longest first, so that "top left" is not read as "top".
COLOUR, SHAPE, PLACE, GROUND = (
  "|".join(sorted(names, key=len, reverse=True))
  for names in (shapes.COLOURS, shapes.SHAPES, shapes.PLACES, shapes.BACKGROUNDS)
)
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLURALS = ("circles", "squares", "triangles", "diamonds", "crosses", "stars")
PLURAL = "|".join(PLURALS)


@st.composite
def scenes(draw: st.DrawFn) -> shapes.Scene:
  places = sorted(draw(st.sets(st.integers(0, 8), min_size=1, max_size=4)))
  look = st.tuples(
    st.sampled_from(shapes.SHAPES),
    st.sampled_from(list(shapes.COLOURS)),
    st.sampled_from(shapes.SIZES),
    st.booleans(),
  )
  one = draw(st.none() | look)
  things = tuple(shapes.Object(*(one or draw(look)), place) for place in places)
  return shapes.Scene(things, draw(st.sampled_from(list(shapes.BACKGROUNDS))))


def generators() -> st.SearchStrategy[np.random.Generator]:
  return st.integers(0, 2**32).map(np.random.default_rng)


def parse(text: str) -> shapes_text.Caption:
  """Reads a caption back, knowing nothing of how it was written."""
  background = re.search(rf" on a ({GROUND}) background$", text)
  body = text[: background.start()] if background else text
  look = rf"(?:(small|large) )?(outlined )?({COLOUR}) ({SHAPE})(?:e?s)?"
  phrase = re.compile(rf"(an?|two|three|four) {look}(?: at the ({PLACE}))?")
  mentions = [
    shapes_text.Mention(shape, colour, bool(outlined), size or None, shapes.PLACES.index(place) if place else None)
    for number, size, outlined, colour, shape, place in phrase.findall(body)
    for _ in range(NUMBERS[number])
  ]
  left = phrase.sub("X", body)
  relation = re.fullmatch("X (?:to the )?(left of|right of|above|below) X", left)
  assert relation or re.fullmatch("(X, )*(X and )?X", left), text
  return shapes_text.Caption(text, tuple(mentions), relation and relation[1], background[1] if background else None)


def answer(question: str, scene: shapes.Scene) -> str:
  """Answers from the scene alone; fails where the question is ambiguous."""

  def things(**wanted: object) -> list[shapes.Object]:
    return [thing for thing in scene.objects if all(getattr(thing, k) == v for k, v in wanted.items())]

  def only(**wanted: object) -> shapes.Object:
    (thing,) = things(**wanted)
    return thing

  def said(pattern: str) -> tuple[str, ...] | None:
    found = re.fullmatch(pattern, question)
    return found.groups() if found else None

  numbers = ("zero", "one", "two", "three", "four")
  if words := said(rf"what colour is the ({SHAPE})\?"):
    return only(shape=words[0]).colour
  if words := said(rf"which shape is ({COLOUR})\?"):
    return only(colour=words[0]).shape
  if words := said(rf"what colour is the shape at the ({PLACE})\?"):
    return only(place=shapes.PLACES.index(words[0])).colour
  if words := said(rf"which shape is at the ({PLACE})\?"):
    return only(place=shapes.PLACES.index(words[0])).shape
  if words := said(rf"where is the ({COLOUR}) ({SHAPE})\?"):
    return shapes.PLACES[only(colour=words[0], shape=words[1]).place]
  if words := said(rf"how many ({PLURAL}) are there\?"):
    return numbers[len(things(shape=shapes.SHAPES[PLURALS.index(words[0])]))]
  if words := said(rf"how many ({COLOUR}) ({PLURAL}) are there\?"):
    return numbers[len(things(colour=words[0], shape=shapes.SHAPES[PLURALS.index(words[1])]))]
  if words := said(rf"is there an? ({SHAPE})\?"):
    return "yes" if things(shape=words[0]) else "no"
  if words := said(rf"is there (?:a|an(?= o)) ({COLOUR}) ({SHAPE})\?"):
    return "yes" if things(colour=words[0], shape=words[1]) else "no"
  if question == "how many shapes are there?":
    return numbers[len(scene.objects)]
  assert question == "what is the background colour?"
  return scene.background


def true_of(mention: shapes_text.Mention, thing: shapes.Object) -> bool:
  look = (mention.shape, mention.colour, mention.outlined) == (thing.shape, thing.colour, thing.outlined)
  return look and mention.size in (None, thing.size) and mention.place in (None, thing.place)


class TestWorld:
  def test_held_out_pairs_share_no_colour_and_no_shape(self):
    assert len(shapes.UNSEEN) == 6
    assert len({colour for colour, _ in shapes.UNSEEN} & set(shapes.COLOURS)) == 6
    assert {shape for _, shape in shapes.UNSEEN} == set(shapes.SHAPES)

  def test_all_colours_are_far_from_each_other(self):
    palette = [*shapes.COLOURS.values(), *shapes.BACKGROUNDS.values()]
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)) >= 99

  @pytest.mark.parametrize("unseen", [False, True])
  def test_scene_holds_what_was_asked_for(self, unseen):
    rng = np.random.default_rng(0)
    for objects in (1, 2, 3, 4) * 25:
      scene = shapes.scene(rng, objects=objects, unseen=unseen)
      places = [thing.place for thing in scene.objects]
      assert len(places) == objects and places == sorted(set(places))
      assert all(((thing.colour, thing.shape) in shapes.UNSEEN) == unseen for thing in scene.objects)

  def test_identical_objects_differ_in_place_only(self):
    scene = shapes.scene(np.random.default_rng(1), objects=4, identical=True)
    assert len({(thing.shape, thing.colour, thing.size, thing.outlined) for thing in scene.objects}) == 1
    assert len({thing.place for thing in scene.objects}) == 4


class TestRendering:
  @pytest.mark.parametrize("size", [24, 60, 64, 128])
  def test_objects_stay_inside_their_cells_and_in_the_middle(self, size):
    for shape, place in itertools.product(shapes.SHAPES, range(9)):
      scene = shapes.Scene((shapes.Object(shape, "red", "large", False, place),), "white")
      image = shapes.render(scene, size)
      assert image.shape == (size, size, 3) and image.dtype == np.uint8
      rows, columns = np.nonzero((image != shapes.BACKGROUNDS["white"]).any(axis=-1))
      row, column = divmod(place, 3)
      for pixels, cell in ((rows, row), (columns, column)):
        assert round(cell * size / 3) <= pixels.min() and pixels.max() < round((cell + 1) * size / 3)
        assert (pixels.min() + pixels.max() + 1) / 2 == pytest.approx((cell + 0.5) * size / 3, abs=1)

  def test_colours_are_those_of_the_palette(self):
    scene = shapes.Scene((shapes.Object("square", "cyan", "large", False, 4),), "brown")
    image = shapes.render(scene)
    assert tuple(image[30, 30]) == shapes.COLOURS["cyan"]
    assert tuple(image[0, 0]) == shapes.BACKGROUNDS["brown"]

  @pytest.mark.parametrize("shape", shapes.SHAPES)
  @pytest.mark.parametrize("size", shapes.SIZES)
  def test_outlined_shows_the_background_within_the_same_outer_form(self, shape, size):
    filled, outlined = (shapes.mask(shape, size, hollow, 4, 60) for hollow in (False, True))
    middle = {"triangle": 11}.get(shape, 10)
    assert filled[middle, 10] == 1 and outlined[middle, 10] < 0.5
    assert np.all(outlined <= filled) and outlined.sum() > 0.3 * filled.sum()
    inside = ndimage.binary_erosion(filled > 0)
    assert np.all(outlined[(filled > 0) & ~inside] > 0)

  def test_large_is_about_twice_the_area_of_small(self):
    for shape in shapes.SHAPES:
      small, large = (shapes.mask(shape, size, False, 0, 60).sum() for size in shapes.SIZES)
      assert 1.8 < large / small < 2.2

  def test_everything_grows_with_the_picture(self):
    scene = shapes.scene(np.random.default_rng(5), objects=4)
    small, large = shapes.render(scene, 60), shapes.render(scene, 240)
    shrunk = large.reshape(60, 4, 60, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 1.5


class TestCaptions:
  @SETTINGS
  @hypothesis.given(scenes(), generators())
  def test_text_says_what_the_caption_records(self, scene, rng):
    caption = shapes_text.caption(scene, rng)
    assert parse(caption.text) == caption

  @SETTINGS
  @hypothesis.given(scenes(), generators())
  def test_every_object_is_named_and_nothing_false_is_said(self, scene, rng):
    caption = shapes_text.caption(scene, rng)
    assert caption.background in (None, scene.background)
    assert any(
      all(map(true_of, caption.mentions, things))
      and (caption.relation is None or shapes.related(things[0], caption.relation, things[1]))
      for things in itertools.permutations(scene.objects, len(caption.mentions))
      if len(things) == len(scene.objects)
    )

  @SETTINGS
  @hypothesis.given(scenes(), generators())
  def test_all_texts_are_lower_case_words_of_the_vocabulary(self, scene, rng):
    texts = [shapes_text.caption(scene, rng).text, shapes_text.describe(scene).text]
    texts += [text for pair in shapes_text.questions(scene, rng, 8) for text in pair]
    for text in texts:
      assert re.fullmatch(r"[a-z]+(,? [a-z]+)*\??", text)
      assert set(re.findall("[a-z]+", text)) <= shapes_text.WORDS
      assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)

  def test_vocabulary_is_small(self):
    assert len(shapes_text.WORDS) < 90

  @SETTINGS
  @hypothesis.given(scenes())
  def test_description_says_everything_in_reading_order(self, scene):
    description = shapes_text.describe(scene)
    assert description == shapes_text.describe(scene) == parse(description.text)
    assert description.background == scene.background
    assert [shapes.Object(m.shape, m.colour, m.size, m.outlined, m.place) for m in description.mentions] == [
      *scene.objects
    ]

  def test_relations_are_strict(self):
    def at(place: int) -> shapes.Object:
      return shapes.Object("circle", "red", "small", False, place)

    assert shapes.related(at(0), "left of", at(8)) and shapes.related(at(0), "above", at(8))
    assert shapes.related(at(8), "right of", at(0)) and shapes.related(at(8), "below", at(0))
    assert not shapes.related(at(0), "left of", at(6)) and not shapes.related(at(0), "right of", at(6))
    assert not shapes.related(at(0), "above", at(2)) and not shapes.related(at(0), "below", at(2))

  @pytest.mark.parametrize(
    "text",
    [
      "a red circle and a blue square",
      "a large red circle and a small blue square",
      "a small blue square and a large red circle",
      "a red circle at the top left and a blue square at the center",
      "a large red circle at the top left and a small blue square at the center on a gray background",
      "a red circle to the left of a blue square",
      "a red circle above a blue square",
      "a blue square below a red circle on a gray background",
    ],
  )
  def test_templates_for_two_objects(self, text):
    circle = shapes.Object("circle", "red", "large", False, 0)
    scene = shapes.Scene((circle, shapes.Object("square", "blue", "small", False, 4)), "gray")
    rng = np.random.default_rng(0)
    assert text in {shapes_text.caption(scene, rng).text for _ in range(2000)}

  @pytest.mark.parametrize(
    ("shape", "outlined", "text"),
    [
      ("cross", True, "three outlined red crosses"),
      ("circle", False, "three red circles on a white background"),
    ],
  )
  def test_identical_objects_are_counted(self, shape, outlined, text):
    scene = shapes.Scene(tuple(shapes.Object(shape, "red", "small", outlined, place) for place in (0, 4, 5)), "white")
    rng = np.random.default_rng(0)
    assert text in {shapes_text.caption(scene, rng).text for _ in range(200)}


class TestQuestions:
  @SETTINGS
  @hypothesis.given(scenes(), generators(), st.integers(0, 10))
  def test_answers_are_true_and_questions_unambiguous(self, scene, rng, n):
    asked = shapes_text.questions(scene, rng, n)
    assert len(asked) == n
    for question, said in asked:
      assert said == answer(question, scene)

  def test_kinds_are_mixed_and_yes_is_as_frequent_as_no(self):
    asked = [pair for i in range(2000) for pair in ShapesSource(questions=8)[i].questions]
    kinds = Counter(" ".join(question.split()[:2]) for question, _ in asked)
    assert set(kinds) == {"what colour", "how many", "is there", "where is", "which shape", "what is"}
    assert min(kinds.values()) > 1000
    for what in (rf"({COLOUR}) .*", SHAPE):
      presence = Counter(said for question, said in asked if re.fullmatch(rf"is there an? ({what})\?", question))
      assert presence["yes"] / presence.total() == pytest.approx(0.5, abs=0.04)
    for what in (rf"({COLOUR}) .*", PLURAL):
      numbers = Counter(said for question, said in asked if re.fullmatch(rf"how many ({what}) are there\?", question))
      assert numbers["zero"] / numbers.total() == pytest.approx(0.25, abs=0.04)
      assert set(numbers) == {"zero", "one", "two", "three", "four"}


class TestSource:
  def test_item_is_a_pure_function_of_seed_split_and_index(self):
    forward, again = ShapesSource(seed=3), ShapesSource(seed=3)
    later = {i: again[i] for i in (7, 2, 0, 5, 2_000_000_000)}
    for i, b in sorted(later.items()):
      a = forward[i]
      assert (a.id, a.captions, a.description, a.questions) == (b.id, b.captions, b.description, b.questions)
      np.testing.assert_array_equal(a.image, b.image)
      assert a.description == shapes_text.describe(forward.scene(i)).text

  def test_stream_does_not_change_between_versions(self):
    example = ShapesSource()[0]
    assert example.description == (
      "a small outlined yellow triangle at the top right and a large orange diamond at the bottom right"
      " on a black background"
    )

  def test_seeds_and_splits_are_different_streams(self):
    sources = [ShapesSource(), ShapesSource(seed=1), ShapesSource(split="test")]
    streams = [[source[i].description for i in range(50)] for source in sources]
    for a, b in itertools.combinations(streams, 2):
      assert sum(x == y for x, y in zip(a, b)) < 3

  @pytest.mark.parametrize("split", ["train", "test"])
  def test_held_out_pairs_are_neither_shown_nor_named(self, split):
    source = ShapesSource(size=24, split=split, questions=8)
    named = re.compile("|".join(rf"\b{colour} {shape}" for colour, shape in shapes.UNSEEN))
    for i in range(2000):
      example = source[i]
      texts = [*example.captions, example.description, *itertools.chain(*example.questions)]
      assert not named.search("\n".join(texts))
      assert not {(thing.colour, thing.shape) for thing in source.scene(i).objects} & shapes.UNSEEN

  def test_scenes_are_spread_as_promised(self):
    scenes = [ShapesSource().scene(i) for i in range(4000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert [counts[n] / 4000 for n in (1, 2, 3, 4)] == pytest.approx([0.4, 0.4, 0.1, 0.1], abs=0.03)
    things = [thing for scene in scenes for thing in scene.objects]
    assert np.mean([thing.outlined for thing in things]) == pytest.approx(0.12, abs=0.02)
    assert np.mean([thing.size == "large" for thing in things]) == pytest.approx(0.5, abs=0.03)
    assert max(Counter(scene.background for scene in scenes).values()) < 0.28 * 4000
    assert np.bincount([thing.place for thing in things], minlength=9).max() < 0.13 * len(things)
    pairs = Counter((thing.colour, thing.shape) for thing in things)
    assert len(pairs) == 42 and max(pairs.values()) < 1.6 * min(pairs.values())
    several = [scene for scene in scenes if len(scene.objects) > 1]
    same = [len({(t.shape, t.colour, t.size, t.outlined) for t in scene.objects}) == 1 for scene in several]
    assert np.mean(same) == pytest.approx(0.15, abs=0.03)

  def test_counts_choose_how_many_objects(self):
    source = ShapesSource(counts=(0, 0, 0, 1))
    assert {len(source.scene(i).objects) for i in range(20)} == {4}

  def test_repr_is_stable_and_names_every_choice(self):
    text = "ShapesSource(size=60, split='test', seed=2, counts=(0.5, 0.5), questions=4)"
    assert repr(ShapesSource(split="test", seed=2, counts=[0.5, 0.5])) == text
    assert len(ShapesSource()) == 2**31 - 1

  @pytest.mark.parametrize(
    "fields", [{"split": "valid"}, {"counts": (0, 0)}, {"counts": ()}, {"counts": (1,) * 5}, {"size": 8}, {"seed": -1}]
  )
  def test_impossible_choices_are_named(self, fields):
    with pytest.raises(UserError, match=rf"data\.{next(iter(fields))} is "):
      ShapesSource(**fields)

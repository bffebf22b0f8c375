from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from clipflow_jax.batch import INPUT, TARGET, Batch
from clipflow_jax.data import mixture, text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.mixture import BLOCK, DESCRIBE, Order, Part
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import UserError

SIZE = 8
PACKED = Layout(length=60, images=3, grid=2)
SHAPES = dict(kind="shapes", size=24)


class Plain:
  """n examples whose pictures and words tell which source they are of."""

  def __init__(self, n: int, letter: str = "a"):
    self.n, self.letter = n, letter

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> Example:
    said = f"{self.letter} {'x ' * (i % 5)}{i}"
    questions = ((f"{self.letter} how?", f"so {i}"),) if i % 2 else ()
    return Example(f"{self.letter}{i}", np.full((SIZE, SIZE, 3), i, np.uint8), (said,), said, questions)


@functools.cache
def make_chat() -> Chat:
  return Chat(text.train_tokenizer(["a x how? so b c 1", DESCRIBE, "draw"], 300))


def items(order: Order, n: int) -> list[tuple[int, int]]:
  return [order[i] for i in range(n)]


# The order of items.

WEIGHTS = st.lists(st.floats(0.05, 10), min_size=1, max_size=4)  # the least is above a thousandth of all


@settings(max_examples=8, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**31))
def test_every_block_holds_every_part_by_its_weight_and_takes_its_examples_in_turn(weights, seed):
  parts = [Part(Plain(7), weight=weight) for weight in weights]
  order = Order(parts, [range(len(parts))], seed)
  found = items(order, 3 * BLOCK)
  for block in range(3):
    counts = collections.Counter(part for part, _ in found[block * BLOCK :][:BLOCK])
    for part, weight in enumerate(weights):
      assert abs(counts[part] - BLOCK * weight / sum(weights)) < 1
  for part in range(len(parts)):
    own = [k for which, k in found if which == part]
    assert own == list(range(len(own)))
  assert items(Order(parts, [range(len(parts))], seed), BLOCK) == found[:BLOCK]


def test_an_item_far_away_is_found_as_fast_as_the_first():
  order = Order([Part(Plain(7), weight=3), Part(Plain(7))], [range(2)], 0)
  (part, k), share = order[4 * 10**12], (0.75, 0.25)
  assert abs(k - 4 * 10**12 * share[part]) < BLOCK


@pytest.mark.parametrize("shards", [2, 4, 8, 5])
def test_every_shard_sees_every_part_by_its_weight(shards):
  order = Order([Part(Plain(7)), Part(Plain(7))], [range(2)], 0)
  for shard in range(shards):
    share = np.mean([order[i][0] for i in range(shard, 8 * BLOCK, shards)])
    assert share == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("size", "epochs"), [(3, 2), (400, 3), (600, 1), (500, 4), (1, 1)])
def test_a_source_ends_after_its_epochs_and_its_share_goes_to_the_others(size, epochs):
  parts = [Part(Plain(size), epochs=epochs, weight=2), Part(Plain(9)), Part(Plain(9), weight=3)]
  found = items(Order(parts, [range(3)], 1), 12 * BLOCK)
  own = {part: [k for which, k in found if which == part] for part in range(3)}
  assert own[0] == list(range(size * epochs))
  for part in (1, 2):
    assert own[part] == list(range(len(own[part])))
  after = collections.Counter(part for part, _ in found[-BLOCK:])
  assert after == {1: BLOCK // 4, 2: 3 * BLOCK // 4}


def test_each_block_and_each_place_of_a_row_has_an_order_of_its_own():
  parts = [Part(Plain(7)), Part(Plain(7))]
  found = np.array([part for part, _ in items(Order(parts, [range(2)] * 2, 0), 4 * BLOCK)]).reshape(2, BLOCK, 2)
  sequences = found.swapaxes(1, 2).reshape(4, BLOCK)  # of block 0 and 1, in place 0 and 1 each
  assert all(np.mean(a == b) < 0.6 for a, b in itertools.combinations(sequences, 2))


def test_sources_end_each_in_its_own_time():
  parts = [Part(Plain(300), epochs=2, weight=2), Part(Plain(700), epochs=3), Part(Plain(9))]
  found = items(Order(parts, [range(3)], 1), 8 * BLOCK)
  own = {part: [k for which, k in found if which == part] for part in range(3)}
  assert own[0] == list(range(600)) and own[1] == list(range(2100)) and own[2] == list(range(len(own[2])))


def test_the_places_of_a_row_share_a_parts_examples_among_them():
  parts = [Part(Plain(7), role="understand"), Part(Plain(7), role="both"), Part(Plain(4), role="both", epochs=25)]
  order = Order(parts, [[0, 1, 2], [1, 2], [1, 2]], 3)
  for part, places in ((0, {0}), (1, {0, 1, 2}), (2, {0, 1, 2})):
    found = [(i % 3, k) for i, (which, k) in enumerate(items(order, 3 * BLOCK)) if which == part]
    assert {place for place, _ in found} == places
    examples = [k for _, k in found]
    assert len(set(examples)) == len(examples)
    if part == 2:
      assert sorted(examples) == list(range(100))


def test_sources_that_all_end_and_weights_too_small_are_refused():
  with pytest.raises(UserError, match=r"a, b: epochs ends every source: set one's to 0"):
    Order([Part(Plain(7), name=name, epochs=2) for name in "ab"], [range(2)], 0)
  with pytest.raises(UserError, match=r"a: weight 1e-06 is less than a 1000th of all: raise it"):
    Order([Part(Plain(7), name="a", weight=1e-6), Part(Plain(7))], [range(2)], 0)
  least = Order([Part(Plain(7), weight=1.0), Part(Plain(7), weight=BLOCK - 1.0)], [range(2)], 0)
  assert sum(part == 0 for part, _ in items(least, 2 * BLOCK)) == 2


# Settings.


def test_one_source_is_a_part_and_a_mixture_is_several_by_name():
  (one,) = mixture.make(dict(SHAPES, questions=2, role="generate"), "train")
  assert (one.source, one.role) == (ShapesSource(size=24, questions=2), "generate")
  config = ConfigDict(dict(source=SHAPES))
  config.source = dict(
    kind="mixture",
    small=dict(SHAPES, weight=2.0, describe=("what is it?", "and this?")),
    large=dict(SHAPES, seed=3, epochs=4, role="text"),
  )
  for settings_ in (config.source, json.loads(config.to_json_best_effort())["source"]):  # as a checkpoint keeps it
    large, small = mixture.make(settings_, "test")
    assert (small.name, small.weight, small.describe) == ("data.source.small", 2.0, ("what is it?", "and this?"))
    assert (large.source, large.epochs, large.role) == (ShapesSource(size=24, seed=3, split="test"), 4, "text")
    assert mixture.shown(settings_) == small.source


def test_a_model_is_asked_in_the_first_words_that_it_was_taught_in():
  assert mixture.wording({}) == mixture.wording(SHAPES) == ("{picture}{question}", "{caption}", "")
  words = dict(ask=("{question}{picture}", "{picture}{question}"), draw=("draw {caption}",))
  assert mixture.wording(dict(SHAPES, **words)) == ("{question}{picture}", "draw {caption}", "")
  drawn, read = dict(SHAPES, role="generate", draw=("{caption}!",)), dict(SHAPES, role="understand", ask=words["ask"])
  for settings_ in (dict(kind="mixture", a=drawn, b=read), ConfigDict(dict(kind="mixture", a=read, b=drawn))):
    assert mixture.wording(settings_) == ("{question}{picture}", "{caption}!", "")


def test_only_a_model_that_was_taught_edits_has_words_for_them():
  edits = dict(SHAPES, kind="shapes_edits", role="edit")
  assert mixture.wording(edits).edit == "{picture}{caption}"
  both = dict(kind="mixture", a=dict(SHAPES), b=dict(edits, edit=("{caption}{picture}",)))
  assert mixture.wording(both).edit == "{caption}{picture}"
  assert mixture.wording(dict(SHAPES, edit=("{caption}: {picture}",))).edit == "{caption}: {picture}"  # handed on


@pytest.mark.parametrize(
  ("source", "says"),
  [
    (dict(kind="mixture"), "mixture of nothing: give it sources"),
    (dict(kind="mixture", a=3), "data.source.a is no source: in a mixture each key but kind is one"),
    (dict(kind="mixture", a=dict(kind="mixture")), "data.source.a is no source"),
    (dict(kind="mixture", a=dict(kind="paint")), "data.source.a: data.kind is 'paint'"),
    (dict(kind="mixture", a=dict(SHAPES, colour=3)), "data.source.a: data.colour is no setting"),
    (dict(kind="mixture", a=dict(SHAPES, role="paint")), "data.source.a: role is 'paint'"),
    (dict(SHAPES, weight=0.0), "data.source: weight is 0.0: give a number above 0"),
    (dict(SHAPES, role="paint"), "role is 'paint': choose one of both, understand, generate, edit, text"),
    (dict(SHAPES, epochs=1.5), "epochs is 1.5: give a whole number"),
    (dict(SHAPES, epochs=-1), "epochs is -1: give a whole number"),
    (dict(SHAPES, describe="what?"), "describe is 'what?': give a list of phrasings"),
    (dict(SHAPES, describe=()), "describe is ()"),
    (
      dict(SHAPES, ask=("{question}",)),
      "ask is ('{question}',): give a list of phrasings, each with {picture} and {que",
    ),
    (dict(SHAPES, ask=("{picture}{picture}{question}",)), "ask is ('{picture}{picture}{question}',)"),
    (dict(SHAPES, draw=("draw it",)), "draw is ('draw it',): give a list of phrasings, each with {caption}"),
  ],
)
def test_settings_that_do_not_fit_are_refused_by_the_name_of_their_source(source, says):
  with pytest.raises(UserError) as error:
    mixture.make(source, "train")
  assert says in str(error.value) and "\n" not in str(error.value)
  assert str(error.value).count("data.source") <= 1  # its name is told once


def test_cached_features_are_of_their_source_wherever_it_lies_and_however_it_is_put():
  cached = dict(kind="folder", path="/then", size=24)
  features = types.SimpleNamespace(folder="cache", manifest=dict(request=dict(source=cached)))
  now = dict(cached, path="/now", weight=2.0, describe=("what is it?",))
  mixture._check_cached(features, "data.source", now)
  with pytest.raises(UserError, match="data.source.size is 48, but cache was cached with 24: set it so"):
    mixture._check_cached(features, "data.source", dict(now, size=48))


def test_a_split_that_is_none_is_refused():
  with pytest.raises(UserError, match="data.split is 'valid': choose one of train, test"):
    mixture.make(SHAPES, "valid")


def test_the_first_texts_are_of_all_parts_in_turn_without_the_bad_ones():
  class Half(Plain):
    def __getitem__(self, i):
      if i % 2:
        raise BadRecord(str(i), "bad")
      return super().__getitem__(i)

  parts = [Part(Plain(2, "a")), Part(Half(9, "b"))]
  found = [("a 0",) * 2, ("b 0",) * 2, ("a x 1", "a x 1", "a how?", "so 1"), ("b x x 2",) * 2]
  assert list(mixture.texts(parts, 6)) == found
  assert len(list(mixture.texts(parts, 100))) == 2 + 5


# Streams.


def pipeline(*parts: Part, **fields) -> Pipeline:
  defaults = dict(layout=PACKED, batch_size=8, shards=8, tasks={"draw": 1.0, "converse": 1.0}, bins=2, drop_text=0.0)
  return Pipeline(parts=parts, chat=make_chat(), **defaults | fields)


def same(a: Batch, b: Batch) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


def row(batch: Batch, which) -> Batch:
  return jax.tree.map(lambda leaf: leaf[which], batch)


@settings(max_examples=3, deadline=None)
@given(
  weights=st.lists(st.floats(0.1, 5), min_size=2, max_size=3),
  recipe=st.sampled_from([(), ("converse", "draw", "draw")]),
  epochs=st.sampled_from([0, 1]),
  seed=st.integers(0, 1000),
  step=st.integers(0, 5),
)
def test_packed_mixtures_are_one_stream_on_any_number_of_hosts_and_after_any_stop(weights, recipe, epochs, seed, step):
  roles = ("both", "understand", "generate")
  parts = [Part(Plain(40 + i, "abc"[i]), weight=weight, role=roles[i]) for i, weight in enumerate(weights)]
  parts.append(Part(Plain(9, "d"), epochs=epochs))
  made = pipeline(*parts, row=recipe, seed=seed)
  whole = list(itertools.islice(made.batches(BadRecords(None, 0.0)), step + 2))
  before = [made.batches(BadRecords(None, 0.0), shards) for shards in (range(4), range(4, 8))]
  state: dict = {}
  for stream in before:
    for batch in itertools.islice(stream, step):
      assert len(batch.tokens) == 4
    state |= stream.get_state()
  state = json.loads(json.dumps(state))
  for hosts in (1, 2, 4, 8):
    for host in {0, hosts - 1}:
      own = range(host * 8 // hosts, (host + 1) * 8 // hosts)
      stream = made.batches(BadRecords(None, 0.0), own)
      stream.set_state(state)
      assert same(next(stream), row(whole[step], list(own)))
  assert same(next(before[0]), row(whole[step], range(4)))


def said(batch: Batch) -> list[tuple[str, int]]:
  """The words of each example and the role of its picture, 0 where it has none."""
  found = []
  for i in range(len(batch.tokens)):
    for segment in range(1, batch.segments[i].max() + 1):
      words = batch.tokens[i][(batch.segments[i] == segment) & (batch.image_index[i] < 0)]
      roles = batch.image_roles[i][batch.image_segments[i] == segment]
      found.append((make_chat().tokenizer.decode(words.tolist(), skip_special_tokens=True).strip(), int(roles.sum())))
  return found


def test_a_row_mixes_sources_each_in_its_role():
  parts = (
    Part(Plain(50, "a"), role="understand"),
    Part(Plain(50, "b"), role="generate"),
    Part(Plain(9, "c"), role="text"),
  )
  batches = list(itertools.islice(pipeline(*parts).batches(BadRecords(None, 0.0)), 3))
  found = collections.Counter(
    (words.removeprefix(DESCRIBE).split()[0], role) for b in batches for words, role in said(b)
  )
  assert found.keys() == {("a", INPUT), ("b", TARGET), ("c", 0)}
  mixed = [{w.removeprefix(DESCRIBE).split()[0] for w, _ in said(row(b, [i]))} for b in batches for i in range(8)]
  assert max(map(len, mixed)) == 3  # examples of all three packed into one row


def test_a_recipe_takes_each_task_from_the_sources_of_that_role():
  parts = Part(Plain(50, "a"), role="understand"), Part(Plain(50, "b")), Part(Plain(9, "c"), role="text")
  made = pipeline(*parts, row=("converse", "draw", "talk"), tasks={}, layout=Layout(90, 2, 2))
  for batch in itertools.islice(made.batches(BadRecords(None, 0.0)), 2):
    assert [role for _, role in said(batch)] == [INPUT, TARGET, 0] * 8
    letters = [words.removeprefix(DESCRIBE).split()[0] for words, _ in said(batch)]
    assert set(letters[0::3]) == {"a", "b"} and set(letters[1::3]) == {"b"} and set(letters[2::3]) == {"c"}


def test_a_source_speaks_by_its_own_phrasings():
  parts = (
    Part(Plain(50, "a"), describe=("tell:", "say:"), draw=("draw {caption}", "{caption}, drawn")),
    Part(Plain(50, "b"), draw=("so {caption}",), role="generate"),
  )
  made = pipeline(*parts, drop_text=0.2)
  words = [w for b in itertools.islice(made.batches(BadRecords(None, 0.0)), 6) for w, _ in said(b)]
  starts = {w.split()[0] if not w.startswith("a how") else "question" for w in words if w}
  assert starts == {"tell:", "say:", "draw", "a", "so", "question"}, starts
  assert any(w.endswith(", drawn") for w in words)
  assert "" in words  # nothing is put around the empty prompt


@pytest.mark.parametrize(
  ("role", "fields", "says"),
  [
    ("generate", dict(tasks={"converse": 1.0}), r"data.source: its role generate is for caption, draw, of which"),
    ("text", dict(row=("draw",), tasks={}), r"its role text is for talk, of which data.tasks and data.row want none"),
    ("both", dict(row=("draw", "talk"), tasks={}), r"data.row wants talk, for which no source has a role"),
    ("both", dict(tasks={"paint": 1.0}), r"name, some of caption, draw, converse, ask, talk, edit, no other"),
  ],
)
def test_roles_that_the_stage_has_no_use_for_are_refused(role, fields, says):
  with pytest.raises(UserError, match=says):
    pipeline(Part(Plain(5), role=role), **fields)


class Cached(Plain):
  """Examples whose pictures are features bf16[4,5] already."""

  def __getitem__(self, i: int) -> Example:
    return dataclasses.replace(super().__getitem__(i), image=np.full((4, 5), i, jnp.bfloat16))


@pytest.mark.parametrize("fields", [dict(), dict(row=("converse", "draw"), tasks={}), dict(layout=Layout(60, 1, 2))])
def test_cached_features_are_packed_as_pictures_are(fields):
  roles = ("both",) if "row" in fields else ("both", "text")
  made = [pipeline(*(Part(source(50), role=role) for role in roles), **fields) for source in (Plain, Cached)]
  pixels, cached = (next(one.batches(BadRecords(None, 0.0))) for one in made)
  assert cached.images is None and pixels.features is None
  assert cached.features.dtype == jnp.bfloat16 and cached.features.shape[2:] == (4, 5)
  np.testing.assert_array_equal(cached.features[..., 0, 0].astype(np.uint8), pixels.images[..., 0, 0, 0])
  assert same(dataclasses.replace(cached, features=None), dataclasses.replace(pixels, images=None))

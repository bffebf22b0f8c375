from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from clipflow_jax.batch import INPUT, TARGET, Batch
from clipflow_jax.data import text
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Dialogue, Example
from clipflow_jax.data.mixture import DESCRIBE, Part
from clipflow_jax.data.pipeline import TASKS, Pipeline
from clipflow_jax.data.sequence import Layout
from clipflow_jax.data.shapes_edits import ShapesEditsSource
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.sources import FolderSource
from clipflow_jax.data.text import IMAGE, Chat
from clipflow_jax.errors import UserError

SHAPES = ShapesSource(size=24, counts=(1.0,), questions=1)
ONE = Layout(length=64, images=1, grid=3)
PACKED = Layout(length=160, images=3, grid=3)


@dataclasses.dataclass
class Constant:
  """The same two captions under every index."""

  count: int = 1000

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, i: int) -> Example:
    return Example(str(i), np.full((24, 24, 3), i % 256, np.uint8), ("one", "two"), "all", (("how?", "so"),))


@pytest.fixture(scope="module")
def chat() -> Chat:
  texts = [words for i in range(100) for words in (*SHAPES[i].captions, SHAPES[i].description, *SHAPES[i].questions[0])]
  return Chat(text.train_tokenizer([*texts, DESCRIBE, "one", "two", "all", "how?", "so"], 400))


def make(chat: Chat, source=SHAPES, **fields) -> Pipeline:
  defaults = dict(
    parts=(Part(source),), chat=chat, layout=ONE, batch_size=4, tasks={"draw": 1.0, "caption": 1.0}, seed=1
  )
  return Pipeline(**defaults | fields)


def stream(pipeline: Pipeline):
  return pipeline.batches(BadRecords(None, 0.0))


def take(iterator, n: int) -> list[Batch]:
  return list(itertools.islice(iterator, n))


def same(a: list[Batch], b: list[Batch]) -> bool:
  pairs = [(vars(x), vars(y)) for x, y in zip(a, b, strict=True)]
  return all(np.array_equal(x[name], y[name]) for x, y in pairs for name in x if x[name] is not None)


LAYOUTS = {
  "alone": dict(layout=ONE),
  "packed": dict(layout=PACKED, bins=2, tasks={"draw": 1.0, "converse": 1.0}),
  "by recipe": dict(layout=PACKED, row=("converse", "draw", "draw"), tasks={}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_stream_is_a_pure_function_of_the_seed(chat, name):
  pipeline = make(chat, **LAYOUTS[name])
  first = take(stream(pipeline), 4)
  assert same(first, take(stream(dataclasses.replace(pipeline, threads=5)), 4))
  assert not same(first, take(stream(dataclasses.replace(pipeline, seed=2)), 4))
  assert not same(first[:1], first[1:2])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_stream_resumes_where_its_state_says(chat, name, before):
  pipeline = make(chat, **LAYOUTS[name])
  whole = take(stream(pipeline), before + 4)
  interrupted = stream(pipeline)
  take(interrupted, before)
  state = json.loads(json.dumps(interrupted.get_state()))  # as a checkpoint keeps it
  resumed = stream(pipeline)
  resumed.set_state(state)
  assert same(take(resumed, 4), whole[before:])
  assert same(take(interrupted, 4), whole[before:])  # asking for the state moves nothing


def test_a_template_that_cannot_show_a_talk_is_told_before_anything_is_read():
  tokenizer = text.train_tokenizer(["one two"], 300)
  tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
  make(Chat(tokenizer))
  with pytest.raises(UserError, match="chat template rewrites earlier turns"):
    make(Chat(tokenizer), tasks={"draw": 1.0, "converse": 1.0})


@pytest.mark.parametrize(
  ("name", "digest"),
  [("alone", "3e003b55a496a66f"), ("packed", "1be4be584bc015c9"), ("by recipe", "e2f310aefd28f3c7")],
)
def test_the_stream_is_that_of_earlier_releases_to_the_bit(name, digest):
  chat = Chat(text.train_tokenizer(["one two all how? so", DESCRIBE], 300))
  found = hashlib.sha256()
  for batch in take(stream(make(chat, Constant(), **LAYOUTS[name])), 4):
    for leaf in jax.tree.leaves(batch):
      found.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  assert found.hexdigest()[:16] == digest, "a run that resumes would go on with other batches"


def test_batches_have_the_layouts_shape(chat):
  (batch,) = take(stream(make(chat, **LAYOUTS["packed"])), 1)
  assert batch.tokens.shape == (4, PACKED.length)
  assert batch.images.shape == (4, PACKED.images, 24, 24, 3)
  assert batch.segments.max() == 3  # packing does pack
  used = (batch.segments > 0).mean()
  assert used > 0.3, used  # three short examples, whose pictures fill the row before their words do


def test_packed_rows_have_no_more_targets_than_are_noised_and_lose_no_example(chat):
  def pictures(targets: int) -> tuple[list[int], list[int]]:
    """Of 30 batches how many are targets of each row, and which there are."""
    layout = dataclasses.replace(PACKED, targets=targets)
    batches = take(stream(make(chat, source=Constant(40), **LAYOUTS["packed"] | dict(layout=layout))), 30)
    roles, images = (np.concatenate([getattr(b, name) for b in batches]) for name in ("image_roles", "images"))
    return ((roles & TARGET) > 0).sum(axis=1).tolist(), images[roles > 0][:, 0, 0, 0].tolist()

  (free, before), (bounded, after) = pictures(0), pictures(1)
  assert max(free) > 1 and max(bounded) == 1
  assert set(before[:200]) == set(after[:200]) == set(range(40))  # the five epochs that these are, each of all


def test_an_epoch_shows_every_record_once(chat, tmp_path):
  folder = write_folder(tmp_path, 12)
  source = FolderSource(folder, size=24, split="all")
  batches = take(stream(make(chat, source=source, tasks={"caption": 1.0}, batch_size=6)), 4)
  epochs = [np.concatenate([b.images[:, 0, 0, 0, 0] for b in batches[i : i + 2]]).tolist() for i in (0, 2)]
  assert [sorted(epoch) for epoch in epochs] == [[10 * i for i in range(12)]] * 2
  assert epochs[0] != epochs[1]  # each in its own order


# Tasks.


def kind(chat: Chat, tokens: np.ndarray, index: np.ndarray, role: int) -> str:
  """What an example of one picture asks for."""
  words = chat.tokenizer.decode(tokens[index < 0].tolist(), skip_special_tokens=True).strip()
  if role == TARGET:
    return f"drawn of {words}" if words else "drawn of nothing"
  assert role == INPUT
  return "read" if (index >= 0).any() else "captioned"


def count(chat: Chat, n: int, **fields) -> collections.Counter:
  """The kinds of the first n examples, each alone in its row."""
  pipeline = make(chat, source=Constant(), batch_size=100, **fields)
  counts: collections.Counter = collections.Counter()
  for batch in take(stream(pipeline), n // 100):
    for row, used in enumerate(batch.segments > 0):
      counts[kind(chat, batch.tokens[row, used], batch.image_index[row, used], batch.image_roles[row, 0])] += 1
  return counts


def test_tasks_come_by_their_weights(chat):
  counts = count(chat, 2000, tasks={"draw": 1.0, "caption": 2.0, "converse": 5.0}, drop_text=0.0)
  assert counts["captioned"] / 2000 == pytest.approx(2 / 8, abs=0.03)
  assert counts["read"] / 2000 == pytest.approx(5 / 8, abs=0.03)
  assert counts["drawn of nothing"] == 0


def test_text_is_dropped_from_a_fraction_of_drawings_and_captions_are_taken_evenly(chat):
  counts = count(chat, 2000, tasks={"draw": 1.0}, drop_text=0.25)
  assert counts["drawn of nothing"] / 2000 == pytest.approx(0.25, abs=0.03)
  assert counts["drawn of one"] / counts["drawn of two"] == pytest.approx(1.0, abs=0.15)
  assert counts.total() == 2000


def test_only_drawings_lose_their_text(chat):
  assert count(chat, 100, tasks={"caption": 1.0}, drop_text=1.0) == {"captioned": 100}


def test_a_conversation_is_the_description_or_as_often_the_questions(chat):
  pipeline, found = make(chat, source=Constant()), collections.Counter()
  for i in range(100):
    example = pipeline.example((0, i), "converse", np.random.default_rng(i))
    found[chat.tokenizer.decode(example["tokens"][example["image_index"] < 0].tolist())] += 1
  describe, ask = f"{DESCRIBE}<|assistant|> all<|end|>", "how?<|assistant|> so<|end|>"
  assert found.keys() == {f"<|begin|><|user|>{IMAGE} {only}" for only in (describe, ask)}
  assert min(found.values()) == pytest.approx(50, abs=20)


def test_questions_come_in_any_order():
  several = dataclasses.replace(Constant()[0], description="", questions=tuple((f"{i}?", f"{i}") for i in range(3)))
  told = (TASKS["converse"](several, Part(Constant()), np.random.default_rng(i), 0.0) for i in range(40))
  assert len({tuple(answer for role, answer in one.turns if role == "assistant") for one in told}) == 6


def test_one_question_is_asked_in_the_words_of_its_source_or_the_description_where_there_is_none(chat):
  several = dataclasses.replace(Constant()[0], questions=(("how?", "so"), ("what?", "that")))
  silent = dataclasses.replace(several, questions=())
  part = Part(Constant(), ask=("{question}{picture}",))
  found = collections.Counter(
    TASKS["ask"](example, part, np.random.default_rng(i), 0.0).turns for i in range(60) for example in (several, silent)
  )
  expected = {"how?": "so", "what?": "that", DESCRIBE: "all"}
  assert found.keys() == {(("user", asked + IMAGE), ("assistant", told)) for asked, told in expected.items()}
  assert min(found.values()) == pytest.approx(30, abs=15)


HELD = (("system", "be brief"), ("user", "is it?"), ("assistant", "yes"), ("user", "why?"), ("assistant", "so"))


def test_a_conversation_is_learned_in_its_order_and_its_answers_are_no_descriptions(chat):
  image = Constant()[0].image
  example = Example("held", image, dialogue=Dialogue(HELD, image[None]))
  captioned = dataclasses.replace(example, captions=("one",), description="all")
  part = Part(Constant(), ask=("{question}{picture}",))

  def turns(task: str, example: Example) -> collections.Counter:
    return collections.Counter(TASKS[task](example, part, np.random.default_rng(i), 0.0).turns for i in range(60))

  shown = (HELD[0], ("user", f"is it?{IMAGE}"), *HELD[2:])
  assert turns("converse", example) == {shown: 60}
  described = (("user", DESCRIBE + IMAGE), ("assistant", "all"))
  found = turns("converse", captioned)
  assert found.keys() == {shown, described} and min(found.values()) == pytest.approx(30, abs=12)
  found = turns("ask", example)
  assert found.keys() == {shown[:3], shown} and min(found.values()) == pytest.approx(30, abs=12)
  assert turns("talk", example) == {HELD: 60}


def test_a_conversation_has_its_pictures_where_it_says(chat):
  images = np.stack([np.full((24, 24, 3), i, np.uint8) for i in range(3)])
  turns = (("user", "<image> or <image>?"), ("assistant", "both"), ("user", "and\n<image>"), ("assistant", "no"))
  example = Example("held", images[0], dialogue=Dialogue(turns, images))
  part = Part(Constant())
  made = TASKS["converse"](example, part, np.random.default_rng(0), 0.0)
  assert made.turns[0] == ("user", f"{IMAGE} or {IMAGE}?") and made.turns[2] == ("user", f"and\n{IMAGE}")
  assert made.roles == (INPUT,) * 3
  np.testing.assert_array_equal(made.images, images)
  asked = [TASKS["ask"](example, part, np.random.default_rng(i), 0.0) for i in range(20)]
  assert {(len(one.turns), len(one.images)) for one in asked} == {(2, 2), (4, 3)}
  talked = TASKS["talk"](example, part, np.random.default_rng(0), 0.0)
  assert (talked.turns[0], len(talked.images)) == (("user", "or ?"), 0)


def test_a_conversation_without_a_caption_is_not_drawn_from(chat):
  example = Example("held", Constant()[0].image, dialogue=Dialogue(HELD, Constant()[0].image[None]))
  for task in ("draw", "caption"):
    for i in range(20):  # nor in the place of an empty text
      with pytest.raises(BadRecord, match='held: no caption: .*role="understand"'):
        TASKS[task](example, Part(Constant()), np.random.default_rng(i), 0.5)


def test_an_edit_is_read_and_drawn_in_one_example_and_loses_words_and_picture_together(chat):
  example = dataclasses.replace(Constant()[7], before=np.full((24, 24, 3), 9, np.uint8))
  part = Part(Constant(), role="edit", edit=("{caption}: {picture}",))
  made = [TASKS["edit"](example, part, np.random.default_rng(i), 0.25) for i in range(400)]
  whole, bare = ([one for one in made if len(one.roles) == n] for n in (2, 1))
  assert {one.turns for one in whole} == {(("user", f"{c}: {IMAGE}"), ("assistant", IMAGE)) for c in ("one", "two")}
  assert {one.roles for one in whole} == {(INPUT, TARGET)}
  assert [int(image[0, 0, 0]) for image in whole[0].images] == [9, 7]
  assert {(one.turns, one.roles) for one in bare} == {((("user", ""), ("assistant", IMAGE)), (TARGET,))}
  assert len(bare) / 400 == pytest.approx(0.25, abs=0.06)


def test_a_target_sees_the_picture_that_it_is_made_of(chat):
  source = ShapesEditsSource(size=24, counts=(1.0,))
  edits = dict(parts=(Part(source, role="edit"),), row=("edit",), tasks={}, drop_text=0.0)
  batch = next(stream(make(chat, layout=PACKED, **edits)))
  for row in range(4):
    assert batch.image_roles[row].tolist() == [INPUT, TARGET, 0] and batch.image_segments[row].tolist() == [1, 1, 0]
    picture = batch.image_index[row] >= 0
    assert picture.sum() == 9 and batch.order[row, picture].max() < batch.image_order[row, 1]
    assert not np.array_equal(batch.images[row, 0], batch.images[row, 1])


def test_an_edit_without_the_picture_before_it_is_a_bad_record(chat):
  pipeline = make(chat, parts=(Part(Constant(), role="edit"),), tasks={"edit": 1.0}, layout=PACKED)
  with pytest.raises(BadRecord, match="0: no picture before it: what is to be edited needs 'before'"):
    pipeline.example((0, 0), "edit", np.random.default_rng(0))


def test_a_row_of_one_example_is_drawn_from_an_endless_set(chat):
  batch = next(stream(make(chat, source=Constant(), row=("draw",), tasks={}, layout=PACKED, batch_size=2)))
  assert (batch.segments.max(axis=1) == 1).all()


def test_every_row_holds_the_examples_of_its_recipe_in_order(chat):
  recipe = dict(row=("converse", "draw", "caption"), tasks={}, drop_text=0.0, layout=PACKED, batch_size=10)
  for batch in take(stream(make(chat, source=Constant(), **recipe)), 3):
    for row in range(10):
      kinds = []
      for segment in range(1, batch.segments[row].max() + 1):
        own, (role,) = batch.segments[row] == segment, batch.image_roles[row, batch.image_segments[row] == segment]
        kinds.append(kind(chat, batch.tokens[row, own], batch.image_index[row, own], role))
      assert [one.split(" of ")[0] for one in kinds] == ["read", "drawn", "captioned"]


NO_TASKS = [({}, ()), ({"draw": 0.0}, ()), ({"draw": 2.0, "ask": -1.0}, ()), ({"paint": 1.0}, ()), ({}, ("paint",))]


@pytest.mark.parametrize(("tasks", "row"), NO_TASKS)
def test_tasks_that_are_no_tasks_are_refused(chat, tasks, row):
  with pytest.raises(UserError, match="data.tasks .* data.row .* caption, draw, converse"):
    make(chat, tasks=tasks, row=row)


@pytest.mark.parametrize(
  "fields", [dict(seed=-1), dict(seed=2**32), dict(bins=0), dict(threads=-1), dict(batch_size=0)]
)
def test_numbers_that_make_no_sense_are_refused(chat, fields):
  ((name, value),) = fields.items()
  with pytest.raises(UserError, match=rf"{name} is {value}: give "):
    make(chat, **fields)
  assert take(stream(make(chat, seed=2**32 - 1, parts=(Part(SHAPES, "a"), Part(SHAPES, "b")))), 1)  # the last there is


def test_a_recipe_with_more_pictures_than_a_row_has_room_for_is_refused(chat):
  with pytest.raises(UserError, match=r"data.row take 4 pictures, data.images_per_row is 3: raise it to 4, or shorten"):
    make(chat, row=("converse", "draw", "draw", "caption"), tasks={}, layout=PACKED)


@pytest.mark.parametrize("fields", [dict(tasks={"caption": 1.0, "draw": 1.0}), dict(tasks={}, row=("converse",))])
def test_a_tokenizer_for_captions_alone_is_refused_for_other_tasks_before_the_first_record(chat, fields):
  captions = Chat(chat.tokenizer)
  captions.image = None
  assert take(stream(make(captions, tasks={"caption": 1.0})), 1)[0].tokens.any()
  with pytest.raises(UserError, match="for captions alone: start from a run or from a language model"):
    make(captions, **fields)


# Bad records.


def write_folder(path: Path, n: int, corrupt: tuple[int, ...] = (), long: tuple[int, ...] = ()) -> Path:
  """n pictures of grey level 10 i with captions; some are no pictures, some have captions that fit no row."""
  for i in range(n):
    Image.new("L", (24, 24), 10 * i).save(path / f"{i}.png")
  for i in corrupt:
    (path / f"{i}.png").write_bytes((path / f"{i}.png").read_bytes()[:-30])
  lines = [{"file": f"{i}.png", "caption": "one " * (100 if i in long else 1)} for i in range(n)]
  (path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_bad_records_are_counted_named_and_skipped(chat, tmp_path):
  folder = write_folder(tmp_path, 20, corrupt=(3, 11), long=(7,))
  source = FolderSource(folder, size=24, split="all")
  bad = BadRecords(tmp_path / "out" / "data_errors.jsonl", 0.2)
  pipeline = make(chat, source=source, batch_size=17, tasks={"draw": 1.0}, drop_text=0.0)
  batches = take(pipeline.batches(bad), 2)
  epoch = [10 * i for i in range(20) if i not in (3, 7, 11)]
  for batch in batches:  # 17 good ones are an epoch
    assert sorted(batch.images[:, 0, 0, 0, 0].tolist()) == epoch
  rows = [json.loads(line) for line in (tmp_path / "out" / "data_errors.jsonl").read_text().splitlines()]
  assert {Path(row["name"]).name: row["kind"] for row in rows} == {
    "3.png": "cannot be decoded",
    "11.png": "cannot be decoded",
    "7.png": "too long",
  }
  assert bad.bad >= 5 and bad.seen >= 39  # some read ahead
  assert bad.bad / bad.seen == pytest.approx(3 / 20, abs=0.05)


def test_of_a_caption_for_clip_that_is_too_long_what_fits_is_kept(chat, tmp_path):
  source = FolderSource(write_folder(tmp_path, 2, long=(0, 1)), size=24, split="all")
  (batch,) = take(stream(make(chat, source=source, batch_size=2, tasks={"caption": 1.0})), 1)
  assert (batch.segments == 1).all() and (batch.tokens[:, -1] == chat.eos).all()
  assert (batch.tokens[:, 1:-1] == chat.encode("one")).all()


def test_only_what_fits_no_row_is_called_too_long(chat):
  pipeline = make(chat, source=Constant())
  with pytest.raises(BadRecord) as error:
    dataclasses.replace(pipeline, layout=Layout(8, 1, 3)).example((0, 1), "converse", np.random.default_rng(0))
  assert error.value.kind == "too long"
  chat = Chat(text.train_tokenizer(["one two"], 300))
  chat.tokenizer.chat_template = "{{ raise_exception('no more') if messages | length < 3 }}" + text.CHAT_TEMPLATE
  with pytest.raises(BadRecord, match="cannot be told: the tokenizer's chat template .* no more") as error:
    make(chat).example((0, 1), "converse", np.random.default_rng(0))
  assert error.value.kind == "cannot be told"


def test_too_many_bad_records_stop_the_stream_with_their_names(chat, tmp_path):
  folder = write_folder(tmp_path, 20, corrupt=tuple(range(8)))
  source = FolderSource(folder, size=24, split="all")
  bad = BadRecords(tmp_path / "data_errors.jsonl", 0.1)
  batches = make(chat, source=source, tasks={"caption": 1.0}).batches(bad)
  with pytest.raises(UserError, match=r"records are bad .*cannot be decoded.*\.png") as error:
    take(batches, 100)
  assert "\n" not in str(error.value)


# Shards.


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_shards_together_are_the_stream_whoever_reads_them(chat, name):
  pipeline = make(chat, **LAYOUTS[name], shards=4)
  whole = take(stream(pipeline), 4)
  readers = [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 1, 2), (2, 3)]  # the last ones share a shard
  for own in readers:
    parts = {}
    for shards in own:
      batches = take(pipeline.batches(BadRecords(None, 0.0), shards), 4)
      parts |= {s: [rows(b, slice(i, i + 1)) for b in batches] for i, s in enumerate(shards)}
    for shard, part in parts.items():
      assert same(part, [rows(batch, slice(shard, shard + 1)) for batch in whole])


def rows(batch: Batch, which: slice) -> Batch:
  return jax.tree.map(lambda leaf: leaf[which], batch)


def test_shards_share_the_records_of_an_epoch_among_them(chat, tmp_path):
  folder = write_folder(tmp_path, 12)
  source = FolderSource(folder, size=24, split="all")
  batches = take(stream(make(chat, source=source, tasks={"caption": 1.0}, batch_size=6, shards=3)), 4)
  epochs = [np.concatenate([b.images[:, 0, 0, 0, 0] for b in batches[i : i + 2]]).tolist() for i in (0, 2)]
  assert [sorted(epoch) for epoch in epochs] == [[10 * i for i in range(12)]] * 2


def test_a_stream_goes_on_with_other_readers_from_the_states_of_all_shards(chat):
  pipeline = make(chat, **LAYOUTS["packed"], shards=4)
  whole = take(stream(pipeline), 5)
  state: dict = {}
  for shards in [(0, 1), (2, 3)]:
    part = pipeline.batches(BadRecords(None, 0.0), shards)
    take(part, 2)
    state |= part.get_state()
  state = json.loads(json.dumps(state))
  for shards in [(0, 1, 2, 3), (1,), (2, 3)]:
    part = pipeline.batches(BadRecords(None, 0.0), shards)
    part.set_state(state)
    assert same(take(part, 3), [rows(batch, slice(shards[0], shards[-1] + 1)) for batch in whole[2:]])


def test_another_number_of_shards_is_another_stream_and_is_refused(chat):
  first, second = (stream(make(chat, shards=shards)) for shards in (2, 4))
  with pytest.raises(UserError, match=r"has the shards 0 of 2, 1 of 2, ..., but not 0 of 4: set data.shards"):
    second.set_state(first.get_state())


def test_a_source_that_has_lost_or_gained_records_since_is_refused(chat):
  def of(count: int):
    return stream(make(chat, source=Constant(count), tasks={"caption": 1.0}))

  state = of(12).get_state()
  of(12).set_state(state)  # as it was
  with pytest.raises(UserError, match=r"run has 12 records of data.source, which now has 11: in which order"):
    of(11).set_state(state)


def test_where_the_data_stood_in_the_form_of_another_release_is_refused(chat):
  batches = stream(make(chat))
  with pytest.raises(UserError, match="in another form than this release's where the data stand .* or begin another"):
    batches.set_state(batches.get_state() | {"0 of 1": {"next_index": 3}})


@pytest.mark.parametrize("shards", [0, 3, 8])
def test_shards_that_do_not_divide_the_batch_are_refused(chat, shards):
  with pytest.raises(UserError, match=f"data.shards {shards} must divide data.batch_size 4"):
    make(chat, shards=shards)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data import images, mixture, sequence
from clipflow_jax.data.example import Example
from clipflow_jax.data.mixture import Part
from clipflow_jax.data.pipeline import TASKS
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.text import IMAGE
from clipflow_jax.errors import UserError
from clipflow_jax.inference import batching, text
from clipflow_jax.inference.image import Sampling
from clipflow_jax.inference.messages import conversation
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.models.clipflow import ClipFlow as Model
from clipflow_jax.training import checkpoint, stages
from tests import tiny, tiny_runs
from tests.tiny_runs import SIZE

ONE = ShapesSource(size=SIZE)
T, C = 4, tiny.CHANNELS
SHORT = ["red", "a star", "blue"]
LONG = "a large outlined yellow triangle left of a small filled purple hexagon on a grey background"


@pytest.fixture(scope="module")
def loaded(trained) -> ClipFlow:
  return ClipFlow.from_checkpoint(trained)


@pytest.fixture(scope="module")
def model(loaded) -> ClipFlow:
  return tiny_runs.lively(loaded)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> int:
  """The largest difference of two pictures in levels."""
  return int(np.abs(a.astype(int) - b.astype(int)).max())


# Loading.


def test_a_checkpoint_is_loaded_with_its_average(loaded, trained):
  read = checkpoint.load(trained, ("ema", "trained"))
  assert loaded.step == 2 and loaded.image_size == SIZE
  ema, raw = (read.state[name]["decoder"]["head"]["kernel"] for name in ("ema", "trained"))
  np.testing.assert_array_equal(loaded.params["decoder"]["head"]["kernel"], ema)
  assert not np.array_equal(ema, raw)
  assert set(loaded.params) >= {"clip_model", "language_model", "flow_head", "decoder", "statistics"}


def test_a_workdir_its_checkpoints_one_step_and_a_run_of_stages_are_the_same(loaded, trained, tmp_path):
  (tmp_path / "decoder").symlink_to(trained)
  (tmp_path / stages.ORDER).write_text(json.dumps(["decoder", "generation"]))
  for path in (trained / "checkpoints", trained / "checkpoints" / "2", str(tmp_path)):
    again = ClipFlow.from_checkpoint(path)
    assert again.step == 2
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
  assert again.tokenizer.encode(LONG) == loaded.tokenizer.encode(LONG)


# Drawing.


def test_pictures_are_drawn(model):
  drawn = model.draw(SHORT)
  assert (drawn.shape, drawn.dtype) == ((3, SIZE, SIZE, 3), np.uint8)
  features = model.draw_features(SHORT)
  assert (features.shape, features.dtype) == ((3, T, C), np.float32)
  assert np.isfinite(features).all()
  assert difference(model.decode(features), drawn) <= 1
  anything = model.draw_unconditional(2)
  assert (anything.shape, anything.dtype) == ((2, SIZE, SIZE, 3), np.uint8)
  np.testing.assert_array_equal(anything, model.draw(["", ""]))


def test_a_picture_is_the_same_alone_and_in_any_company(model, monkeypatch):
  alone = model.draw(SHORT[:1], seed=5)
  assert difference(alone[0], model.draw(SHORT, seed=5)[0]) <= 1
  assert difference(alone[0], model.draw([SHORT[0], LONG], seed=5)[0]) <= 1  # in a longer row
  pair = model.draw([SHORT[1], SHORT[2]], seed=5)
  assert difference(pair[1], model.draw([SHORT[0], SHORT[2]], seed=5)[1]) <= 1
  monkeypatch.setattr(model, "batch_size", 2)
  in_parts = model.draw(SHORT, seed=5)
  monkeypatch.undo()
  assert difference(in_parts, model.draw(SHORT, seed=5)) <= 1


def test_pictures_depend_on_the_prompt_the_seed_and_their_place(model):
  features = model.draw_features(SHORT, seed=5)
  assert np.abs(features - model.draw_features(SHORT, seed=6)).max() > 0.1
  assert np.abs(features[0] - model.draw_features(["blue", "a star", "red"], seed=5)[0]).max() > 1e-3
  twice = model.draw_features(["red"] * 3, seed=5)
  assert np.abs(twice[0] - twice[1]).max() > 0.1


def test_seeds_are_whole_numbers_of_any_kind_that_a_key_can_hold(model):
  for given, plain in ((np.int64(5), 5), (np.uint32(5), 5), (np.arange(2), [0, 1]), (2**32 - 1, 2**32 - 1)):
    np.testing.assert_array_equal(batching.seeds_of(2, given), batching.seeds_of(2, plain))
  assert batching.seeds_of(2, 2**32 - 1).tolist() == [[2**32 - 1, 0], [2**32 - 1, 1]]
  for wrong in (-1, 2**32, 2**70, [0, -1]):
    with pytest.raises(UserError, match="is no seed; choose one of 0 to 4294967295"):
      model.draw(SHORT[:2], seed=wrong)


def test_lengths_and_numbers_of_items_are_rounded_up_to_few():
  assert [batching.bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
  assert [batching.bucket(n, 6) for n in (6, 7, 13)] == [6, 12, 24]
  assert [batching.padded(n).tolist() for n in (1, 2, 3, 4)] == [[0], [0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]


def test_guidance_pushes_and_1_does_not(model):
  plain, weak, strong = (model.draw_features(SHORT, guidance=g) for g in (1.0, 1.5, 4.0))
  assert 0 < np.abs(weak - plain).max() < np.abs(strong - plain).max()


def test_the_early_head_guides_too(model, monkeypatch):
  plain = model.draw_features(SHORT, guidance=1.0)
  monkeypatch.setitem(model.config.sampling, "guide", "early")
  by_early_head = model.draw_features(SHORT, guidance=2.0)
  assert by_early_head.shape == plain.shape and np.isfinite(by_early_head).all()
  assert np.abs(by_early_head - plain).max() > 1e-3


def test_steps_may_be_chosen(model):
  few, more = (model.draw_features(SHORT[:1], steps=steps, guidance=1.0) for steps in (1, 3))
  assert np.abs(few - more).max() > 1e-3


@pytest.fixture
def taught(model, monkeypatch) -> ClipFlow:
  """With words for edits; of what it was taught nothing else is asked."""
  monkeypatch.setattr(model, "wording", model.wording._replace(edit="{caption}{picture}"))
  return model


def test_an_edit_depends_on_its_picture_and_its_words(taught, pictures):
  edited = taught.draw(SHORT[:2], images=pictures, seed=5)
  assert (edited.shape, edited.dtype) == ((2, SIZE, SIZE, 3), np.uint8)
  features = taught.draw_features(SHORT[:2], images=pictures, seed=5)
  assert difference(taught.decode(features), edited) <= 1
  for other in (
    taught.draw_features(SHORT[:2], seed=5),
    taught.draw_features(SHORT[:2], images=pictures[::-1], seed=5),
    taught.draw_features(SHORT[1:], images=pictures, seed=5),
  ):
    assert np.abs(features - other)[0].max() > 1e-3


def test_an_edit_is_the_same_alone_and_in_any_company(taught, pictures):
  alone = taught.draw(SHORT[:1], images=pictures[:1], seed=5)
  assert difference(alone[0], taught.draw([SHORT[0], LONG], images=pictures, seed=5)[0]) <= 1


def test_an_edit_is_drawn_from_what_training_shows(taught, pictures):
  """What the target sees in training and in drawing is the same, to rounding."""
  _, rows, empty = taught.to_draw(SHORT[:1], None, None, pictures[:1])
  assert (rows.image_roles.tolist(), empty.image_roles.tolist()) == ([[1, 2]], [[2, 0]])
  example = Example("a", pictures[1], (SHORT[0],), "", (), before=pictures[0])
  told = TASKS["edit"](example, Part(ONE, edit=(taught.wording.edit,)), np.random.default_rng(0), 0.0)
  trained = taught.rows([told])
  seen = np.asarray(trained.image_index[0]) >= 0
  for name in ("tokens", "order", "positions", "image_index", "segments"):
    np.testing.assert_array_equal(getattr(rows, name), getattr(trained, name))
  np.testing.assert_array_equal(rows.images[0, 0], trained.images[0, 0])
  assert seen.sum() == T and rows.image_order[0, 1] == trained.image_order[0, 1]


def test_edits_that_cannot_be_are_refused(model, pictures, monkeypatch):
  with pytest.raises(UserError, match="not taught to change pictures; train it further by configs/edit.py"):
    model.draw(SHORT[:2], images=pictures)
  monkeypatch.setattr(model, "wording", model.wording._replace(edit="{caption}{picture}"))
  with pytest.raises(UserError, match="2 pictures for 3 prompts: give one for each"):
    model.draw(SHORT, images=pictures)
  with pytest.raises(UserError, match=r"this model takes uint8 \[N,"):
    model.draw(SHORT[:2], images=pictures.astype(np.float32))
  with pytest.raises(UserError, match="best_of judges whether a drawing is as its prompt says"):
    model.draw(SHORT[:2], images=pictures, best_of=2)


# Reading.


def test_features_are_standardised_and_decoded(model, pictures):
  features = model.encode(pictures)
  assert (features.shape, features.dtype) == ((2, T, C), np.float32)
  raw = model.model.apply({"params": model.params}, pictures, method="see").features
  statistics = model.params["statistics"]
  np.testing.assert_allclose(features, (raw - statistics["mean"]) / statistics["std"], atol=1e-4)
  decoded = model.decode(features)
  assert (decoded.shape, decoded.dtype) == ((2, SIZE, SIZE, 3), np.uint8)


def test_captions_and_answers_are_texts(model, pictures):
  captions, answers = model.caption(pictures), model.answer(pictures, ["how?", "where is it?"])
  for texts in (captions, answers):
    assert len(texts) == 2 and all(isinstance(words, str) for words in texts)
    assert not any("<|" in words for words in texts)
  assert model.answer(pictures[::-1], ["where is it?", "how?"]) == answers[::-1]


def test_a_question_is_a_conversation_of_one(model, pictures):
  parts = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "how?"}]
  (answer,) = model.answer(pictures[:1], ["how?"])
  assert model.chat([{"role": "user", "content": parts}]) == answer
  as_picture = [{"type": "image", "image": Image.fromarray(pictures[0])}, parts[1]]
  assert model.chat([{"role": "user", "content": as_picture}]) == answer


def test_a_picture_stands_where_the_model_was_taught_to_find_it_in_whichever_order_it_is_given(
  model, pictures, monkeypatch
):
  parts = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "how?"}]
  monkeypatch.setattr(model, "wording", mixture.Wording("{question}{picture}", "{caption}", ""))
  for given in (parts, parts[::-1]):
    assert conversation(model, [{"role": "user", "content": given}]).turns == (("user", "how?" + IMAGE),)
  between = [*parts, {"type": "text", "text": "why?"}]  # a place of its own
  assert conversation(model, [{"role": "user", "content": between}]).turns == (("user", IMAGE + "how?why?"),)
  (answer,) = model.answer(pictures[:1], ["how?"])
  assert model.chat([{"role": "user", "content": parts}]) == answer


@pytest.mark.parametrize("words", [["how?<|image|>"], ["how?<|im<|image|>age|>"], ["how?<|ima", "ge|>"]])
def test_in_what_is_asked_the_word_of_a_picture_is_none(model, pictures, words):
  texts = [{"type": "text", "text": text} for text in words]
  for shown in ([], [{"type": "image", "image": pictures[0]}]):
    plain, quoted = ([{"role": "user", "content": [*shown, *of]}] for of in ([dict(texts[0], text="how?")], texts))
    assert conversation(model, quoted).turns == conversation(model, plain).turns
  assert model.slots(f"a star {IMAGE}") == model.slots("a star ")


def test_a_conversation_of_words_alone_may_go_on(model):
  first = model.chat([{"role": "user", "content": "how?"}])
  turns = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": first[:8]}]
  assert isinstance(model.chat([*turns, {"role": "user", "content": "why?"}]), str)


def test_any_picture_is_fitted_as_in_training(model):
  wide = Image.new("RGBA", (2 * SIZE, SIZE), (255, 0, 0, 0))  # nothing to see: white
  grey = np.tile(np.arange(50, dtype=np.uint8)[:, None], (1, 70))
  shown = [{"type": "image", "image": picture} for picture in (wide, grey)]
  fitted = conversation(model, [{"role": "user", "content": shown}]).images
  expected = np.full((SIZE, SIZE, 3), 255, np.uint8), images.square(Image.fromarray(grey), SIZE)
  np.testing.assert_array_equal(fitted, expected)


# Greedy writing against the plain way: the whole stream again for every word.

NEW = 6


def greedy(model: ClipFlow, rows: Any, features: jax.Array) -> np.ndarray:
  """i32[B,NEW]: argmax of the last word's logits of a full forward pass, appended, and again."""

  @jax.jit
  def last_logits(params, batch, features, at):
    def forward(bound: Model):
      hidden, _ = bound.read(batch, features)
      return bound.logits(jnp.take_along_axis(hidden, at[:, None, None], axis=1))[:, 0]

    return model.model.apply({"params": params}, method=forward)

  rows = jax.tree.map(np.array, rows)
  room = [(0, 0), (0, NEW)]
  fields = dict(tokens=0, segments=0, order=0, loss_weights=0, image_index=-1)
  grown = {name: np.pad(getattr(rows, name), room, constant_values=fill) for name, fill in fields.items()}
  batch = rows.replace(**grown, positions=np.pad(rows.positions, [*room, (0, 0)]))
  end = (rows.segments > 0).sum(axis=1)
  written = []
  for _ in range(NEW):
    words = np.asarray(last_logits(model.params, batch, features, end - 1).argmax(axis=-1))
    written.append(words)
    for b, word in enumerate(words):
      at = end[b]
      batch.tokens[b, at], batch.segments[b, at] = word, 1
      batch.order[b, at] = batch.order[b, :at].max() + 1
      batch.positions[b, at] = batch.positions[b, :at].max() + 1
    end = end + 1
  return np.stack(written, axis=1)


def test_greedy_writing_equals_full_forward_passes_word_for_word(model, pictures):
  questions = ["how?", "where is it, and what stands beside it?"]
  asked = [sequence.asked(picture, question) for picture, question in zip(pictures, questions, strict=True)]
  rows = model.rows(asked, prompt=True)
  assert len(set((rows.segments > 0).sum(axis=1))) == 2  # prompts of unequal length: padding stands between
  features = model.model.apply({"params": model.params}, rows, method="features")
  expected = greedy(model, rows, features)
  assert all(len(np.unique(words)) > 3 for words in expected)  # else it would prove little

  def generate(*ends: int) -> np.ndarray:
    run = jax.jit(lambda params: text.generate(model.model, params, rows, features, new=NEW, ends=ends))
    return np.asarray(run(model.params))

  written = generate(-1)
  assert written.dtype == np.int32
  np.testing.assert_array_equal(written, expected)

  # Of words that do occur: from a row's first place of one on there are no others.
  for ends in [(int(expected[0, 2]),), (int(expected[0, 2]), int(expected[1, 3]))]:
    ended = np.cumsum(np.isin(expected, ends), axis=1) > 0
    found = generate(*ends)
    np.testing.assert_array_equal(np.where(ended, -1, found), np.where(ended, -1, expected))
    np.testing.assert_array_equal(np.isin(found, ends), ended)


def test_each_word_is_chosen_for_the_place_that_it_will_have(model, pictures):
  """Its random number is of that place: of another one two words would share one."""
  rows = model.rows([sequence.asked(pictures[0], "how?")], prompt=True)
  features = model.model.apply({"params": model.params}, rows, method="features")
  place = lambda logits, position: position  # noqa: E731
  written = text.generate(model.model, model.params, rows, features, new=3, ends=(-1,), choose=place)
  assert written.tolist() == [[rows.positions.max() + 1 + i for i in range(3)]]


def test_questions_and_answers_of_many_lengths_take_few_programs(model, pictures, caplog):
  def compiled(questions: list[str], new: int) -> int:
    caplog.clear()
    with jax.log_compiles():
      model.answer(pictures[:1], questions, new)
    return sum("Finished XLA compilation of jit(run)" in record.getMessage() for record in caplog.records)

  shapes = [("how?", 3), ("what?", 3), ("where is it?", 16), ("why is it?", 9)]
  lengths = {len(model.tokenizer.encode(question)) for question, _ in shapes}
  assert len(lengths) > 1
  assert [compiled([question], new) for question, new in shapes] == [1, 0, 1, 0]  # two lengths of prompts
  assert compiled(["how?"], 17) == 1  # of the next length of answers


def test_no_answer_is_too_short_to_be_asked_for(model, pictures):
  with pytest.raises(UserError, match="0 tokens are no answer"):
    model.answer(pictures[:1], ["how?"], new=0)


# Comparing.


def test_embeddings_have_unit_norm_and_one_space(model, pictures):
  seen, read = model.embed_image(pictures), model.embed_text(["a star", "red", LONG[:30]])
  assert seen.shape == (2, 16) and read.shape == (3, 16)
  for embedding in (seen, read):
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-5)
  names = ["a star", "red", LONG[:30]]
  classes = model.classify(pictures, names)
  assert (classes.shape, classes.dtype) == ((2,), np.int32)
  np.testing.assert_array_equal(classes, (seen @ read.T).argmax(axis=1))


def test_an_embedding_does_not_depend_on_its_company(model):
  alone, together = model.embed_text(["red"]), model.embed_text(["red", LONG[:30]])
  np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


# What cannot be done.


@pytest.mark.parametrize(
  "wrong",
  [
    np.zeros((1, SIZE + 1, SIZE, 3), np.uint8),
    np.zeros((SIZE, SIZE, 3), np.uint8),
    np.zeros((1, SIZE, SIZE, 3), np.float32),
  ],
)
def test_pictures_of_another_size_or_type_are_refused(model, wrong):
  for method in (model.encode, model.caption, model.embed_image):
    with pytest.raises(UserError, match=rf"this model takes uint8 \[N,{SIZE},{SIZE},3\]"):
      method(wrong)


def test_of_a_text_that_is_too_long_for_its_tower_the_beginning_is_embedded(model):
  long, longer, other = model.embed_text(["why " * 1000, "why " * 2000, "how " * 1000])
  np.testing.assert_array_equal(long, longer)
  assert np.abs(long - other).max() > 0


def test_one_text_in_the_place_of_a_list_is_refused(model, pictures):
  for call in (
    lambda: model.draw("a red star"),
    lambda: model.answer(pictures, "what?"),
    lambda: model.classify(pictures, "a cat"),
    lambda: model.likelihood("a", ["b"]),
  ):
    with pytest.raises(UserError, match="give a list of them"):
      call()
  with pytest.raises(UserError, match="1 answers for 2: give one for each"):
    model.likelihood(["a", "b"], ["c"])


def test_rows_are_as_long_as_those_that_it_was_trained_on(trained):
  read = ClipFlow.from_checkpoint(trained)
  assert read.longest == 512
  read.config.data.length = 1024
  assert ClipFlow(read.model, read.params, read.tokenizer, read.config).longest == 1024
  assert ClipFlow(read.model, read.params, read.tokenizer, read.config, longest=4096).longest == 4096


def test_a_prompt_that_is_too_long_is_refused_in_one_line(model, pictures):
  for call in (
    lambda: model.draw(["x\n" * 1000]),
    lambda: model.answer(pictures[:1], ["why " * 1000]),
    lambda: model.chat([{"role": "user", "content": "why " * 1000}]),
  ):
    with pytest.raises(UserError, match="does not fit") as error:
      call()
    assert "\n" not in str(error.value)


def test_nothing_is_refused(model):
  none = np.zeros((0, SIZE, SIZE, 3), np.uint8)
  calls = [
    lambda: model.draw([]),
    lambda: model.embed_text([]),
    lambda: model.caption(none),
    lambda: model.encode(none),
  ]
  for call in calls:
    with pytest.raises(UserError, match="nothing to"):
      call()


@pytest.mark.parametrize(
  "messages", ["hi", ["hi"], [{"content": "hi"}], [{"role": "user", "content": [{"text": "hi"}]}]]
)
def test_what_are_no_messages_is_told_with_some_that_are(model, messages):
  with pytest.raises(UserError, match=r'messages are a list of \{"role": "user"'):
    model.chat(messages)


@pytest.mark.parametrize("steps", [0, 2.5, "4"])
def test_steps_are_whole(model, steps):
  with pytest.raises(UserError, match=rf"sampling steps {steps}: give a whole number"):
    model.draw(["a"], steps=steps)


def test_a_part_that_is_not_there_is_named(model, pictures):
  fields = dict(tiny.FIELDS, clip=model.model.clip, transformer=None, pixel_decoder=None)
  tower = ClipFlow(Model(**fields), model.params, model.tokenizer, model.config)
  with pytest.raises(UserError, match="no flow expert, so it cannot draw"):
    tower.draw(SHORT)
  with pytest.raises(UserError, match="no transformer, so it cannot write"):
    tower.caption(pictures)
  with pytest.raises(UserError, match="no transformer, so it cannot chat"):
    tower.chat([{"role": "user", "content": "how?"}])
  with pytest.raises(UserError, match="no pixel decoder, so it cannot decode"):
    tower.decode(np.zeros((1, T, C), np.float32))


@pytest.mark.parametrize(
  ("wrong", "what"),
  [
    (dict(steps=0), "at least 1"),
    (dict(method="leap"), "'leap' is unknown"),
    (dict(guide="hope"), "'hope' is unknown"),
    *((dict(guidance=scale), "guidance .*: give a number from 0") for scale in (-1.0, float("nan"), float("inf"))),
    *((dict(eta=eta), "eta .*: give a number from 0") for eta in (-0.1, 1.5, float("nan"))),
    *((dict(interval=x), "interval .*: give two times") for x in ((0.8, 0.2), (-1, 1), (0, 2), (0.5,))),
  ],
)
def test_sampling_that_cannot_be_is_refused(wrong, what):
  with pytest.raises(UserError, match=what):
    Sampling(**wrong)


ON_FOUR = """
import sys, jax, numpy as np
from clipflow_jax.inference import batching
from clipflow_jax.inference.pipeline import ClipFlow
assert jax.device_count() == 4
model = ClipFlow.from_checkpoint(sys.argv[1]).spread()
pictures = np.load(sys.argv[2])
seen = model.embed_image(pictures)
rows, parts = batching.rows_lie(model.params)
assert parts == 4 and rows.shard_shape((8, 1)) == (2, 1)
np.savez(sys.argv[3], seen=seen, drawn=model.draw_features(["red", "a star", "blue"], steps=2, seed=3))
"""


def test_batches_are_cut_over_devices_and_give_the_same(loaded, trained, pictures, tmp_path):
  np.save(tmp_path / "pictures.npy", pictures)
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  command = [sys.executable, "-c", ON_FOUR, str(trained), str(tmp_path / "pictures.npy"), str(tmp_path / "found.npz")]
  done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  with np.load(tmp_path / "found.npz") as found:
    np.testing.assert_allclose(found["seen"], loaded.embed_image(pictures), atol=1e-5)
    drawn = loaded.draw_features(["red", "a star", "blue"], steps=2, seed=3)
    np.testing.assert_allclose(found["drawn"], drawn, atol=1e-4)


@pytest.mark.parametrize("picture", ["a.png", np.zeros((4, 4, 3), np.float32)], ids=["a name", "floats"])
def test_what_is_no_picture_among_messages_is_told(model, picture):
  parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
  with pytest.raises(UserError, match=r"no picture among messages: .*; give uint8 \[H,W,3\]"):
    conversation(model, [{"role": "user", "content": parts}])


def test_no_messages_are_none_to_answer(model):
  with pytest.raises(UserError, match="there are no messages to answer"):
    model.chat([])


def test_other_pictures_than_questions_have_no_likelihood(model, pictures):
  with pytest.raises(UserError, match="1 pictures for 2 questions: give one for each"):
    model.likelihood(["a", "b"], ["c", "d"], pictures[:1])
  with pytest.raises(UserError, match="1 pictures' features for 2 questions"):
    model.likelihood(["a", "b"], ["c", "d"], features=np.zeros((1, T, C), np.float32))

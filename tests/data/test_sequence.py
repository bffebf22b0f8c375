from __future__ import annotations

import dataclasses
import functools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.batch import BOTH, INPUT, TARGET
from clipflow_jax.data import sequence, text
from clipflow_jax.data.example import IMAGE_MARKER, Dialogue
from clipflow_jax.data.sequence import ASK, Conversation, Layout
from clipflow_jax.data.text import ASSISTANT, BEGIN, END, IMAGE, USER, Chat
from clipflow_jax.errors import UserError

SIDE, GRID = 4, 2
T = GRID**2
LAYOUT = Layout(length=40, images=3, grid=GRID)


@functools.cache
def make_chat() -> Chat:
  return Chat(text.train_tokenizer(["a red star", "what colour?", "blue circle"] * 3, 290))


@pytest.fixture(scope="module")
def chat() -> Chat:
  return make_chat()


def picture(value: int = 0) -> np.ndarray:
  return np.full((SIDE, SIDE, 3), value, np.uint8)


def words_of(chat: Chat, example: dict[str, np.ndarray]) -> str:
  """The stream's words, with (T) where a picture's tokens stand."""
  firsts = (example["image_index"] < 0) | (example["image_index"] % T == 0)
  ids, index = example["tokens"][firsts], example["image_index"][firsts]
  return "".join("(T)" if i >= 0 else chat.tokenizer.decode([t]) for t, i in zip(ids, index, strict=True))


def qwen_positions(is_picture: list[bool]) -> np.ndarray:
  """Qwen2-VL's rule (get_rope_index) for a stream of words (False) and pictures (True), [s,3].

  Each begins after the largest position so far. A word has it on all axes; a picture holds time still and
  counts rows and columns.
  """
  out: list[tuple[int, int, int]] = []
  for picture_here in is_picture:
    start = 1 + max((max(p) for p in out), default=-1)
    cells = [(r, c) for r in range(GRID) for c in range(GRID)] if picture_here else [(0, 0)]
    out += [(start, start + r, start + c) for r, c in cells]
  return np.array(out)


# One example.


def test_a_picture_that_is_read_follows_its_word(chat):
  example = sequence.encode(sequence.read(picture(), (("what colour?", "red"),)), chat, LAYOUT)
  assert words_of(chat, example) == f"{BEGIN}{USER}{IMAGE}(T) what colour?{ASSISTANT} red{END}"
  is_image = example["image_index"] >= 0
  assert example["image_index"][is_image].tolist() == list(range(T))
  assert example["tokens"][np.flatnonzero(is_image)[0] - 1] == chat.image
  assert example["image_roles"].tolist() == [INPUT]


def test_a_pictures_tokens_are_one_step_of_time_between_its_word_and_the_next(chat):
  example = sequence.encode(sequence.read(picture(), (("what colour?", "red"),)), chat, LAYOUT)
  order, is_image = example["order"], example["image_index"] >= 0
  assert order[~is_image].tolist() == [0, 1, 2, *range(4, 4 + (~is_image).sum() - 3)]
  assert order[is_image].tolist() == [3] * T


@settings(max_examples=20)
@given(kinds=st.lists(st.booleans(), min_size=1, max_size=4))
def test_positions_are_those_of_qwen2_vl(kinds):
  chat = make_chat()
  content = "".join(f"{IMAGE}" if kind else "a red star" for kind in kinds)
  n = sum(kinds)
  conversation = Conversation(
    (("user", content), ("assistant", "b")), np.zeros((n, SIDE, SIDE, 3), np.uint8), (INPUT,) * n
  )
  example = sequence.encode(conversation, chat, Layout(100, 4, GRID))
  starts = (example["image_index"] < 0) | (example["image_index"] % T == 0)
  is_picture = (example["image_index"][starts] >= 0).tolist()
  np.testing.assert_array_equal(example["positions"], qwen_positions(is_picture))


def test_the_assistants_words_alone_have_weight(chat):
  turns = (("what colour?", "red"), ("what colour?", "blue circle"))
  example = sequence.encode(sequence.read(picture(), turns), chat, LAYOUT)
  weighted = example["tokens"][example["loss_weights"] > 0]
  assert chat.tokenizer.decode(weighted.tolist()) == f" red{END} blue circle{END}"
  assert set(example["loss_weights"]) == {0.0, 1.0}


def test_a_drawn_picture_has_no_slots_and_ends_the_stream(chat):
  example = sequence.encode(sequence.drawn("a red star", picture()), chat, LAYOUT)
  assert chat.tokenizer.decode(example["tokens"].tolist()) == f"{BEGIN}{USER} a red star{ASSISTANT}{IMAGE}"
  assert (example["image_index"] == -1).all()
  assert example["image_roles"].tolist() == [TARGET]
  last = len(example["tokens"]) - 1
  assert example["image_order"].tolist() == [example["order"][-1]] == [last]
  assert example["image_positions"].tolist() == [last + 1]  # where a picture that is read would stand


@pytest.mark.parametrize("own", [True, False], ids=["the tokenizer's own end", "the template's end"])
def test_what_a_template_has_behind_an_answer_is_nobodys_words_and_follows_no_drawn_picture(own):
  tokenizer = text.train_tokenizer(["a red star", "what colour?", "blue circle"] * 3, 290)
  tokenizer.chat_template = "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>\n' }}{% endfor %}"
  tokenizer.eos_token = END if own else BEGIN
  chat = Chat(tokenizer)
  told = sequence.encode(sequence.talked((("what colour?", "red"),), picture()), chat, LAYOUT)
  weighted = told["tokens"][told["loss_weights"] > 0].tolist()
  assert weighted[-1] == chat.end and told["tokens"][-1] == chat.encode("\n")[-1]
  drawn = sequence.encode(sequence.drawn("a red star", picture()), chat, LAYOUT)
  assert drawn["tokens"][-1] == chat.image and drawn["loss_weights"][-1] == 1


def test_a_picture_is_drawn_where_it_would_be_read(chat):
  turns = (("user", "a red star"), ("assistant", IMAGE))
  read, drawn = (
    sequence.encode(Conversation(turns, picture()[None], (role,)), chat, LAYOUT) for role in (BOTH, TARGET)
  )
  is_image = read["image_index"] >= 0
  assert (read["positions"][is_image].min(axis=0) == drawn["image_positions"][0]).all()
  assert read["image_order"].tolist() == drawn["image_order"].tolist()
  assert (
    read["order"][is_image] > read["image_order"][0]
  ).all()  # its own clean tokens are out of its noisy blocks' sight


def test_words_after_a_drawn_picture_stay(chat):
  turns = (("user", "a red star"), ("assistant", f"{IMAGE}blue circle"))
  example = sequence.encode(Conversation(turns, picture()[None], (TARGET,)), chat, LAYOUT)
  assert chat.tokenizer.decode(example["tokens"].tolist()).endswith(f"{IMAGE} blue circle{END}")
  assert example["tokens"][example["image_order"][0]] == chat.image


def test_a_caption_for_clip_is_its_words_between_begin_and_end(chat):
  example = sequence.encode(sequence.words(f"a red {END}star", picture()), chat, LAYOUT)
  assert chat.tokenizer.decode(example["tokens"].tolist()) == f"{BEGIN} a red star{END}"
  assert example["loss_weights"].tolist() == [0.0] + [1.0] * (len(example["tokens"]) - 1)
  assert (example["image_index"] == -1).all()


def test_a_prompt_is_the_beginning_of_the_whole(chat):
  asked = sequence.encode(sequence.asked(picture(), "what colour?"), chat, LAYOUT, prompt=True)
  whole = sequence.encode(sequence.read(picture(), (("what colour?", "red"),)), chat, LAYOUT)
  for name in sequence.SLOTS:
    np.testing.assert_array_equal(asked[name], whole[name][: len(asked[name])], err_msg=name)
  assert asked["tokens"][-1] == chat.tokenizer.convert_tokens_to_ids(ASSISTANT)


def test_a_picture_behind_its_question_is_read_after_it_and_the_next_question_stands_alone(chat):
  turns = (("what colour?", "red"), ("what colour?", "blue circle"))
  ask = sequence.QUESTION + sequence.PICTURE
  example = sequence.encode(sequence.read(picture(), turns, ask), chat, LAYOUT)
  first, second = f"what colour?{IMAGE}(T){ASSISTANT} red{END}", f"what colour?{ASSISTANT} blue circle{END}"
  assert words_of(chat, example) == f"{BEGIN}{USER} {first}{USER} {second}"
  seen = example["image_index"] >= 0
  question = np.flatnonzero(seen)[0] - 2  # behind it stands the word that begins a picture
  assert (example["order"][seen] > example["order"][question]).all()  # what attention goes by
  asked = sequence.encode(sequence.asked(picture(), "what colour?", ask), chat, LAYOUT, prompt=True)
  np.testing.assert_array_equal(asked["tokens"], example["tokens"][: len(asked["tokens"])])


@pytest.mark.parametrize("layout", [Layout(12, 3, GRID), Layout(40, 0, GRID)])
def test_what_does_not_fit_is_refused_with_its_length_and_the_remedy(chat, layout):
  with pytest.raises(UserError, match=r"\d+ tokens and 1 pictures .* data.length .* '<\|image\|>a red star") as error:
    sequence.encode(sequence.read(picture(), (("a red star what colour?", "red"),)), chat, layout)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "pictures"), [("a red star", 1), (IMAGE, 0), (IMAGE * 2, 1)])
def test_every_picture_has_its_word(chat, content, pictures):
  conversation = Conversation((("user", content),), np.zeros((pictures, SIDE, SIDE, 3), np.uint8), (INPUT,) * pictures)
  with pytest.raises(UserError, match="write one for each"):
    sequence.encode(conversation, chat, LAYOUT)


QUOTED = ["<|image|>a", "a<|im<|image|>age|>", "<|im<image>age|>a", "a <image>", "<im<|image|>age>", IMAGE * 2]


@pytest.mark.parametrize("quoted", QUOTED)
@pytest.mark.parametrize("ask", [ASK, "{question}{picture}"])
def test_in_peoples_words_the_word_of_a_picture_is_none(chat, quoted, ask):
  twice = ((quoted, quoted), (quoted, quoted))
  images = np.stack([picture()])
  made = {
    "drawn": sequence.drawn(quoted, picture()),
    "edited": sequence.edited(picture(), quoted, picture(), sequence.EDIT),
    "asked": sequence.asked(picture(), quoted, ask),
    "read": sequence.read(picture(), twice, ask),
    "talked": sequence.talked(twice, picture()),
    "held": sequence.held(Dialogue((("user", f"<image>{quoted.replace('<image>', '')}"), ("assistant", "a")), images)),
    "between": Conversation((("user", sequence.spoken(quoted, quoted)),), images, (INPUT,)),
  }
  for name, conversation in made.items():
    roles: list[int] = {"drawn": [TARGET], "edited": [INPUT, TARGET], "talked": []}.get(name, [INPUT])
    example = sequence.encode(conversation, chat, Layout(200, 3, GRID), prompt=name in ("asked", "between"))
    assert example["image_roles"].tolist() == roles
    assert (example["tokens"][example["image_index"] < 0] == chat.image).sum() == len(roles)


@pytest.mark.parametrize("frame", ["<|begin|> $A <|end|>", "$A <|end|>"])
def test_a_caption_begins_as_the_tokenizer_itself_begins_a_text(frame):
  from tokenizers.processors import TemplateProcessing

  tokenizer = text.train_tokenizer(["a red star"] * 3, 290)
  ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (BEGIN, END)]
  tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=ends)
  example = sequence.encode(sequence.words("a red star", picture()), Chat(tokenizer), LAYOUT)
  assert example["tokens"].tolist() == tokenizer("a red star")["input_ids"]
  assert example["loss_weights"].tolist() == [0.0 if token == ends[0][1] else 1.0 for token in example["tokens"]]


@pytest.mark.parametrize("room", [0, 1])
def test_an_example_may_fill_its_row_to_the_last_slot(chat, room):
  conversation = sequence.read(picture(), (("what colour?", "red"),))
  length = len(sequence.encode(conversation, chat, LAYOUT)["tokens"])
  assert len(sequence.encode(conversation, chat, Layout(length + room, 1, GRID))["tokens"]) == length
  with pytest.raises(UserError, match=f"of {length} tokens and 1 pictures does not fit a row of {length - 1} and 1"):
    sequence.encode(conversation, chat, Layout(length - 1, 1, GRID))


def test_a_caption_is_cut_to_the_whole_row_and_still_ends(chat):
  words = sequence.words("a red star " * LAYOUT.length, picture())
  whole = sequence.encode(words, chat, dataclasses.replace(LAYOUT, length=1000))["tokens"]
  cut = sequence.encode(words, chat, LAYOUT, cut=True)
  assert cut["tokens"].tolist() == [*whole[: LAYOUT.length - 1], chat.end] and cut["loss_weights"].sum() == 39
  with pytest.raises(sequence.TooLong):
    sequence.encode(words, chat, LAYOUT)


def test_words_put_no_picture_into_what_is_made_of_them():
  """Neither a caption or a question that looks like a template, nor a conversation that names our own word."""
  assert sequence.edited(picture(), "{picture}", picture(), sequence.EDIT).turns[0] == ("user", IMAGE + "{picture}")
  assert sequence.asked(picture(), "{picture}?").turns == (("user", IMAGE + "{picture}?"),)
  turns = (("user", f"{IMAGE}what is {IMAGE_MARKER}?"), ("assistant", "red"))
  held = sequence.held(Dialogue(turns, picture()[None]))
  assert held.turns == (("user", f"what is {IMAGE}?"), ("assistant", "red"))


# Rows.


def test_a_row_alone_is_padded_with_nothing(chat):
  example = sequence.encode(sequence.read(picture(7), (("what colour?", "red"),)), chat, LAYOUT)
  row = sequence.pack([example], LAYOUT)
  n = len(example["tokens"])
  assert row.segments.tolist() == [1] * n + [0] * (LAYOUT.length - n)
  assert row.image_segments.tolist() == [1, 0, 0]
  assert row.image_roles.tolist() == [INPUT, 0, 0]
  assert (row.image_index[n:] == -1).all()
  assert row.loss_weights[n:].sum() == 0
  np.testing.assert_array_equal(row.image_index[:n], example["image_index"])
  np.testing.assert_array_equal(row.images[0], picture(7))


def test_slots_without_a_word_hold_the_layouts_padding(chat):
  example = sequence.encode(sequence.words("a red star", picture()), chat, LAYOUT)
  row = sequence.pack([example], dataclasses.replace(LAYOUT, pad=7))
  assert (row.tokens == np.where(row.segments > 0, sequence.pack([example], LAYOUT).tokens, 7)).all()
  assert row.tokens.dtype == np.int32 and row.tokens[-1] == 7


def test_stacked_rows_have_the_documented_shapes_and_dtypes(chat):
  conversations = [sequence.drawn("a red star", picture(1)), sequence.words("blue circle", picture(2))]
  batch = sequence.stack([sequence.pack([sequence.encode(c, chat, LAYOUT)], LAYOUT) for c in conversations])
  b, s, n = 2, LAYOUT.length, LAYOUT.images
  want = {
    **dict.fromkeys(("tokens", "segments", "order", "image_index"), ((b, s), np.int32)),
    "positions": ((b, s, 3), np.int32),
    "loss_weights": ((b, s), np.float32),
    **dict.fromkeys(("image_roles", "image_segments", "image_order", "image_positions"), ((b, n), np.int32)),
    "images": ((b, n, SIDE, SIDE, 3), np.uint8),
  }
  got = {name: value for name, value in vars(batch).items() if value is not None}
  assert {name: (value.shape, value.dtype) for name, value in got.items()} == want


# Packing.


@st.composite
def conversations(draw) -> list[Conversation]:
  """Conversations of words and pictures under any roles; every picture of the list has its own colour."""
  found, colour = [], 0
  for _ in range(draw(st.integers(1, 6))):
    roles = draw(st.lists(st.sampled_from([INPUT, TARGET, BOTH]), max_size=2))
    said = "".join(draw(st.sampled_from(["", "a ", "blue"])) + IMAGE for _ in roles)
    tail = draw(st.sampled_from(["", "red star"]))
    turns = (("user", said + tail), ("assistant", draw(st.sampled_from(["", "b", "what colour?"]))))
    pictures = [picture(colour + i + 1) for i in range(len(roles))]
    colour += len(roles)
    images = np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    found.append(Conversation(turns, images, tuple(roles)))
  return found


@settings(max_examples=40, deadline=None)
@given(conversations=conversations())
def test_a_row_takes_examples_in_their_order_as_long_as_there_is_room(conversations):
  chat = make_chat()
  examples = [sequence.encode(conversation, chat, LAYOUT) for conversation in conversations]
  slots, pictures, fitting = LAYOUT.length, LAYOUT.images, []
  for example in examples:
    if len(example["tokens"]) <= slots and len(example["images"]) <= pictures:
      slots, pictures = slots - len(example["tokens"]), pictures - len(example["images"])
      fitting.append(example)
  found = unpack(sequence.pack(examples, LAYOUT))
  assert [*map(signature, found)] == [*map(signature, fitting)]


@settings(max_examples=40, deadline=None)
@given(conversations=conversations(), bins=st.integers(1, 3))
def test_packing_keeps_every_example_whole_and_its_pictures_its_own(conversations, bins):
  chat = make_chat()
  examples = [sequence.encode(conversation, chat, LAYOUT) for conversation in conversations]
  packed = grain.experimental.FirstFitPackIterDataset(
    grain.MapDataset.source(examples).to_iter_dataset(),
    length_struct=sequence.lengths(LAYOUT),
    num_packing_bins=bins,
    shuffle_bins=False,
  )
  rows = [sequence.finish(row, LAYOUT) for row in packed]
  found = [one for row in rows for one in unpack(row)]
  assert sorted(map(signature, found)) == sorted(map(signature, examples))


def unpack(row) -> list[dict[str, np.ndarray]]:
  """The examples of a packed row as `encode` made them; and the picture that each slot reads."""
  assert (row.loss_weights[row.segments == 0] == 0).all()
  assert (row.image_index[row.segments == 0] == -1).all()
  assert (row.image_roles[row.image_segments == 0] == 0).all()
  found = []
  for segment in range(1, row.segments.max(initial=0) + 1):
    slots, pictures = row.segments == segment, row.image_segments == segment
    assert (np.diff(np.flatnonzero(slots)) == 1).all()
    index = row.image_index[slots]
    first = np.flatnonzero(pictures)[0] * T if pictures.any() else 0
    one = {name: getattr(row, name)[slots] for name in ("tokens", "loss_weights", "order", "positions")}
    one["image_index"] = np.where(index < 0, -1, index - first)
    colours = row.images.reshape(len(row.images), -1)[:, 0]
    one["read"] = np.where(index < 0, 0, colours[np.maximum(index, 0) // T])
    for name in ("images", "image_roles", "image_order", "image_positions"):
      one[name] = getattr(row, name)[pictures]
    one["targets"] = np.flatnonzero(one["image_roles"] & TARGET)
    found.append(one)
  return found


def signature(example: dict[str, np.ndarray]) -> str:
  """Everything about an example, and the colour of the picture that each slot reads."""
  if "read" not in example:
    index = example["image_index"]
    colours = np.append(example["images"].reshape(-1, SIDE * SIDE * 3)[:, 0], 0)
    example = {**example, "read": np.where(index < 0, 0, colours[np.maximum(index, 0) // T])}
  return repr({name: value.tolist() for name, value in sorted(example.items())})


def test_a_layout_is_told_in_pictures_and_tokens():
  assert dataclasses.replace(LAYOUT, grid=6).tokens_per_image == 36
  assert sequence.lengths(LAYOUT).keys() == {*sequence.SLOTS, *sequence.PICTURES, "targets"}

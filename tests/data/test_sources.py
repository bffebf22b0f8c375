from __future__ import annotations

import collections
import itertools
import json
import os
import pickle
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipflow_jax.data import folder as folder_source
from clipflow_jax.data import images, sources
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.folder import FolderSource
from clipflow_jax.data.records import parse, record
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError
from tests import tiny_data


def write_folder(path: Path, lines: list, pictures: int | None = None) -> Path:
  """A folder with 0.png, 1.png, ..., of grey level 0, 1, ..., and captions.jsonl of `lines`."""
  path.mkdir(parents=True)
  for i in range(len(lines) if pictures is None else pictures):
    Image.new("L", (8, 8), i % 256).save(path / f"{i}.png")
  text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
  (path / "captions.jsonl").write_text(text, encoding="utf-8")
  return path


def captioned(n: int) -> list[dict]:
  return [{"file": f"{i}.png", "caption": f"picture {i}"} for i in range(n)]


def read(source: FolderSource) -> tuple[list, list[BadRecord]]:
  examples, errors = [], []
  for i in range(len(source)):
    try:
      examples.append(source[i])
    except BadRecord as error:
      errors.append(error)
  return examples, errors


def one(folder: Path, record) -> sources.Example:
  return FolderSource(write_folder(folder, [record], pictures=1), size=8, split="all")[0]


def test_an_example_has_the_picture_and_its_texts(tmp_path):
  example = one(tmp_path / "a", {"file": "0.png", "captions": [" two\n words ", "more"], "licence": "ignored"})
  assert example.id == "a/0.png"
  assert (example.captions, example.description, example.questions) == (
    ("two words", "more"),
    "two words",
    (),
  )
  assert (example.image.shape, example.image.dtype) == ((8, 8, 3), np.uint8)


def test_an_edit_has_the_picture_before_it_which_lies_in_the_folder_too(tmp_path):
  edit = {"file": "1.png", "before": "0.png", "caption": "make it lighter"}
  odd = [dict(edit, before=3), dict(edit, before="../0.png"), dict(edit, before="none.png")]
  examples, errors = read(FolderSource(write_folder(tmp_path / "a", [edit, *odd]), size=8, split="all"))
  (example,) = examples
  assert (example.before[0, 0, 0], example.image[0, 0, 0], example.captions) == (0, 1, ("make it lighter",))
  assert [error.kind for error in errors] == ["no file", "outside its folder", "missing file"]


@pytest.mark.parametrize(
  ("role", "text", "human", "gpt"),
  [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")],
)
def test_a_conversation_is_kept_as_it_was_held_and_is_no_caption(tmp_path, role, text, human, gpt):
  turns = [(human, "<image>\nWhat is it?"), (gpt, "A cat."), (human, "Which\ncolour?"), (gpt, "Red.")]
  record = {"file": "0.png", "conversations": [{role: who, text: said} for who, said in turns]}
  example = one(tmp_path / "a", record)
  wanted = (("user", "What is it?"), ("assistant", "A cat."), ("user", "Which\ncolour?"), ("assistant", "Red."))
  assert example.dialogue.turns == wanted
  np.testing.assert_array_equal(example.dialogue.images, example.image[None])
  assert (example.captions, example.description, example.questions) == ((), "", (("What is it?", "A cat."),))
  example = one(tmp_path / "b", record | {"caption": "a red cat"})
  assert (example.captions, example.description) == (("a red cat",), "a red cat")
  assert example.dialogue.turns == wanted


def test_an_answer_to_the_bare_picture_is_no_question(tmp_path):
  turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>"}]
  example = one(tmp_path / "a", {"file": "0.png", "conversations": [*turns, {"from": "gpt", "value": "a cat <image>"}]})
  assert example.dialogue.turns == (("system", "Be brief."), ("user", ""), ("assistant", "a cat"))
  assert example.questions == ()


def test_where_pictures_are_parts_of_their_own_a_marker_in_the_words_is_only_quoted(tmp_path):
  asked = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
  turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A picture."}]
  turns += [{"role": "user", "content": "So <image> is one?"}, {"role": "assistant", "content": "Yes."}]
  example = one(tmp_path / "a", {"file": "0.png", "messages": turns})
  assert [text for _, text in example.dialogue.turns[::2]] == ["What does  mean?", "So  is one?"]


def test_a_conversation_may_be_about_several_pictures_or_none(tmp_path):
  turns = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "The second."}]
  lines = [
    {"images": ["0.png", "2.png"], "messages": turns},
    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]},
    {"images": ["0.png"], "messages": turns},
    {"messages": turns},
    {"images": ["0.png", "1.png"], "caption": "two"},
    {"images": ["0.png", "3.png"], "messages": turns},
  ]
  folder = write_folder(tmp_path / "a", lines, pictures=3)
  (several, none), errors = read(FolderSource(folder, size=8, split="all"))
  assert several.dialogue.turns == (("user", "<image> or <image>?"), ("assistant", "The second."))
  assert several.dialogue.images[:, 0, 0, 0].tolist() == [0, 2]
  assert (several.id, several.image[0, 0, 0], several.questions) == ("a/0.png", 0, ())
  assert none.dialogue.turns == (("user", "Hello."), ("assistant", "Good day."))
  assert (none.dialogue.images.shape, none.image.shape, none.questions) == ((0, 8, 8, 3), (8, 8, 3), ())
  assert none.id == "a/captions.jsonl:2"
  assert [error.kind for error in errors] == [
    *["pictures not placed"] * 2,
    "a caption of 2 pictures",
    "missing file",
  ]


@pytest.mark.parametrize("chunk", [7, 2**22])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_one_array_of_all_records_is_read_as_lines_of_them_are(tmp_path, monkeypatch, chunk, mark):
  monkeypatch.setattr(folder_source, "CHUNK", chunk)
  lines = [*captioned(2), {"file": "2.png", "caption": 'snow ☃, ] and ["\\'}, {"file": "0.png"}]
  folder = write_folder(tmp_path / "a", lines, pictures=3)
  (folder / "array.json").write_text(mark + json.dumps(lines, indent=1, ensure_ascii=False), newline="\r\n")
  (as_lines, bad), (as_array, worse) = (
    read(FolderSource(folder / name, size=8, split="all")) for name in ("captions.jsonl", "array.json")
  )
  assert len(as_lines) == 3 and [(one.id, one.captions) for one in as_array] == [
    (one.id, one.captions) for one in as_lines
  ]
  assert [error.name.rpartition("/")[2] for error in (*bad, *worse)] == ["captions.jsonl:4", "array.json:4"]


def test_what_breaks_an_array_is_one_bad_record_behind_those_before_it(tmp_path):
  folder = write_folder(tmp_path / "a", [], pictures=3)
  (folder / "array.json").write_text(json.dumps(captioned(2))[:-1] + ', {"file": "2.png", "capt')
  examples, errors = read(FolderSource(folder / "array.json", size=8, split="all"))
  assert len(examples) == 2
  assert [(error.name.rpartition("/")[2], error.kind) for error in errors] == [("array.json:3", "not JSON")]


BAD = {
  "{not json": "not JSON",
  "[" * 100_000: "not JSON",
  '["a list"]': "not an object",
  '{"caption": "no file"}': "no file",
  '{"file": "", "caption": "x"}': "no file",
  '{"file": "\\ud800.png", "caption": "x"}': "no file",
  '{"file": "0.png"}': "no caption",
  '{"file": "0.png", "caption": " <image> "}': "no caption",
  '{"file": "0.png", "caption": ["x"]}': "caption not text",
  '{"file": "0.png", "captions": "x"}': "caption not text",
  '{"file": "0.png", "conversations": {}}': "conversation not a list",
  '{"file": "0.png", "conversations": ["x"]}': "conversation not understood",
  '{"file": "0.png", "conversations": [{"from": "robot", "value": "x"}]}': "conversation not understood",
  '{"file": "0.png", "conversations": [{"from": "gpt", "value": "x"}]}': "no caption",
}


def test_lines_that_cannot_be_read_are_bad_records_with_their_number(tmp_path):
  lines = ["", *BAD, *captioned(1)]
  folder = write_folder(tmp_path / "a", lines, pictures=1)
  examples, errors = read(FolderSource(folder, split="all"))
  assert [example.id for example in examples] == ["a/0.png"]
  assert [error.name for error in errors] == [f"{folder}/captions.jsonl:{2 + i}" for i in range(len(BAD))]
  for error, why in zip(errors, BAD.values(), strict=True):
    assert error.why.startswith(why)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
  line=st.one_of(
    st.binary(),
    st.recursive(
      st.none() | st.booleans() | st.floats() | st.text(),
      lambda inner: (
        st.lists(inner)
        | st.dictionaries(
          st.sampled_from(["file", "caption", "captions", "conversations", "id", "from", "value"]), inner
        )
      ),
    ).map(lambda value: json.dumps(value).encode()),
  ),
  pictures=st.integers(0, 3),
)
def test_any_line_is_a_record_or_a_bad_record(line, pictures):
  try:
    found = record("id", parse(line, "here"), [b"picture"] * pictures, "here")
  except BadRecord as error:
    assert error.name == "here" and error.why
    return
  assert (found.captions or found.turns) and all(found.captions)
  json.dumps([*found.captions, *found.turns], ensure_ascii=False).encode("utf-8")


SAID = st.sampled_from(["", " ", "a cat", "what <image>?", "<image>", "<image>\n<image> which?", "\ud83d"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), SAID)), pictures=st.integers(0, 3))
def test_of_any_turns_those_that_can_be_learned_are_kept_in_order_with_a_place_for_each_picture(turns, pictures):
  held = {"messages": [{"role": role, "content": said} for role, said in turns]}
  try:
    found = record("id", held, [b"picture"] * pictures, "here").turns
  except BadRecord as error:
    assert error.kind in ("no caption", "pictures not placed")
    return
  roles = [role for role, _ in found]
  assert roles[-1] == "assistant" and "user" in roles[: roles.index("assistant")]
  assert all(one != other for one, other in itertools.pairwise(roles))
  assert sum(said.count("<image>") for _, said in found) in ({0, 1} if pictures == 1 else {pictures})
  assert all(said for role, said in found if role != "user")
  words = [said for _, said in turns if said == "a cat"]
  assert sum(said.count("a cat") for _, said in found) <= len(words)


def test_a_turn_may_be_of_parts_and_what_one_says_twice_is_one_turn():
  parts = [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "text", "text": " it?"}]
  turns = [("system", "Be brief."), ("user", "Hello."), ("user", parts), ("assistant", "A cat."), ("user", "And?")]
  held = {"messages": [{"role": role, "content": content} for role, content in turns]}
  found = record("id", held, [b"picture"], "here")
  assert found.turns == (("system", "Be brief."), ("user", "Hello.\nwhat is it?"), ("assistant", "A cat."))


def test_half_surrogates_are_dropped_from_texts(tmp_path):
  assert one(tmp_path / "a", '{"file": "0.png", "caption": "a \\ud83d cat"}').captions == ("a cat",)


def test_nothing_outside_the_folder_is_read(tmp_path):
  folder = write_folder(tmp_path / "a", captioned(1))
  outside = tmp_path / "secret.png"
  Image.new("L", (8, 8)).save(outside)
  (folder / "link.png").symlink_to(outside)
  (folder / "loop.png").symlink_to("loop.png")
  (folder / "linked").symlink_to(tmp_path)
  (folder / "inside.png").symlink_to("0.png")
  os.mkfifo(folder / "pipe.png")
  files = [
    "../secret.png",
    str(outside),
    "link.png",
    "linked/secret.png",
    "../a/0.png",
    str(folder / "0.png"),
  ]
  missing = ["none.png", ".", "pipe.png", "loop.png", "nul\0.png", "x" * 5000]
  with (folder / "captions.jsonl").open("a") as file:
    file.writelines(json.dumps({"file": name, "caption": "x"}) + "\n" for name in ["inside.png", *files, *missing])
  examples, errors = read(FolderSource(folder, split="all"))
  assert [example.id for example in examples] == ["a/0.png", "a/inside.png"]
  assert [error.why.partition(":")[0] for error in errors[: len(files)]] == ["outside its folder"] * len(files)
  assert len(errors) == len(files + missing)
  assert {error.why.partition(":")[0] for error in errors[len(files) :]} == {"missing file", "not a path"}
  assert all(error.name.startswith(f"{folder}/") for error in errors)


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
  write_folder(tmp_path / "a", captioned(1))
  (tmp_path / "link").symlink_to(tmp_path / "a")
  assert FolderSource(tmp_path / "link", split="all")[0].id == "a/0.png"


def test_corrupt_pictures_are_bad_records(tmp_path):
  folder = write_folder(tmp_path / "a", captioned(3))
  (folder / "1.png").write_bytes(b"no picture")
  examples, errors = read(FolderSource(folder, split="all"))
  assert [example.captions[0] for example in examples] == ["picture 0", "picture 2"]
  assert [error.name for error in errors] == [f"{folder}/1.png"]


def test_texts_are_read_without_the_picture(tmp_path, monkeypatch):
  turns = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a cat"}]
  lines = [{"file": "0.png", "captions": ["a cat", "one cat"], "conversations": turns}]
  source = FolderSource(write_folder(tmp_path / "a", lines), size=8, split="all")
  example = source[0]
  assert example.questions == (("what is it?", "a cat"),)
  monkeypatch.setattr(images, "decode", None)
  assert source.texts(0) == ("a cat", "one cat", "a cat", "what is it?", "a cat")


def test_the_split_is_a_partition_that_depends_on_the_id_alone(tmp_path):
  records = captioned(400)
  folder = write_folder(tmp_path / "a", records)

  def ids(split: str, path=folder, **options) -> list[str]:
    source = FolderSource(path, split=split, **options)
    return [source.record(i).id for i in range(len(source))]

  train, test = ids("train", test_fraction=0.1), ids("test", test_fraction=0.1)
  assert collections.Counter(train + test) == collections.Counter(ids("all"))
  assert 20 <= len(test) <= 60
  # Neither order, nor neighbours, nor other folders, nor further captions of a picture move an id.
  (tmp_path / "b").mkdir()
  fewer = write_folder(tmp_path / "b" / "a", [*records[::-2], *records[::-2]])
  other = write_folder(tmp_path / "other", captioned(30))
  again = ids("test", (fewer, other), test_fraction=0.1)
  assert set(again) & set(train) == set()
  assert {id for id in again if id.startswith("a/")} == {f"a/{r['file']}" for r in records[::-2]} & set(test)
  # A larger fraction only adds.
  assert set(test) < set(ids("test", test_fraction=0.3))


def test_the_id_of_a_record_is_kept(tmp_path):
  assert one(tmp_path / "a", {"file": "0.png", "caption": "x", "id": 17}).id == "17"


def test_a_picture_is_of_one_split_however_its_path_is_spelled(tmp_path):
  (tmp_path / "in").mkdir()
  lines = [{"file": f"{way}{i}.png", "caption": "x"} for i in range(60) for way in ("", "./", ".//", "a/../")]
  (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  source = FolderSource(tmp_path / "in", size=8, split="all")
  shares = [{source.share(4 * i + way) for way in range(4)} for i in range(60)]
  assert all(len(of) == 1 for of in shares) and len(set.union(*shares)) == 60


def test_lines_that_share_a_picture_are_of_one_split_whatever_their_ids(tmp_path):
  data = [(f"{i // 5}.png", tiny_data.picture(i // 5), {"id": i, "caption": f"line {i}"}) for i in range(100)]
  folder = tiny_data.folder(tmp_path / "a", data)
  train, test = (FolderSource(folder, split=split, test_fraction=0.3) for split in ("train", "test"))
  seen = [{source.record(i).pictures for i in range(len(source))} for source in (train, test)]
  assert all(seen) and not seen[0] & seen[1]


@pytest.mark.parametrize("join", [lambda a, b: f"{a}, {b}", lambda a, b: [str(a), b], lambda a, b: (a, b)])
def test_several_folders_are_one_source(tmp_path, join):
  a, b = write_folder(tmp_path / "a", captioned(2)), write_folder(tmp_path / "b", captioned(1))
  examples, errors = read(FolderSource(join(a, b), split="all"))
  assert ([example.id for example in examples], errors) == (["a/0.png", "a/1.png", "b/0.png"], [])


def test_a_source_travels_to_worker_processes_and_is_named_stably(tmp_path):
  source = FolderSource(write_folder(tmp_path / "a", captioned(3)), size=8, split="all")
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[2].image, source[2].image)
  assert repr(copy) == repr(source) == repr(FolderSource(str(tmp_path / "a"), size=8, split="all"))
  assert "0x" not in repr(source)
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"path": "missing"}, "no folder missing"),
    ({"path": " , "}, "path is empty"),
    ({"path": "bare"}, "bare has no captions.jsonl"),
    ({"path": "empty"}, "no usable record"),
    ({"path": "blank"}, "no usable record"),
    ({"path": "broken"}, "no usable record .*no caption"),
    ({"path": "good", "split": "dev"}, "data.split is 'dev'"),
    ({"path": "good", "fit": "squash"}, "data.fit is 'squash'"),
    ({"path": "good", "test_fraction": 1.0}, "data.test_fraction"),
    ({"path": "good", "split": "test", "test_fraction": 0.0}, "the test split of good has no record"),
    ({"path": "good", "size": 0}, "data.size is 0"),
  ],
)
def test_what_the_user_can_mend_is_said_in_one_line(tmp_path, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "bare").mkdir()
  write_folder(tmp_path / "empty", [])
  write_folder(tmp_path / "blank", ["", " "])
  write_folder(tmp_path / "broken", ['{"file": "0.png"}'])
  write_folder(tmp_path / "good", captioned(2))
  with pytest.raises(UserError, match=message) as error:
    FolderSource(**options)
  assert "\n" not in str(error.value)


def test_make_builds_the_source_that_the_config_names(tmp_path):
  folder = str(write_folder(tmp_path / "a", captioned(40)))
  made = sources.make(ml_collections.ConfigDict({"kind": "folder", "path": folder, "size": 12}), "train")
  assert made == FolderSource(folder, size=12, split="train")
  assert sources.make({"kind": "shapes", "seed": 3, "size": 32}, "test") == ShapesSource(32, "test", 3)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({}, "data.kind is None: choose one of shapes, shapes_edits, folder"),
    ({"kind": "cloud"}, "data.kind is 'cloud'"),
    ({"kind": "folder"}, "data.path is missing"),
    ({"kind": "folder", "path": "x", "test_fraction": "a tenth"}, "data.test_fraction is 'a tenth': give a number"),
    ({"kind": "shapes", "colour": 1}, "data.colour is no setting of 'shapes' data; there are size, seed"),
    ({"kind": "folder", "path": "x", "split": "test"}, "data.split is no setting"),
    ({"kind": "folder", "path": "x", "_lines": 0}, "data._lines is no setting"),
  ],
)
def test_make_names_the_setting_that_is_wrong(config, message):
  with pytest.raises(UserError, match=message):
    sources.make(config, "train")


@pytest.mark.parametrize(("name", "records"), [("openclipart_128", 6750), ("twemoji_64", 1911)])
def test_real_folders_are_read(shared_data, name, records):
  parts = [FolderSource(shared_data / name, size=60, split=split) for split in ("train", "test")]
  assert sum(map(len, parts)) == records
  assert 0.04 < len(parts[1]) / records < 0.06
  for source in parts:
    for i in range(0, len(source), len(source) // 10):
      example = source[i]
      assert example.id.startswith(f"{name}/images/")
      assert example.captions and example.image.shape == (60, 60, 3)


def test_a_jsonl_file_of_llava_conversations_is_read_beside_its_pictures(tmp_path):
  folder = write_folder(tmp_path / "a", [], pictures=2)
  turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
  lines = [
    {"id": "n1", "image": "1.png", "conversations": turns},
    {"id": "n2", "image": "../b.png", "conversations": turns},
  ]
  (folder / "llava.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  Image.new("L", (8, 8)).save(tmp_path / "b.png")
  examples, errors = read(FolderSource(folder / "llava.jsonl", size=8, split="all"))
  assert [(one.id, one.captions, one.questions) for one in examples] == [("n1", (), (("What?", "Grey."),))]
  assert [error.kind for error in errors] == ["outside its folder"]

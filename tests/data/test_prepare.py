from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli
from clipflow_jax.data import prepared, sources
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.folder import FolderSource
from clipflow_jax.data.prepare import prepare
from clipflow_jax.data.prepared import PreparedSource
from clipflow_jax.data.shard import Filters, Job, moments
from clipflow_jax.errors import UserError
from tests import tiny_data


@pytest.fixture
def pictures(tmp_path) -> Path:
  """Twelve good pictures, one of them with questions; one damaged, one missing, one with a short caption."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  rng = np.random.default_rng(0)
  records = []
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
    records.append({"file": f"{i}.png", "captions": [f"picture number {i}", "x"]})
  records[3]["conversations"] = [
    {"from": "human", "value": "Which?"},
    {"from": "gpt", "value": "The fourth."},
  ]
  (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:70])
  Image.new("L", (8, 8)).save(folder / "short.png")
  records[5:5] = [
    {"file": "damaged.png", "caption": "damaged"},
    {"file": "missing.png", "caption": "missing"},
    {"file": "short.png", "caption": "x"},
  ]
  lines = [json.dumps(record) for record in records]
  (folder / "captions.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
  return folder


def test_conversations_keep_their_order_and_all_their_pictures(tmp_path):
  turns = [("user", "<image> or <image>?"), ("assistant", "The second."), ("user", "Why?"), ("assistant", "So.")]
  messages = [{"role": role, "content": text} for role, text in turns]
  lines = [{"id": "two", "images": ["0.png", "1.png"], "messages": messages}, {"messages": messages[2:]}]
  for i in range(2):
    Image.new("L", (20, 20), i).save(tmp_path / f"{i}.png")
  (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  statistics = run(tmp_path / "talk.jsonl", tmp_path / "out")
  assert (statistics["left_out"], statistics["questions"]) == ({"no picture": 1}, 2)
  (example,) = PreparedSource(tmp_path / "out", 16, "all")
  assert (example.id, example.captions, example.dialogue.turns) == ("two", (), tuple(turns))
  assert example.dialogue.images[:, 0, 0, 0].tolist() == [0, 1]


def test_shards_of_an_earlier_release_are_read():
  fields = {"id": "a", "captions": ("x",), "questions": (("how?", "so"), ("why?", "thus")), "image": b"picture"}
  found = prepared.unpack(msgpack.packb(fields))
  assert found.turns == (("user", "how?"), ("assistant", "so"), ("user", "why?"), ("assistant", "thus"))
  assert (found.id, found.captions, found.pictures, found.before) == ("a", ("x",), (b"picture",), None)


def quiet(_: str) -> None:
  pass


def run(path, output: Path, *, size: int = 16, **options):
  return prepare(FolderSource(path, size, "all"), output, **{"length": 4, "say": quiet, **options})


def contents(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_result_is_the_clean_part_of_the_input(pictures, tmp_path):
  output = tmp_path / "out"
  statistics = run(pictures, output, filters=Filters(min_caption=2))
  source, prepared = FolderSource(pictures, 16, "all"), PreparedSource(output, 16, "all")
  good = [i for i in range(len(source)) if i not in (5, 6, 7, 15)]
  assert len(prepared) == len(good) == 12
  for i, j in enumerate(good):
    a, b = prepared[i], source[j]
    np.testing.assert_array_equal(a.image, b.image)
    assert (a.id, a.description, a.questions) == (b.id, b.description, b.questions)
    assert a.captions == b.captions[:1]  # "x" is too short
  assert statistics["records"] == 16
  assert statistics["bad"] == {"cannot be decoded": 1, "missing file": 1, "not JSON": 1}
  assert statistics["left_out"] == {"short caption": 1}
  errors = [json.loads(line)["name"] for line in (output / "data_errors.jsonl").read_text().splitlines()]
  assert errors == [f"{pictures}/damaged.png", f"{pictures}/missing.png", f"{pictures}/captions.jsonl:16"]


def test_an_edit_keeps_the_picture_before_it(pictures, tmp_path):
  lines = (pictures / "captions.jsonl").read_text().splitlines()
  edit = json.loads(lines[0]) | {"before": "1.png"}
  broken = json.loads(lines[1]) | {"before": "damaged.png"}
  (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, (edit, broken, json.loads(lines[2])))))
  statistics = run(pictures, tmp_path / "out", max_bad_fraction=0.5)
  assert statistics["bad"] == {"cannot be decoded": 1}
  edited, plain = (PreparedSource(tmp_path / "out", 16, "all")[i] for i in range(2))
  np.testing.assert_array_equal(edited.before, FolderSource(pictures, 16, "all")[0].before)
  assert plain.before is None


def test_the_splits_of_the_result_are_those_of_the_input(pictures, tmp_path):
  run(pictures, tmp_path / "renamed", filters=Filters(min_caption=2))

  def ids(source) -> set[str]:
    examples = (BadRecords(None, 1.0).guard(source.__getitem__)(i) for i in range(len(source)))
    return {example.id for example in examples if example and example.captions != ("x",)}

  for split in ("train", "test"):
    options = dict(split=split, test_fraction=0.5)
    found = ids(PreparedSource(tmp_path / "renamed", **options))
    assert found and found == ids(FolderSource(pictures, **options))


def test_statistics_are_those_of_what_was_written(pictures, tmp_path):
  statistics = run(pictures, tmp_path / "out", filters=Filters(min_caption=2))
  pixels = np.stack([PreparedSource(tmp_path / "out", 16, "all")[i].image for i in range(12)]) / 255
  np.testing.assert_allclose(statistics["pixel_mean"], pixels.mean((0, 1, 2)), atol=1e-4)
  np.testing.assert_allclose(statistics["pixel_std"], pixels.std((0, 1, 2)), atol=1e-4)
  assert (statistics["written"], statistics["captions"], statistics["questions"]) == (12, 12, 1)
  assert statistics["caption_words"] == {"min": 3, "median": 3.0, "mean": 3.0, "max": 3}
  assert statistics["shorter_side"] == {"min": 20, "median": 20.0, "mean": 20.0, "max": 20}
  assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == statistics
  with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
    assert sheet.width == 8 * 128 and sheet.height > 2 * 128


def test_moments_are_those_of_the_pixels():
  pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
  pixels[..., 2] = 255
  mean, square = moments(pixels)
  np.testing.assert_allclose(mean, (pixels / 255).mean((0, 1)), rtol=1e-12)
  np.testing.assert_allclose(square, np.square(pixels / 255).mean((0, 1)), rtol=1e-12)


def test_the_manifest_has_the_checksum_of_every_shard(pictures, tmp_path):
  run(pictures, tmp_path / "out")
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert [shard["records"] for shard in manifest["shards"]] == [4, 2, 4, 3] and manifest["records"] == 13
  for shard in manifest["shards"]:
    data = (tmp_path / "out" / shard["file"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
  assert not [name for name in contents(tmp_path / "out") if "part" in name]


def test_several_folders_become_one_in_the_same_bytes_whatever_the_threads(pictures, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  Image.new("RGB", (9, 9), "red").save(other / "0.png")
  (other / "captions.jsonl").write_text('{"file": "0.png", "caption": "all réd"}\n', encoding="utf-8")
  for name, workers in (("one", 1), ("two", 4)):
    run(f"{pictures},{other}", tmp_path / name, workers=workers)
  assert contents(tmp_path / "one") == contents(tmp_path / "two")
  source = PreparedSource(tmp_path / "one", 16, "all")
  assert source[len(source) - 1].captions == ("all réd",)


FILTERED = {
  "min_side": (Filters(min_side=20), "too small", {0, 2, 3}),
  "max_aspect": (Filters(max_aspect=2), "too long", {0, 1, 3}),
  "min_caption": (Filters(min_caption=3), "short caption", {0, 1, 2}),
  "max_caption": (Filters(max_caption=6), "long caption", {1, 2, 3}),
}


@pytest.mark.parametrize("name", FILTERED)
def test_a_filter_leaves_out_what_does_not_fit_and_counts_it(tmp_path, name):
  filters, kind, kept = FILTERED[name]
  shapes = [((30, 30), "a square"), ((19, 30), "small"), ((61, 30), "wide"), ((20, 20), "x")]
  data = [(f"{i}.png", tiny_data.picture(i, size), {"caption": text}) for i, (size, text) in enumerate(shapes)]
  source = FolderSource(tiny_data.folder(tmp_path / "in", data), 16, "all")
  statistics = prepare(source, tmp_path / "out", filters=filters, say=quiet)
  result = PreparedSource(tmp_path / "out", 16, "all")
  assert {int(result[i].id[-5]) for i in range(len(result))} == kept
  assert statistics["left_out"] == {kind: 1} and statistics["bad"] == {}


def test_filters_see_the_size_that_a_large_jpeg_has(tmp_path):
  data = [("0.jpg", tiny_data.picture(10, (400, 300), format="JPEG"), {"caption": "grey"})]
  source = FolderSource(tiny_data.folder(tmp_path / "in", data), 16, "all")
  statistics = prepare(source, tmp_path / "out", filters=Filters(min_side=300), say=quiet)
  assert statistics["written"] == 1 and statistics["shorter_side"]["min"] == 300


def test_of_records_that_look_and_say_the_same_the_first_is_kept(tmp_path):
  data = [(f"{i}.png", tiny_data.noise(i), {"caption": f"{i}"}) for i in range(9)]
  data[5] = ("5.jpg", tiny_data.noise(1, (48, 48), "JPEG"), {"caption": "1"})  # larger and compressed
  data[8] = ("8.png", tiny_data.noise(5), {"caption": "5, which is not in it"})
  for colour in ("red", "blue"):  # flat: the same hash, another colour
    Image.new("RGB", (24, 24), colour).save(tmp_path / f"{colour}.png")
    data.append((f"{colour}.png", (tmp_path / f"{colour}.png").read_bytes(), {"caption": colour}))
  folder = tiny_data.folder(tmp_path / "in", data)
  statistics = run(folder, tmp_path / "out", dedup=True)
  result = PreparedSource(tmp_path / "out", 16, "all")
  assert [result[i].captions[0][0] for i in range(len(result))] == ["0", "1", "2", "3", "4", "6", "7", "5", "r", "b"]
  assert statistics["left_out"] == {"duplicate": 1} and statistics["written"] == len(result) == 10
  assert run(folder, tmp_path / "all")["written"] == 11


def test_other_words_about_a_picture_are_no_duplicate_and_stay_on_its_side_of_the_split(tmp_path):
  def says(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]}

  data = []
  for i in range(40):
    told = [{"caption": "a"}, {"caption": "b"}, {"caption": "a"} | says("A."), says("A."), says("B.")]
    data += [(f"{i}-{n}.png", tiny_data.noise(i), words) for n, words in enumerate([*told, *told])]
  statistics = run(tiny_data.folder(tmp_path / "in", data), tmp_path / "out", dedup=True)
  assert statistics["left_out"] == {"duplicate": 200} and statistics["written"] == 200
  sides = []
  for split in ("train", "test"):
    source = PreparedSource(tmp_path / "out", 16, split, 0.3)
    sides.append({source.record(i).id.partition("-")[0] for i in range(len(source))})
  assert all(sides) and not set.intersection(*sides)


@pytest.mark.parametrize("several", ["file", "before"])
def test_records_that_differ_in_any_of_their_pictures_are_no_duplicates(tmp_path, several):
  (tmp_path / "in").mkdir()
  for i in range(3):
    (tmp_path / "in" / f"{i}.png").write_bytes(tiny_data.noise(i))
  turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The second."}]
  lines = {
    "file": [{"file": ["0.png", f"{i}.png"], "conversations": turns} for i in (1, 2, 1)],
    "before": [{"file": "0.png", "before": f"{i}.png", "caption": "make it red"} for i in (1, 2, 1)],
  }
  (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines[several])))
  assert run(tmp_path / "in", tmp_path / "out", dedup=True)["written"] == 2


def test_pictures_may_be_stored_as_jpeg_which_is_smaller_and_nearly_the_same(tmp_path):
  folder = tiny_data.folder(
    tmp_path / "in", [(f"{i}.png", tiny_data.noise(i, (64, 64)), {"caption": "x"}) for i in range(4)]
  )
  for format in ("png", "jpeg"):
    run(folder, tmp_path / format, size=64, format=format)
  png, jpeg = (PreparedSource(tmp_path / format, 64, "all") for format in ("png", "jpeg"))
  assert np.abs(png[2].image.astype(int) - jpeg[2].image).mean() < 8
  assert len(jpeg.record(2).pictures[0]) < len(png.record(2).pictures[0]) / 2


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset", "prepared"])
def test_every_source_can_be_prepared(tmp_path, kind):
  data = tiny_data.samples(6)
  path = tmp_path / "in"
  if kind == "parquet":
    pytest.importorskip("pyarrow")
    tiny_data.parquet(path / "a.parquet", data)
  elif kind == "webdataset":
    tiny_data.webdataset(path / "a.tar", data)
  else:
    tiny_data.folder(path, data)
  if kind == "prepared":
    run(path, tmp_path / "first", size=12)
    path = tmp_path / "first"
  source = sources.make({"kind": kind, "path": str(path), "size": 8}, "all")
  prepare(source, tmp_path / "out", say=quiet, length=4)
  result = sources.make({"kind": "prepared", "path": str(tmp_path / "out"), "size": 8}, "all")
  assert result[0].captions == ("picture 0",)
  result = pickle.loads(pickle.dumps(result))  # with a shard open
  for i in range(6):
    np.testing.assert_array_equal(result[i].image, source[i].image)
    assert (result[i].id, result[i].captions) == (source[i].id, (f"picture {i}",))


def test_a_finished_output_of_the_same_request_is_kept_and_any_other_is_refused(pictures, tmp_path):
  said: list[str] = []
  output = tmp_path / "out"
  first = run(pictures, output)
  before = contents(output)
  assert run([pictures], output, say=said.append) == first
  assert "already holds these 13 pictures, and its checksums are right" in said[-1]
  assert contents(output) == before
  with pytest.raises(UserError, match="prepared from other inputs or settings"):
    run(pictures, output, size=24)
  with pytest.raises(UserError, match="pictures exists: give another output"):
    run(pictures, pictures)
  shard = output / "00001.array_record"
  shard.write_bytes(shard.read_bytes()[:-1] + b"?")
  with pytest.raises(UserError, match="00001.array_record is damaged"):
    run(pictures, output)


# Killed: at any point, the same request goes on to the same bytes.


def _killed_in(pictures: Path, output: Path, place: str, count: int) -> None:
  """In a process of its own: prepares, and is killed at the count-th call of os.replace, Path.rename or convert."""

  def dying(fn):
    def call(*args, **kwargs):
      nonlocal count
      count -= 1
      if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
      return fn(*args, **kwargs)

    return call

  owner, name = {"replace": (os, "replace"), "convert": (Job, "convert"), "rename": (Path, "rename")}[place]
  setattr(owner, name, dying(getattr(owner, name)))
  run(pictures, output, dedup=True, workers=1)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(pictures, tmp_path):
  run(pictures, tmp_path / "whole", dedup=True)
  expected = contents(tmp_path / "whole")
  processes = multiprocessing.get_context("forkserver")  # clean processes, that import once for all
  processes.set_forkserver_preload(["clipflow_jax.data.prepare", "array_record.python.array_record_data_source"])
  rng = np.random.default_rng(0)
  # As it begins, between a shard and its part, at the very end; and twice in a row wherever chance puts it.
  points = [[("replace", 0)], [("replace", 2)], [("rename", 0)]]
  points += [[("convert", int(n)), ("convert", int(m))] for n, m in rng.integers(0, 8, (1, 2))]
  for number, kills in enumerate(points):
    output = tmp_path / f"killed{number}"
    for place, count in kills:
      process = processes.Process(target=_killed_in, args=(pictures, output, place, count))
      process.start()
      process.join()
      assert process.exitcode == -signal.SIGKILL and not output.exists()
    run(pictures, output, dedup=True)
    assert contents(output) == expected


def test_killed_while_tidying_up_the_result_is_whole_and_tidied_later(pictures, tmp_path, monkeypatch):
  def dies(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr("shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
      run(pictures, tmp_path / "out")
  assert len(PreparedSource(tmp_path / "out", 16, "all")) == 13
  run(pictures, tmp_path / "out")
  run(pictures, tmp_path / "other")
  assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_shards_that_are_complete_are_not_made_again(pictures, tmp_path):
  def interrupt(said: str) -> None:
    if said.startswith("2 of 4 shards"):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(pictures, tmp_path / "out", say=interrupt)
  for picture in ("0.png", "4.png"):  # of the shards that are complete
    (pictures / picture).unlink()
  assert run(pictures, tmp_path / "out")["written"] == 13


def test_shards_whose_bad_pictures_were_mended_are_made_again(pictures, tmp_path):
  def interrupt(said: str) -> None:
    if said.startswith("2 of 4 shards"):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(pictures, tmp_path / "out", say=interrupt)
  for picture in ("damaged.png", "missing.png"):
    (pictures / picture).write_bytes(tiny_data.picture(7, (20, 20)))
  statistics = run(pictures, tmp_path / "out")
  assert (statistics["written"], statistics["bad"]) == (15, {"not JSON": 1})
  said: list[str] = []
  assert run(pictures, tmp_path / "out", say=said.append) == statistics
  assert said[-1].endswith("; 1 records were bad: once they are mended, remove it and prepare it anew")


def test_inputs_that_changed_since_the_killed_run_are_refused(pictures, tmp_path):
  def interrupt(_: str) -> None:
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(pictures, tmp_path / "out", say=interrupt)
  lines = (pictures / "captions.jsonl").read_text().splitlines(keepends=True)
  (pictures / "captions.jsonl").write_text("".join(lines[:9]))
  with pytest.raises(UserError, match="out.partial was begun from other inputs or settings, or the inputs changed"):
    run(pictures, tmp_path / "out")


def test_a_strange_folder_in_the_way_is_left_alone(pictures, tmp_path):
  precious = tmp_path / "out.partial" / "thesis.txt"
  precious.parent.mkdir()
  precious.write_text("years of work")
  with pytest.raises(UserError, match="was not written by prepare"):
    run(pictures, tmp_path / "out")
  assert precious.exists()


def test_an_output_that_can_be_no_folder_is_told(pictures, tmp_path, monkeypatch):
  file = pictures / "0.png"
  with pytest.raises(UserError, match=r"0.png exists: give another output"):
    run(pictures, file)
  with pytest.raises(UserError, match=r"cannot write into .*below.partial: "):
    run(pictures, file / "below")
  monkeypatch.chdir(pictures)
  with pytest.raises(UserError, match=r"pictures exists: give another output"):
    run(pictures, Path("."))


def test_an_empty_output_folder_is_filled(pictures, tmp_path):
  (tmp_path / "out").mkdir()
  assert run(pictures, tmp_path / "out")["written"] == 13


def test_inputs_without_a_good_picture_are_an_error_that_names_them(pictures, tmp_path):
  for picture in pictures.glob("*.png"):
    picture.unlink()
  with pytest.raises(UserError, match="nothing to prepare: 16 of 16 records are bad .*15 missing file.*0.png"):
    run(pictures, tmp_path / "out")
  assert not list(tmp_path.glob("out*"))


def test_too_many_bad_records_stop_it_and_more_patience_goes_on_from_there(tmp_path):
  data = [(f"{i}.png", tiny_data.picture(i % 256) if i % 4 else b"", {"caption": "x"}) for i in range(160)]
  folder = tiny_data.folder(tmp_path / "in", data)
  with pytest.raises(UserError, match="40 of 160 records are bad .*more names are in .*data_errors.jsonl; mend them"):
    run(folder, tmp_path / "out", max_bad_fraction=0.2, length=50)
  assert len((tmp_path / "out.partial" / "data_errors.jsonl").read_text().splitlines()) == 40
  assert run(folder, tmp_path / "out", max_bad_fraction=0.3, length=50)["bad"] == {"not a picture": 40}


# Reading what was prepared.


def test_an_incomplete_copy_is_told_before_anything_is_read(pictures, tmp_path):
  run(pictures, tmp_path / "out")
  shard = tmp_path / "out" / "00002.array_record"
  size = shard.stat().st_size
  shard.write_bytes(shard.read_bytes()[:-9])
  with pytest.raises(UserError, match=f"00002.array_record has {size - 9} bytes, manifest.json says {size}"):
    PreparedSource(tmp_path / "out")
  shard.unlink()
  with pytest.raises(UserError, match="00002.array_record has no bytes"):
    PreparedSource(tmp_path / "out")


@pytest.mark.parametrize("damage", [Path.unlink, lambda index: index.write_bytes(index.read_bytes()[:90])])
def test_an_index_that_is_not_whole_is_told(pictures, tmp_path, damage):
  run(pictures, tmp_path / "out")
  damage(tmp_path / "out" / "index.npy")
  with pytest.raises(UserError, match="an index.npy of .*out cannot be read, copy it again"):
    PreparedSource(tmp_path / "out")


def test_a_damaged_record_is_a_bad_record_and_the_others_are_read(pictures, tmp_path):
  run(pictures, tmp_path / "out")
  shard = tmp_path / "out" / "00000.array_record"
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 255
  shard.write_bytes(data)
  source, good = PreparedSource(tmp_path / "out", 16, "all"), []
  for i in range(len(source)):
    try:
      good.append(source[i].id)
    except BadRecord as error:
      assert error.name.startswith(str(shard)) and error.kind == "cannot be read"
  assert 9 <= len(good) < 13


def test_a_manifest_leads_to_no_other_folder(pictures, tmp_path):
  run(pictures, tmp_path / "out")
  file = tmp_path / "out" / "manifest.json"
  shards = [path.name for path in sorted((tmp_path / "out").glob("*.array_record"))]
  (tmp_path / "out" / shards[0]).rename(tmp_path / shards[0])
  file.write_text(file.read_text().replace(shards[0], f"../{shards[0]}"))
  with pytest.raises(UserError, match=f"out/{shards[0]} has no bytes"):
    PreparedSource(tmp_path / "out")


def test_a_folder_that_is_not_prepared_is_told_how_to(pictures):
  with pytest.raises(
    UserError, match=r"is not a prepared folder .*clipflow prepare --source=folder --input=.*pictures"
  ):
    sources.make({"kind": "prepared", "path": str(pictures)}, "train")
  (pictures / "manifest.json").write_text('{"request": {}, "pictures": 1, "shards": {}}')  # of cached features
  with pytest.raises(UserError, match=r"is not a prepared folder"):
    sources.make({"kind": "prepared", "path": str(pictures)}, "train")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "gif"}, "stored as one of png, jpeg, webp, not as 'gif'"),
    ({"max_bad_fraction": 2.0}, "give one from 0 to 1"),
  ],
)
def test_settings_that_make_no_sense_are_refused(pictures, tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    run(pictures, tmp_path / "out", **options)
  with pytest.raises(UserError, match="cannot be prepared: give a source on disk"):
    prepare(sources.make({"kind": "shapes"}, "train"), tmp_path / "out")
  with pytest.raises(UserError, match="the longer side by the shorter, give 1 or more"):
    Filters(max_aspect=0.5)


# The command.


def test_the_command_prepares_by_its_options(tmp_path, capsys):
  data = [("0.png", tiny_data.noise(0, (30, 20)), {"caption": "short"})]
  data += [("1.png", tiny_data.noise(1, (90, 20)), {"caption": "too wide"})]
  data += [("2.png", tiny_data.noise(2), {"caption": "a fitting one"})]
  data += [("3.png", tiny_data.noise(2), {"caption": "a fitting one"})]
  tar = tiny_data.webdataset(tmp_path / "a.tar", data)
  options = ["--size=16", "--fit=pad", "--format=webp", "--max-aspect=2", "--min-caption=6", "--dedup"]
  assert cli.main(["prepare", "--source=webdataset", f"--input={tar}", f"--output={tmp_path / 'out'}", *options]) == 0
  assert "1 pictures" in capsys.readouterr().out
  source = PreparedSource(tmp_path / "out", 16, "all")
  assert [source[i].id for i in range(len(source))] == ["a/2"] and source.record(0).pictures[0][8:12] == b"WEBP"
  left_out = json.loads((tmp_path / "out" / "statistics.json").read_text())["left_out"]
  assert left_out == {"duplicate": 1, "short caption": 1, "too long": 1}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      ["--source=cloud"],
      "data.kind is 'cloud': choose one of shapes, shapes_edits, folder, prepared, parquet, webdataset, tfds",
    ),
    (["--source=shapes"], "is no setting of 'shapes' data"),
    (["--option=image"], "--option=image is not of the form KEY=VALUE"),
    (["--option=colour=red"], "data.colour is no setting of 'folder' data"),
    (["--max-aspect=0"], "give 1 or more"),
  ],
)
def test_the_command_says_in_one_line_what_is_wrong(pictures, tmp_path, capsys, options, message):
  assert cli.main(["prepare", f"--input={pictures}", f"--output={tmp_path / 'out'}", *options]) == 2
  said = capsys.readouterr().err.strip()
  assert message in said and "\n" not in said
